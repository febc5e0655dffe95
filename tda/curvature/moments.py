"""Second moments of stored rows: H = (1/n) Σ_i h_i x_i x_iᵀ, as sums that merge.

n rows x_i [k], weights h_i ≥ 0. A sum over some of the rows is a finished value; those of batches,
chunks and workers ``merge`` in any order. Only the division by n, in ``mean``, makes it a mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from tda.cluster import run, shares
from tda.progress import Tick

TILE_BYTES = 32 * 2**20  # float32 rows of one tile: large enough for BLAS, small enough for caches
EXACT_FLOPS = 2**32  # below this a curvature is taken in float64: it costs a second at most


class Rows(Protocol):
    """What is asked of a table of examples here (see ``tda.store.Table``)."""

    @property
    def num_rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def chunk_rows(self) -> int: ...
    def rows(self, checkpoint: int, start: int, stop: int) -> Tensor: ...


def row_ranges(
    table: Rows, start: int = 0, stop: int | None = None, size: int | None = None
) -> Iterator[tuple[int, int]]:
    """Cuts [start, stop) into ranges that end at chunk borders, of about ``size`` bytes each."""
    stop = table.num_rows if stop is None else stop
    chunks = max(1, (size or TILE_BYTES) // (4 * table.dim * table.chunk_rows))
    step = chunks * table.chunk_rows
    while start < stop:
        border = min(stop, (start // step + 1) * step)
        yield start, border
        start = border


@dataclass(frozen=True)
class Gram:
    """Σ h_i x_i x_iᵀ [k, k] float64 over ``count`` rows, and the precision its products had."""

    total: Tensor
    count: int
    eps: float = 0.0

    @staticmethod
    def zero(dim: int) -> Gram:
        return Gram(torch.zeros(dim, dim, dtype=torch.float64), 0)

    def add(self, rows: Tensor, weights: Tensor) -> Gram:
        """With rows [r, k] and weights [r] ≥ 0; products in the dtype of the rows, sums in float64.

        Weights are divided by their largest before the root: a fully fitted model has slopes whose
        squares leave the range of float32.
        """
        largest = weights.max() if len(weights) else weights.new_zeros(())
        eps = max(self.eps, torch.finfo(rows.dtype).eps)
        if largest == 0:
            return Gram(self.total, self.count + len(rows), eps)
        scaled = rows * (weights / largest).sqrt().to(rows.dtype)[:, None]
        values = scaled.numpy()  # numpy's XᵀX is a symmetric product, half the work of torch's
        product = torch.from_numpy(values.T @ values).double().mul_(largest.double())
        return Gram(product.add_(self.total), self.count + len(rows), eps)

    def merge(self, other: Gram) -> Gram:
        return Gram(self.total + other.total, self.count + other.count, max(self.eps, other.eps))

    def without(self, other: Gram) -> Gram:
        """The sum over the rows that ``other`` is not of. Loses digits: see `updating`."""
        total = self.total - other.total
        return Gram(total, self.count - other.count, max(self.eps, other.eps))

    def scaled(self, factor: float) -> Gram:
        """With weights ``factor``·h."""
        return replace(self, total=self.total * factor)

    @property
    def trace(self) -> float:
        return float(self.total.trace())

    def shrunk(self, share: float) -> Gram:
        """(1 − share)·H + share·diag(H): with a share > 0 of full rank where no H_jj is 0."""
        total = self.total * (1 - share)
        total.diagonal().copy_(self.total.diagonal())
        return replace(self, total=total)

    def mean(self) -> Tensor:
        """H [k, k] float64."""
        return self.total / self.count


@dataclass(frozen=True)
class Diagonal:
    """Σ h_i x_i² [k] float64 over ``count`` rows: the diagonal of ``Gram``."""

    total: Tensor
    count: int

    @staticmethod
    def zero(dim: int) -> Diagonal:
        return Diagonal(torch.zeros(dim, dtype=torch.float64), 0)

    def add(self, rows: Tensor, weights: Tensor) -> Diagonal:
        """With rows [r, k] and weights [r] ≥ 0."""
        squares = rows.double().square()
        return replace(
            self, total=self.total + weights.double() @ squares, count=self.count + len(rows)
        )

    def merge(self, other: Diagonal) -> Diagonal:
        return Diagonal(self.total + other.total, self.count + other.count)

    def without(self, other: Diagonal) -> Diagonal:
        """The sum over the rows that ``other`` is not of."""
        total = (self.total - other.total).clamp_(min=0)
        return Diagonal(total, self.count - other.count)

    def scaled(self, factor: float) -> Diagonal:
        """With weights ``factor``·h."""
        return replace(self, total=self.total * factor)

    @property
    def trace(self) -> float:
        return float(self.total.sum())

    def mean(self) -> Tensor:
        """diag(H) [k] float64."""
        return self.total / self.count


@dataclass(frozen=True)
class WeightedRows:
    """√h_i·x_i [n, k] float64, all of them: H = XᵀX/n through its dual, the kernel XXᵀ/n [n, n]."""

    rows: Tensor

    @property
    def count(self) -> int:
        return len(self.rows)

    def merge(self, other: WeightedRows) -> WeightedRows:
        return WeightedRows(torch.cat([self.rows, other.rows]))


@dataclass(frozen=True)
class Part:
    """The rows of a table at a checkpoint, as they take part in a curvature.

    weights: h [rows], or [rows, blocks] where they differ by block, float64 ≥ 0.
    """

    table: Rows
    checkpoint: int
    weights: Tensor


def second_moments(
    parts: Sequence[Part], blocks: Sequence[slice], *, whole: bool = True, dual: bool = True
) -> list[Moment]:
    """H = (1/N) Σ h x xᵀ over the N rows of all parts, for every block of columns.

    One pass over each table, by the open cluster's workers if there is one. ``whole``: the whole
    matrix, in its dual form where N is smaller than the block, unless not ``dual``; else its
    diagonal. Raises StoreError if a chunk is missing or altered.
    """
    count = sum(part.table.num_rows for part in parts)
    widths = [block.stop - block.start for block in blocks]
    kept = frozenset(b for b, k in enumerate(widths) if whole and dual and count < k)
    work = Sums(tuple(parts), tuple(blocks), kept, whole, count)
    spans = [
        (place, *span)
        for place, part in enumerate(parts)
        for span in shares(part.table.num_rows, part.table.chunk_rows)
    ]
    found = run(work, spans)
    return [functools.reduce(_merge, sums) for sums in zip(*found, strict=True)]


Moment: TypeAlias = Gram | WeightedRows | Diagonal


def _merge(a: Any, b: Any) -> Moment:
    return a.merge(b)


@dataclass(frozen=True)
class Sums:
    """The second moments of a range of the rows of a part; ``kept`` blocks as weighted rows."""

    parts: tuple[Part, ...]
    blocks: tuple[slice, ...]
    kept: frozenset[int]
    whole: bool
    count: int

    def __call__(self, span: tuple[int, int, int], tick: Tick) -> list[Moment]:
        part = self.parts[span[0]]
        widths = [block.stop - block.start for block in self.blocks]
        kind = Gram if self.whole else Diagonal
        kept: dict[int, list[Tensor]] = {b: [] for b in self.kept}
        sums: list[Gram | Diagonal] = [
            kind.zero(0 if b in kept else k) for b, k in enumerate(widths)
        ]
        for start, stop in row_ranges(part.table, *span[1:]):
            rows = part.table.rows(part.checkpoint, start, stop)
            for b, block in enumerate(self.blocks):
                weights = part.weights[start:stop]
                weights = weights if weights.ndim == 1 else weights[:, b]
                if b in kept:
                    kept[b].append(rows[:, block].double() * weights.sqrt()[:, None])
                    continue
                exact = self.count * widths[b] ** 2 < EXACT_FLOPS
                dtype = torch.float64 if exact else torch.float32
                sums[b] = sums[b].add(rows[:, block].to(dtype), weights)
            tick(stop - start)
        return [
            WeightedRows(torch.cat(kept[b])) if b in kept else sums[b] for b in range(len(widths))
        ]


@dataclass(frozen=True)
class Picked:
    """The same rows on some of their columns [c]."""

    table: Rows
    columns: Tensor

    @property
    def num_rows(self) -> int:
        return self.table.num_rows

    @property
    def dim(self) -> int:
        return len(self.columns)

    @property
    def chunk_rows(self) -> int:
        return self.table.chunk_rows

    def rows(self, checkpoint: int, start: int, stop: int) -> Tensor:
        return self.table.rows(checkpoint, start, stop)[:, self.columns]


def gram(table: Rows, checkpoint: int, weights: Tensor) -> Gram | WeightedRows:
    """The whole second moment of a table's rows, weights [n]; in its dual form when n < k."""
    part = Part(table, checkpoint, weights.double())
    found = second_moments([part], [slice(0, table.dim)])[0]
    assert not isinstance(found, Diagonal)
    return found


def diagonal(table: Rows, checkpoint: int, weights: Tensor) -> Diagonal:
    """The diagonal of the second moment of a table's rows, weights [n]."""
    part = Part(table, checkpoint, weights.double())
    found = second_moments([part], [slice(0, table.dim)], whole=False)[0]
    assert isinstance(found, Diagonal)
    return found


def squared_norms(table: Rows, checkpoint: int, blocks: Sequence[slice]) -> Tensor:
    """‖x_i‖² of every row in every block of columns [n, blocks] float64; one pass."""
    parts = []
    for span in row_ranges(table):
        rows = table.rows(checkpoint, *span).double()
        parts.append(torch.stack([rows[:, block].square().sum(1) for block in blocks], 1))
    return torch.cat(parts)
