"""Data sets: any map-style data set, seen as examples with stable ids and a few columns.

An example is what ``dataset[i]`` returns: a tuple ``(input, target)``, a dict with ``input`` and
``target``, or a Hugging Face style dict (``input_ids``, ``attention_mask``, ``labels``, …).
In a dict the keys ``id``, ``source``, ``group``, ``text``, ``image`` and ``row`` (the numbers of a
tabular example) ride along: they are kept with the run and shown in the report, and never reach the
model.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import TensorDataset, default_collate

from tda.errors import DataError

RIDE_ALONG = ("id", "source", "group", "text", "image", "row")
_TARGETS = ("target", "labels", "label")
_DIGEST_BYTES = 16
MAX_TEXT = 2000
NUMBERED = (
    "classes, labels = np.unique(names, return_inverse=True); the names may ride along as `group`, "
    "`source` or `text` of a dict"
)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_READ_TWICE = 8  # examples: enough to meet an augmentation that is made half of the time
_HASHED_BYTES = 2**22  # of arrays, laid out example by example at a time

_ARRAY = np.ndarray | torch.Tensor
_NUMBER = np.generic | int | float

Batch = tuple[Any, ...] | dict[str, Any]


class Dataset(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Examples:
    """What is known of a data set without its model.

    ids: ``[example]`` unique strings; digests: ``[example, 16]`` uint8, of what the model sees;
    columns: those of ``label``, ``source``, ``group``, ``text``, ``image``, ``row`` that are there.
    """

    ids: np.ndarray
    digests: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """Hex digest of the contents and ids of examples ``start:stop``, in order."""
        state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        state.update(np.ascontiguousarray(self.digests[start:stop]).tobytes())
        state.update("\0".join(self.ids[start:stop].tolist()).encode())
        return state.hexdigest()


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
    if isinstance(dataset, type) or not map_style:
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
        target = next((content[k] for k in _TARGETS if k in content), None)
    else:
        values = example if isinstance(example, tuple | list) else (example,)
        content = tuple(_tensor(value) for value in values)
        extras = {}
        target = content[-1] if len(content) > 1 else None
    if (
        "label" not in extras
        and isinstance(target, torch.Tensor)
        and target.numel() == num_examples
    ):
        extras["label"] = target
    return content, extras


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


def _digest_of(content: Any, index: int) -> bytes:
    """The digest of what the model sees; a failure becomes a DataError that names the example."""
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    try:
        _digest(content, state)
    except Exception as error:
        raise DataError(
            f"the content of example {index} cannot be told from that of others",
            found=f"{type(error).__name__}: {error}",
            wanted="tensors, arrays, pictures, numbers or text, in tuples, dicts or objects: a run "
            "that goes on looks whether its examples are the same",
            do="give it as a tensor, or give its class a __repr__ that tells its content",
        ) from error
    return state.digest()


def _digest(content: Any, state: Any) -> None:
    if isinstance(content, torch.Tensor):
        array = content.detach().cpu().contiguous()
        state.update(f"{array.dtype}{tuple(array.shape)}".encode())
        state.update(array.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(content, Mapping):
        for name in sorted(content):
            state.update(f"{name}=".encode())
            _digest(content[name], state)
    elif isinstance(content, tuple | list):
        for part in content:
            _digest(part, state)
    elif isinstance(content, str | bytes | np.generic):
        state.update(repr(content).encode())
    elif hasattr(content, "__array_interface__") or hasattr(content, "__array__"):
        _digest_array(np.asarray(content), state)
    elif not _ADDRESS.search(repr(content)):
        state.update(repr(content).encode())
    elif getattr(content, "__dict__", None):  # an address is another one at every reading
        state.update(type(content).__qualname__.encode())
        _digest(vars(content), state)
    else:
        raise TypeError(f"{content!r} has no content that is known")


def _digest_array(array: np.ndarray, state: Any) -> None:
    state.update(f"{array.dtype}{array.shape}".encode())
    if array.dtype.hasobject:
        for value in array.flat:
            _digest(value, state)
    else:
        state.update(array.tobytes())


def _stacked(dataset: Dataset) -> tuple[Any, dict[str, Any]] | None:
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


def _digests(content: Any, num_examples: int, tick: Callable[[int], None]) -> np.ndarray:
    """`_digest` of each example of stacked tensors: ``[example, 16]``."""
    names = sorted(content) if isinstance(content, Mapping) else range(len(content))
    digests = bytearray()
    one = sum(content[name][:1].nbytes for name in names)
    step = max(1, _HASHED_BYTES // max(1, one))
    for start in range(0, num_examples, step):
        count = min(step, num_examples - start)
        parts = []
        for name in names:
            array = content[name][start : start + count].detach().cpu().contiguous()
            key = f"{name}=" if isinstance(content, Mapping) else ""
            head = f"{key}{array.dtype}{tuple(array.shape[1:])}".encode()
            parts.append(np.broadcast_to(np.frombuffer(head, np.uint8), (count, len(head))))
            parts.append(array.reshape(-1).view(torch.uint8).numpy().reshape(count, -1))
        for data in np.concatenate(parts, axis=1):
            digests += hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
        tick(count)
    return np.frombuffer(digests, np.uint8).reshape(-1, _DIGEST_BYTES)


def describe(dataset: Dataset, tick: Callable[[int], None] = lambda count: None) -> Examples:
    """Read a data set: ids, content digests and columns.

    An id that is not given is the digest of the content; the second of two equal examples gets
    the suffix ``.1``, and so on. ``tick(count)`` is called whenever that many more are read.
    Raises DataError when given ids repeat, an example cannot be read, or one of the first is
    another one when it is read again.
    """
    extras: dict[str, list[Any]] = {}
    stacked = _stacked(dataset)
    if stacked is not None:
        digests = _digests(stacked[0], len(dataset), tick)
        for name, values in stacked[1].items():
            extras[name] = values.flatten().tolist() if name == "label" else [*values]
    else:
        digests = np.empty((len(dataset), _DIGEST_BYTES), np.uint8)
        for index in range(len(dataset)):
            content, extra = split(read(dataset, index))
            digest = _digest_of(content, index)
            if index < _READ_TWICE:
                _require_same(digest, dataset, index)
            digests[index] = np.frombuffer(digest, np.uint8)
            for name, value in extra.items():
                extras.setdefault(name, [None] * len(dataset))[index] = value
            tick(1)
    columns: dict[str, np.ndarray] = {
        name: _column(name, extras[name]) for name in ("label", *RIDE_ALONG[1:]) if name in extras
    }
    return Examples(_ids(extras.get("id"), digests), digests, columns)


def _require_same(digest: bytes, dataset: Dataset, index: int) -> None:
    """Raises DataError if the example is another one when it is read again."""
    if _digest_of(split(read(dataset, index))[0], index) != digest:
        raise DataError(
            "an example is another one each time it is read",
            where=f"example {index}",
            wanted="the same content at every reading: rows are those of the examples that were "
            "read, and a run that goes on looks whether its examples are the same",
            do="leave random augmentation out of the data set, or draw it by the example's index",
        )


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


def _ids(given: list[Any] | None, digests: np.ndarray) -> np.ndarray:
    if given is not None:
        ids = [None if name is None else _text(name) for name in given]
        if None in ids:
            raise DataError("an example has no id while others have one", where=ids.index(None))
        repeated = [f"{name!r} ({n} times)" for name, n in Counter(ids).items() if n > 1]
        if repeated:
            raise DataError(
                "example ids repeat",
                found=", ".join(repeated[:5]),
                wanted="one id an example",
                do="make the ids unique, or leave them out: content hashes are used then",
            )
        return np.array(ids, dtype=np.str_)
    text = digests.tobytes().hex().encode()
    names = np.frombuffer(text, f"S{2 * _DIGEST_BYTES}").astype(np.str_)
    if len(set(names.tolist())) == len(names):
        return names
    again: Counter[str] = Counter()
    distinct = []
    for name in names.tolist():
        distinct.append(f"{name}.{again[name]}" if again[name] else name)
        again[name] += 1
    return np.array(distinct, dtype=np.str_)


def _column(name: str, values: list[Any]) -> np.ndarray:
    if name == "label":
        labels = np.array([_label(v, index) for index, v in enumerate(values)])
        whole = np.isfinite(labels).all() and (labels == np.round(labels)).all()
        return labels.astype(np.int64 if whole else np.float32)
    if name == "image":
        return _pictures(values)
    if name == "row":
        return _rows(values)
    return np.array(["" if v is None else _text(v)[:MAX_TEXT] for v in values], dtype=np.str_)


def _label(value: Any, index: int) -> float:
    try:
        return np.nan if value is None else float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            "a label is no number",
            where=f"example {index}",
            found=repr(value)[:60],
            wanted="one number, a whole one for a class",
            do=NUMBERED,
        ) from error


def _text(value: Any) -> str:
    """A value as text; of a tensor of no axes, its number."""
    return str(value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value)


def _rows(values: list[Any]) -> np.ndarray:
    """float32 ``[example, feature]``; an example without numbers has NaN."""
    rows = [None if v is None else np.asarray(v, np.float32).reshape(-1) for v in values]
    widths = {row.size for row in rows if row is not None}
    if len(widths) != 1 or 0 in widths:
        raise DataError(
            "the rows that ride along cannot be kept",
            found=f"rows of {', '.join(map(str, sorted(widths)))} numbers",
            wanted="the same numbers, one or more, of every example",
        )
    missing = np.full(widths.pop(), np.nan, np.float32)
    return np.stack([missing if row is None else row for row in rows])


def _pictures(values: list[Any]) -> np.ndarray:
    pictures = [_picture(np.asarray(value)) for value in values if value is not None]
    shapes = {picture.shape for picture in pictures}
    if len(pictures) != len(values) or len(shapes) != 1:
        raise DataError(
            "the images that ride along cannot be kept",
            found=f"{len(pictures)} images of shapes {sorted(shapes)[:4]}",
            wanted=f"{len(values)} images of one shape",
            do="give every example an `image` of the same size (a thumbnail will do)",
        )
    return np.stack(pictures)


def _picture(image: np.ndarray) -> np.ndarray:
    """uint8 ``[H, W]`` or ``[H, W, 3]`` from grey or RGB, channels first or last, 0–1 or 0–255."""
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = np.moveaxis(image, 0, 2)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] == 3):
        raise DataError(
            "an `image` is not a picture",
            found=f"shape {image.shape}",
            wanted="[H, W], [H, W, 1 or 3] or [1 or 3, H, W]",
        )
    if image.dtype == np.uint8:
        return image
    return np.clip(np.rint(image * 255.0), 0, 255).astype(np.uint8)


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
    stacked = _stacked(dataset) if function is None else None
    for first in range(start, stop, batch_size):
        last = min(first + batch_size, stop)
        if stacked is None:
            yield first, collate([read(dataset, i) for i in range(first, last)], function)
        else:  # a slice is a batch; a copy, for a model may change its input in place
            yield first, tree_map(lambda v, s=slice(first, last): v[s].clone(), stacked[0])
