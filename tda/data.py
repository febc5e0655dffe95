"""Data sets: any map-style data set, its examples one by one and in batches.

An example is what ``dataset[i]`` returns: a tuple ``(input, target)``, a dict with ``input`` and
``target``, or a Hugging Face style dict (``input_ids``, ``attention_mask``, ``labels``, …).
In a dict the keys ``id``, ``source``, ``group``, ``text``, ``image`` and ``row`` (the numbers of a
tabular example) ride along: they are kept with the run and shown in the report, and never reach the
model. What is known of all examples once they are read is in `tda.examples`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import TensorDataset, default_collate

from tda.errors import DataError

RIDE_ALONG = ("id", "source", "group", "text", "image", "row")
TARGETS = ("target", "labels", "label")
NUMBERED = (
    "classes, labels = np.unique(names, return_inverse=True); the names may ride along as `group`, "
    "`source` or `text` of a dict"
)

_ARRAY = np.ndarray | torch.Tensor
_NUMBER = np.generic | int | float

Batch = tuple[Any, ...] | dict[str, Any]


class Dataset(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class _Arrays:
    """Arrays with a common first axis, read as a data set of tuples."""

    def __init__(self, arrays: Sequence[torch.Tensor]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(array[index] for array in self.arrays)


class _Rows:
    """A dict of arrays or lists with a common first axis, read as a data set of dicts."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index] for name, array in self.arrays.items()}


def as_dataset(data: Any) -> Dataset:
    """A data set from a map-style data set, an array, or a tuple or dict of arrays.

    A column of a table is an array: it is read by position, whatever its index.
    Raises DataError when ``data`` is none of these, is empty, or its arrays differ in length.
    """
    if isinstance(data, _ARRAY):
        data = (data,)
    if type(data) is TensorDataset:
        data = data.tensors
    parts: tuple[Any, ...] = (data,)
    if isinstance(data, tuple):
        parts = data = tuple(_by_position(part) for part in data)
    elif isinstance(data, Mapping):
        data = {name: _by_position(part) for name, part in data.items()}
        parts = tuple(data.values())
    table = next((part for part in parts if hasattr(part, "iloc")), None)
    if table is not None:
        raise DataError(
            "a table is not a map-style data set: it is indexed by column",
            found=type(table).__name__,
            wanted="its columns as arrays",
            do='(table[features].to_numpy("float32"), table["label"].to_numpy())',
        )
    if isinstance(data, Mapping) and any(hasattr(part, "column_names") for part in parts):
        raise DataError(
            "these are several data sets",
            found=", ".join(map(str, data)),
            wanted="one map-style data set",
            do=f"give one of them: data[{next(iter(data))!r}]",
        )
    are_arrays = any(isinstance(part, _ARRAY) for part in parts)
    are_arrays &= all(isinstance(part, _ARRAY | _NUMBER) for part in parts)
    if isinstance(data, tuple) and are_arrays:
        _same_length({f"array {i}": a for i, a in enumerate(data)})
        dataset: Any = _Arrays([_shared(a) for a in data])
    elif isinstance(data, Mapping) and data:
        _same_length(data)
        dataset = _Rows(data)
    else:
        dataset = data
    map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, type | str | bytes) or not map_style:
        raise DataError(
            "this is not a map-style data set",
            found=type(data).__name__,
            wanted="an object with __len__ and __getitem__, or arrays with a common first axis",
            do="wrap an iterable data set in a list, or in a torch.utils.data.Dataset",
        )
    if len(dataset) == 0:
        raise DataError("the data set is empty", found="0 examples", wanted="at least 1")
    return dataset


def _by_position(values: Any) -> Any:
    """The array of a table's column, of which ``[i]`` is the row labelled i; all else as it is."""
    column = hasattr(values, "iloc") and getattr(values, "ndim", None) == 1
    return values.to_numpy() if column and hasattr(values, "to_numpy") else values


def _shared(array: Any) -> torch.Tensor:
    """A tensor of an array's memory, such as that of a mapped file: nobody writes to it here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return _numbers(array, shared=True)


class Picked:
    """Some examples of a data set, any of them several times."""

    def __init__(self, dataset: Dataset, places: np.ndarray) -> None:
        self.dataset, self.places = dataset, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> Any:
        return read(self.dataset, int(self.places[row]))


def part(dataset: Dataset, start: int, stop: int) -> Dataset:
    """Examples ``start:stop``."""
    if isinstance(dataset, _Arrays):
        return _Arrays([array[start:stop] for array in dataset.arrays])
    if isinstance(dataset, _Rows):
        return _Rows({name: array[start:stop] for name, array in dataset.arrays.items()})
    return Picked(dataset, np.arange(start, stop))


def _has_axis(array: Any) -> bool:
    return hasattr(array, "__len__") and getattr(array, "ndim", 1) > 0


def _same_length(arrays: Mapping[Any, Any]) -> None:
    alone = [name for name, array in arrays.items() if not _has_axis(array)]
    if alone:
        raise DataError(
            "an array has no axis of examples",
            where=alone[0],
            found="a single number",
            wanted="one entry an example along the first axis",
            do="give one example as a slice of each array: (x[i : i + 1], y[i : i + 1])",
        )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            "the arrays differ in length",
            found=", ".join(f"{name}: {length}" for name, length in lengths.items()),
            wanted="the same number of examples in each",
        )


def split(example: Any, num_examples: int = 1) -> tuple[Any, dict[str, Any]]:
    """An example as (what the model and the measurement see, what rides along).

    Or, of arrays with a first axis of ``num_examples``, all of them at once.
    """
    content: Any
    if isinstance(example, Mapping):
        extras = {name: example[name] for name in RIDE_ALONG if example.get(name) is not None}
        content = {k: _tensor(v) for k, v in example.items() if k not in RIDE_ALONG}
        if "target" in content and "label" in content:  # then the label is only shown
            extras["label"] = content.pop("label")
    else:
        values = example if isinstance(example, tuple | list) else (example,)
        content = tuple(_tensor(value) for value in values)
        extras = {}
    place = target_of(content)
    target = None if place is None else content[place]
    if (
        "label" not in extras
        and isinstance(target, torch.Tensor)
        and target.numel() == num_examples
    ):
        extras["label"] = target
    return content, extras


def target_of(content: Any) -> Any:
    """Where the target is in what the model sees: a key of a dict, a place in a tuple, or None."""
    if isinstance(content, Mapping):
        return next((name for name in TARGETS if name in content), None)
    return len(content) - 1 if len(content) > 1 else None


def _tensor(value: Any) -> Any:
    if isinstance(value, str | bytes | torch.Tensor | Mapping):
        return value
    if isinstance(value, bool | int | float | np.ndarray | np.generic | list | tuple):
        tensor = _numbers(value)
        # A Python float is a float32 to every model; an array keeps the type it was given.
        return tensor.float() if isinstance(value, float) else tensor
    return value


def _numbers(value: Any, shared: bool = False) -> torch.Tensor:
    """A tensor of an array, a number or a list; of memory that nobody may write to, a copy."""
    try:
        if isinstance(value, torch.Tensor):
            return value
        array = np.asarray(value)
        return torch.as_tensor(array if shared or array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise DataError(
            "what the model sees are no numbers",
            found=f"{str(value)[:60]} ({type(error).__name__}: {str(error).splitlines()[0]})",
            wanted="numbers: whole ones, 0, 1, …, for classes, and as many in each list of lists",
            do=NUMBERED,
        ) from error


def split_all(dataset: Dataset) -> tuple[Any, dict[str, Any]] | None:
    """`split` of all examples at once, where the data set is made of arrays; else None."""
    if isinstance(dataset, _Arrays):
        return split(tuple(dataset.arrays), len(dataset))
    if not isinstance(dataset, _Rows):
        return None
    seen = {name: v for name, v in dataset.arrays.items() if name not in RIDE_ALONG}
    for name, values in seen.items():
        if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
            # Like a Python float, one float64 an example is a float32 to every model.
            alone = values.ndim == 1 and values.dtype == np.float64
            seen[name] = values.astype(np.float32) if alone else values
        elif not isinstance(values, torch.Tensor):
            return None
    return split({**dataset.arrays, **seen}, len(dataset))


def read(dataset: Dataset, index: int) -> Any:
    """``dataset[index]``; a failure becomes a DataError that names the example."""
    try:
        return dataset[index]
    except (KeyboardInterrupt, DataError):
        raise
    except Exception as error:
        raise DataError(
            f"example {index} of the data set cannot be read",
            found=f"{type(error).__name__}: {error}",
            do="mend the data set; what was finished before is kept and the same call resumes",
        ) from error


def evenly(size: int, count: int) -> np.ndarray:
    """So many places, or all there are, evenly over ``size``: int64, ascending."""
    return np.linspace(0, size - 1, min(count, size)).round().astype(np.int64)


def to(batch: Any, device: str | torch.device) -> Any:
    """A batch with its tensors on a device."""
    is_gpu = torch.device(device).type == "cuda"

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dense = value.layout is torch.strided
        if is_gpu and dense and value.device.type == "cpu":  # which need not be waited for
            return value.pin_memory().to(device, non_blocking=True)
        return value.to(device)

    return tree_map(move, batch)


def arriving(*tensors: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Copies on the processor: what waits until they are there, and not for what a GPU is given
    after this."""
    copies = [t.detach().to("cpu", non_blocking=t.is_cuda) for t in tensors]
    events = [
        torch.cuda.current_stream(device).record_event()
        for device in {t.device for t in tensors if t.is_cuda}
    ]

    def wait() -> list[torch.Tensor]:
        for event in events:
            event.synchronize()
        return copies

    return wait


Collate = Callable[[list[Any]], Any]


def collate(examples: list[Any], function: Collate | None = None) -> Batch:
    """A batch of examples as the model sees them: ride-along keys dropped, the rest stacked.

    Raises DataError when the examples differ in shape.
    """
    contents = [split(example)[0] for example in examples]
    try:
        batch = (function or default_collate)(contents)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            "examples of one batch cannot be stacked",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            wanted="examples of equal shapes",
            do="pad them, or give Task(..., collate=) a function from a list of examples to a "
            "batch (padding that the model masks out does not change a score)",
        ) from error
    return tuple(batch) if isinstance(batch, list) else batch


def batches(
    dataset: Dataset, start: int, stop: int, batch_size: int, function: Collate | None = None
) -> Iterator[tuple[int, Batch]]:
    """(index of the first example, batch) over ``start:stop``; the last batch may be short."""
    stacked = split_all(dataset) if function is None else None
    for first in range(start, stop, batch_size):
        last = min(first + batch_size, stop)
        if stacked is None:
            yield first, collate([read(dataset, i) for i in range(first, last)], function)
        else:  # a slice is a batch; a copy, for a model may change its input in place
            yield first, tree_map(lambda v, s=slice(first, last): v[s].clone(), stacked[0])
