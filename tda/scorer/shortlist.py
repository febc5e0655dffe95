"""Exact top k at the speed of bfloat16 products, where the processor has them.

Stored rows are bfloat16 or int8, so their products with a query q rounded to bfloat16, q', miss the
score by what was rounded off, and by sums in float32:

    |⟨q, x⟩ − fl⟨q', x⟩| ≤ ε ‖x‖ + 2⁻⁸ |fl⟨q', x⟩|,    ε = ‖q − q'‖ + k 2⁻²⁴ ‖q'‖

(Cauchy–Schwarz; any order of summation; the product is itself rounded to bfloat16.) Every pair of a
query and a row that these bounds leave in doubt is kept – on real gradients, one to three for each
answer – and scored again as the plain path does. So the answer is that of the plain path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tda.curvature import row_ranges
from tda.scorer import Prepared, ahead, refuse_not_finite
from tda.scorer.pairs import greatest, pair_scores
from tda.scorer.ranking import Heaps, TopK, ranked

if TYPE_CHECKING:
    from tda.store import Table

FEWEST_QUERIES = 64  # below this the scan waits for memory, not for products
ROWS_PER_ANSWER = 32  # with fewer, most pairs are kept: products of them all are cheaper
ROW_TILE = 1024  # rows of one product: its scores and their bounds stay in cache
QUERY_TILE = 1024
PAIRS = 2**22  # kept at most, unless the answer itself is larger: 20 bytes each
ROUNDING = 2.0**-8 * 1.02  # of a product to bfloat16; with room for float32 in the bounds
LOST = 2.0**-60  # added to ‖x‖: what falls below the range of float32 in squares and products


def pays(prepared: Prepared, k: int) -> bool:
    """Whether rows are stored so that this is exact, and it is the faster way here."""
    train = prepared.train
    return (
        has_bfloat16()
        and train.dtype != "float32"
        and prepared.num_queries >= FEWEST_QUERIES
        and train.num_rows >= ROWS_PER_ANSWER * k
    )


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def top_k(prepared: Prepared, k: int) -> TopK:
    """``tda.scorer.top_k`` of rows stored in bfloat16 or int8; k ≤ n."""
    from tda.scorer import plain_top_k

    rounded, kept = Rounded.of(prepared.queries), Shortlist(prepared.num_queries, k)
    for low, tile in ahead(_coded(prepared.train)):
        _add_tile(kept, rounded, tile, prepared.row_weights, low)
    queries, rows = kept.finish()
    scores = pair_scores(prepared, queries, rows)
    sides = [
        [part.numpy() for part in greatest(sign * scores, queries, rows, prepared.num_queries, k)]
        for sign in (1, -1)
    ]
    many = kept.given_up.nonzero()[:, 0].numpy()
    if len(many):
        whole = plain_top_k(prepared.select(many), k)
        for side, rest, sign in zip(
            sides, (whole.proponents, whole.opponents), (1, -1), strict=True
        ):
            side[0][many], side[1][many] = rest.indices, sign * rest.scores
    (best, highest), (worst, lowest) = sides
    return ranked(prepared.train, (best, highest), (worst, -lowest))


class Rounded(NamedTuple):
    """Queries in units of their greatest length at a checkpoint, which changes no ranking.

    values: q', C arrays [m, k] bfloat16. error: ε [C, m].
    """

    values: list[Tensor]
    error: Tensor

    @staticmethod
    def of(queries: Sequence[Tensor]) -> Rounded:
        unit = torch.stack([q.double().norm(dim=1) for q in queries]).amax(0)
        exact = [q.double() / torch.where(unit > 0, unit, 1.0)[:, None] for q in queries]
        values = [q.bfloat16() for q in exact]
        lost = torch.stack(
            [(q - v.double()).norm(dim=1) for q, v in zip(exact, values, strict=True)]
        )
        lengths = torch.stack([v.double().norm(dim=1) for v in values])
        error = lost + (queries[0].shape[1] + 8) * 2.0**-24 * lengths
        if len(queries) > 1:  # parts may cancel in a score: their rounding is bounded by ‖q'‖ ‖x‖
            error += ROUNDING * lengths
        return Rounded(values, (error * (1 + 4 * ROUNDING)).float())


class Coded(NamedTuple):
    """Rows [r, k] as factor · bfloat16, and the lengths of the bfloat16 [r]."""

    rows: Tensor
    factor: Tensor | None
    lengths: Tensor


def _coded(train: Table) -> Iterator[tuple[int, list[Coded]]]:
    for low, high in row_ranges(train):
        parts = [train.coded_rows(c, low, high) for c in range(train.num_checkpoints)]
        for start in range(0, high - low, ROW_TILE):
            cut, tile = slice(start, start + ROW_TILE), []
            for stored, factor in parts:
                rows = stored[cut].bfloat16()
                lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
                tile.append(Coded(rows, factor if factor is None else factor[cut], lengths))
            yield low + start, tile


def _add_tile(
    kept: Shortlist, queries: Rounded, rows: list[Coded], weights: Tensor, low: int
) -> None:
    factors = []
    for c, x in enumerate(rows):
        weight = weights[c, low : low + len(x.rows)]
        factors.append(weight if x.factor is None else weight * x.factor)
    lengths = [(x.lengths + LOST) * f.abs() for x, f in zip(rows, factors, strict=True)]
    for first in range(0, kept.num_queries, QUERY_TILE):
        some = slice(first, first + QUERY_TILE)
        score = None
        for q, x, factor in zip(queries.values, rows, factors, strict=True):
            part = (q[some] @ x.rows.T).float().mul_(factor)
            score = part if score is None else score.add_(part)
        assert score is not None
        refuse_not_finite(score, first, low)
        above, below = score, score
        for error, length in zip(queries.error[:, some], lengths, strict=True):
            above = above.addr(error, length)
            below = below.addr(error, length, alpha=-1)
        kept.add(below, above, low, first)


class Shortlist:
    """Pairs (query, row) that may be among the k best or the k worst, while tiles stream by.

    Of a pair with score s ± ε‖x‖ are known ``below`` = s − ε'‖x‖ and ``above`` = s + ε'‖x‖, with ε'
    a little more than ε: then the true score lies between below − ρ|below| and above + ρ|above|
    (ρ = ROUNDING), which grow with them. So the kth greatest ``below`` decides.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.num_queries = num_queries
        self.given_up = torch.zeros(num_queries, dtype=torch.bool)
        self._best, self._worst = Heaps(num_queries, k, largest=True), Heaps(num_queries, k)
        self._most = max(16 * k, PAIRS // max(1, num_queries))
        self._parts: list[tuple[Tensor, ...]] = []
        self._count = 0

    def add(self, below: Tensor, above: Tensor, low: int, first: int) -> None:
        """[r, width]: of the queries first.. and the rows low.. ."""
        self._best.add(below, low, first)
        self._worst.add(above, low, first)
        least, most = (end[first : first + len(below), None] for end in self._ends())
        query, row = (above >= least).logical_or_(below <= most).nonzero(as_tuple=True)
        self._parts.append((query + first, row + low, below[query, row], above[query, row]))
        self._count += len(query)
        if self._count > 2 * self.num_queries * self._most:
            self._forget()

    def finish(self) -> tuple[Tensor, Tensor]:
        """(queries, rows) [p] int64 of the pairs that stay in doubt, in this order."""
        self._forget()
        query, row = self._parts[0][:2]
        order = query.argsort(stable=True)
        return query[order], row[order]

    def _ends(self) -> tuple[Tensor, Tensor]:
        """What ``above`` of the k best is at least, and ``below`` of the k worst at most [m]."""
        best, worst = (torch.from_numpy(h.values[:, 0].copy()) for h in (self._best, self._worst))
        return _lowered(best), -_lowered(-worst)

    def _forget(self) -> None:
        """What later rows have decided, and queries of which too much stays in doubt."""
        query, row, below, above = (torch.cat(part) for part in zip(*self._parts, strict=True))
        least, most = self._ends()
        stays = ((above >= least[query]) | (below <= most[query])) & ~self.given_up[query]
        counts = query[stays].bincount(minlength=self.num_queries)
        self.given_up |= counts > self._most
        stays &= ~self.given_up[query]
        self._parts = [tuple(part[stays] for part in (query, row, below, above))]
        self._count = int(stays.sum())


def _lowered(below: Tensor) -> Tensor:
    """The least ``above`` of which above + ρ|above| reaches below − ρ|below|."""
    return below - 2.5 * ROUNDING * below.abs()
