"""Examples: what is known of a data set once it is read, without a model.

id        as given; else the digest of the content
digest    of what the model sees: a run that goes on knows its examples by it
input     the same without the target: equal ones under several labels are known by it
columns   what rides along, as arrays that a store keeps and a report shows
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tda.data import NUMBERED, RIDE_ALONG, Dataset, read, split, split_all, target_of
from tda.errors import DataError
from tda.identity import bytes_of

MAX_TEXT = 2000
_DIGEST_BYTES = 16
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_READ_TWICE = 8  # examples: enough to meet an augmentation that is made half of the time
_HASHED_BYTES = 2**20  # of arrays, laid out example by example at a time


@dataclass(frozen=True)
class Examples:
    """What is known of a data set without its model.

    ids: ``[example]`` unique strings; digests: ``[example, 16]`` uint8, of what the model sees;
    columns: those of ``label``, ``source``, ``group``, ``text``, ``image``, ``row`` that are there;
    inputs: ``[example, 16]`` uint8, of what the model sees without the target, if all have one.
    """

    ids: np.ndarray
    digests: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    inputs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """Hex digest of the contents and ids of examples ``start:stop``, in order."""
        state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        state.update(np.ascontiguousarray(self.digests[start:stop]).tobytes())
        state.update("\0".join(self.ids[start:stop].tolist()).encode())
        return state.hexdigest()


def describe(dataset: Dataset, tick: Callable[[int], None] = lambda count: None) -> Examples:
    """Read a data set: ids, content digests and columns.

    An id that is not given is the digest of the content; the second of two equal examples gets
    the suffix ``.1``, and so on. ``tick(count)`` is called whenever that many more are read.
    Raises DataError when given ids repeat, an example cannot be read, or one of the first is
    another one when it is read again.
    """
    extras: dict[str, list[Any]] = {}
    stacked = split_all(dataset)
    if stacked is not None:
        digests, inputs = _digests(stacked[0], len(dataset), tick)
        for name, values in stacked[1].items():
            extras[name] = values.flatten().tolist() if name == "label" else [*values]
    else:
        digests, inputs = bytearray(), bytearray()
        for index in range(len(dataset)):
            content, extra = split(read(dataset, index))
            digest, of_input = _digests_of(content, index)
            if index < _READ_TWICE:
                _require_same(digest, dataset, index)
            digests += digest
            inputs += of_input
            for name, value in extra.items():
                extras.setdefault(name, [None] * len(dataset))[index] = value
            tick(1)
    columns: dict[str, np.ndarray] = {
        name: _column(name, extras[name]) for name in ("label", *RIDE_ALONG[1:]) if name in extras
    }
    of_all, of_inputs = (
        np.frombuffer(of, np.uint8).reshape(-1, _DIGEST_BYTES) for of in (digests, inputs)
    )
    ids = _ids(extras.get("id"), of_all)
    return Examples(ids, of_all, columns, of_inputs if len(of_inputs) == len(ids) else None)


def _require_same(digest: bytes, dataset: Dataset, index: int) -> None:
    """Raises DataError if the example is another one when it is read again."""
    if _digests_of(split(read(dataset, index))[0], index)[0] != digest:
        raise DataError(
            "an example is another one each time it is read",
            where=f"example {index}",
            wanted="the same content at every reading: rows are those of the examples that were "
            "read, and a run that goes on looks whether its examples are the same",
            do="leave random augmentation out of the data set, or draw it by the example's index",
        )


def _digests_of(content: Any, index: int) -> tuple[bytes, bytes]:
    """The digest of what the model sees, and of its input alone: nothing if there is no target.

    A failure becomes a DataError that names the example.
    """
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    try:
        before, target, after = _in_order(content)
        _digest_parts(content, before, state)
        of_input = state.copy()
        _digest_parts(content, after, of_input)
        _digest_parts(content, [*target, *after], state)
    except Exception as error:
        raise DataError(
            f"the content of example {index} cannot be told from that of others",
            found=f"{type(error).__name__}: {error}",
            wanted="tensors, arrays, pictures, numbers or text, in tuples, dicts or objects: a run "
            "that goes on looks whether its examples are the same",
            do="give it as a tensor, or give its class a __repr__ that tells its content",
        ) from error
    return state.digest(), of_input.digest() if target else b""


def _in_order(content: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Names of the parts as they are hashed: before the target, its own if there is an input
    beside it, and after it."""
    names, target = _names(content), target_of(content)
    place = names.index(target) if target in names and len(names) > 1 else len(names)
    return names[:place], names[place : place + 1], names[place + 1 :]


def _names(content: Any) -> list[Any]:
    return sorted(content) if isinstance(content, Mapping) else [*range(len(content))]


def _digest_parts(content: Any, names: Sequence[Any], state: Any) -> None:
    for name in names:
        if isinstance(content, Mapping):
            state.update(f"{name}=".encode())
        _digest(content[name], state)


def _digest(content: Any, state: Any) -> None:
    if isinstance(content, torch.Tensor):
        state.update(f"{content.dtype}{tuple(content.shape)}".encode())
        state.update(bytes_of(content))
    elif isinstance(content, Mapping | tuple | list):
        _digest_parts(content, _names(content), state)
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


def _digests(
    content: Any, num_examples: int, tick: Callable[[int], None]
) -> tuple[bytearray, bytearray]:
    """`_digests_of` each example of stacked tensors, one after the other."""
    digests, inputs = bytearray(), bytearray()
    before, target, after = _in_order(content)
    names = before, [*target, *after], after
    one = sum(content[name][:1].nbytes for part in names for name in part)
    step = max(1, _HASHED_BYTES // max(1, one))
    for start in range(0, num_examples, step):
        some = slice(start, min(start + step, num_examples))
        laid_out = (_laid_out(content, part, some) for part in names)
        for head, rest, tail in zip(*laid_out, strict=True):
            state = hashlib.blake2b(head, digest_size=_DIGEST_BYTES)
            if target:
                inputs += _with(tail, state).digest() if after else state.digest()
                state.update(rest)
            digests += state.digest()
        tick(some.stop - start)
    return digests, inputs


def _laid_out(content: Any, names: Sequence[Any], some: slice) -> np.ndarray:
    """What is hashed of these parts of some examples: ``[example, byte]``."""
    count = some.stop - some.start
    parts = [np.empty((count, 0), np.uint8)]
    for name in names:
        array = content[name][some]
        key = f"{name}=" if isinstance(content, Mapping) else ""
        head = f"{key}{array.dtype}{tuple(array.shape[1:])}".encode()
        parts.append(np.broadcast_to(np.frombuffer(head, np.uint8), (count, len(head))))
        parts.append(bytes_of(array).reshape(count, -1))
    return np.concatenate(parts, axis=1)


def _with(tail: np.ndarray, state: Any) -> Any:
    """A state that has seen this too; the one given has not."""
    state = state.copy()
    state.update(tail)
    return state


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
