"""What the writer of a chunk hands in: checked, then encoded as the table stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tda.errors import GradientError, StoreError
from tda.store.arrays import COLUMNS
from tda.store.encoding import encode_rows

if TYPE_CHECKING:
    from tda.store.table import Table

_WORDS = {"rows": "projected gradient", "grad_norm": "gradient norm"}


def encode_chunk(table: Table, chunk: int, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of one chunk as they are stored, by name. ``given``: rows, columns, embedding.

    Raises StoreError for an absent, surplus or misshapen array, GradientError naming the example
    if a number is not finite (p may be NaN) or does not fit bfloat16.
    """
    start = table.chunk_range(chunk)[0]
    wanted = {"rows", *COLUMNS} | ({"embedding"} if table.hidden is not None else set())
    if set(given) != wanted:
        raise StoreError(
            "a chunk needs exactly the arrays of its table",
            where=table.folder,
            found=", ".join(sorted(given)),
            wanted=", ".join(sorted(wanted)),
        )
    parts = {name: _checked(table, name, values, chunk) for name, values in given.items()}
    parts["rows"], scale = encode_rows(parts["rows"], table.dtype)
    if scale is not None:
        parts["scale"] = scale
    if "embedding" in parts:
        parts["embedding"], _ = encode_rows(parts["embedding"], "bfloat16")
    for name, values in parts.items():
        if values.dtype == np.uint16:
            _refuse(table, (values & 0x7F80) == 0x7F80, start, name, "is too large for bfloat16")
    return parts


def _checked(table: Table, name: str, given: Any, chunk: int) -> np.ndarray:
    start, stop = table.chunk_range(chunk)
    values = np.ascontiguousarray(given, dtype=np.float32)
    shape = (stop - start, *table.specs[name].shape[2:])
    if values.shape != shape:
        raise StoreError(
            f"{name} of examples {start}:{stop} has another shape",
            where=table.folder,
            found=values.shape,
            wanted=shape,
        )
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()
    if np.isfinite(total):  # a sum over anything that is not finite is not finite
        return values
    bad = np.isinf(values) if name == "p" else ~np.isfinite(values)
    _refuse(table, bad, start, name, "is not finite")
    return values


def _refuse(table: Table, bad: np.ndarray, start: int, name: str, what: str) -> None:
    if not bad.any():
        return
    index = start + int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
    raise GradientError(
        f"the {_WORDS.get(name, name)} of example {str(table.column('id')[index])!r} {what}",
        where=f"{table.folder}, example {index}",
        do="look at this example and the model's output for it; a model in lower precision may "
        "overflow: compute in float32, or leave the example out",
    )
