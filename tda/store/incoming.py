"""What the writer of a chunk hands in: checked, then encoded as the table stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tda.errors import GradientError, StoreError
from tda.store.arrays import COLUMNS
from tda.store.encoding import BLOCKS, encode_rows, halves

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
    parts = {}
    for name, values in given.items():
        dtype = {"rows": table.dtype, "embedding": "bfloat16"}.get(name, "float32")
        parts[name], scale = encode_rows(_checked(table, name, values, chunk), dtype)
        if scale is not None:
            parts["scale"] = scale
        if dtype in ("bfloat16", *BLOCKS):
            stored = halves(parts[name], dtype)
            if not _is_finite(stored):
                _refuse(table, stored.isnan(), start, name, "is not finite")
                _refuse(table, stored.isinf(), start, name, "is too large for bfloat16")
    return parts


def _checked(table: Table, name: str, given: Any, chunk: int) -> Tensor:
    """Float32, or bfloat16 where it came so."""
    start, stop = table.chunk_range(chunk)
    if not isinstance(given, Tensor):
        given = torch.from_numpy(np.require(given, np.float32, ["C", "W"]))
    values = given.contiguous()
    last = (table.dim,) if name == "rows" else table.specs[name].shape[2:]
    shape = (stop - start, *last)
    if values.shape != shape:
        raise StoreError(
            f"{name} of examples {start}:{stop} has another shape",
            where=table.folder,
            found=values.shape,
            wanted=shape,
        )
    if values.dtype == torch.float32 and not _is_finite(values):
        bad = values.isinf() if name == "p" else ~values.isfinite()
        _refuse(table, bad, start, name, "is not finite")
    return values


def _is_finite(values: Tensor) -> bool:
    """False wherever a number is not finite: no sum over it is; and where the sum is too large."""
    return bool(torch.isfinite(values.sum()))


def _refuse(table: Table, bad: Tensor, start: int, name: str, what: str) -> None:
    if not bad.any():
        return
    index = start + int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
    raise GradientError(
        f"the {_WORDS.get(name, name)} of example {str(table.column('id')[index])!r} {what}",
        where=f"{table.folder}, example {index}",
        do="look at this example and the model's output for it; a model in lower precision may "
        "overflow: compute in float32, or leave the example out",
    )
