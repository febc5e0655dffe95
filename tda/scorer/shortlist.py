"""Exact top k at the speed of short products, where the processor has them.

Stored rows are int8 or bfloat16, as which int4 and ternary are read. Of a query q rounded to q' the
products with a row x miss the score by what was rounded off, and by sums in float32:

    |⟨q, x⟩ − fl⟨q', x⟩| ≤ ε ‖x‖ + 2⁻⁸ |fl⟨q', x⟩|,    ε = ‖q − q'‖ + k 2⁻²⁴ ‖q'‖      bfloat16
    |⟨q, x⟩ − ⟨q', x⟩|   ≤ 127 (‖q − q'‖₁ + k 2⁻²⁴ ‖q'‖₁)                              int8

(Cauchy–Schwarz, Hölder; any order of summation; products of bfloat16 are themselves rounded to it.)
A few queries wait for memory, not for products: they meet int8 rows as they are, as two int8 terms
q' = s (q₁ + q₂/254). Every pair of a query and a row that these bounds leave in doubt is kept – on
real gradients, one to three for each answer – and scored again as the plain path does. So the
answer is that of the plain path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tda.progress import Tick
from tda.scorer import blocks
from tda.scorer.blocks import Coded, coded, refuse_not_finite
from tda.scorer.pairs import greatest, pair_scores
from tda.scorer.prepared import Prepared
from tda.scorer.ranking import Found, TopK, ranked

FEWEST_QUERIES = 64  # below this the scan waits for memory, not for products
ROWS_PER_ANSWER = 32  # with fewer, most pairs are kept: products of them all are cheaper
ROW_TILE = 256  # rows of one product: they, its scores and their bounds stay in a core's cache
QUERY_TILE = 1024
ROWS_AT_FIRST = 2048  # decide at once what is kept of the others
ROWS_OF_FEW = 4096  # of one product with few queries
PAIRS = 2**22  # kept at most, unless the answer itself is larger: 16 bytes each
ROUNDING = 2.0**-8 * 1.02  # of a product to bfloat16; with room for float32 in the bounds
LOST = 2.0**-60  # added to ‖x‖: what falls below the range of float32 in squares and products
ROW_BITS = 32  # of a pair as a number: its row, below its query
LARGEST, HALVES = 127, 254  # of an int8; steps of the second term in one of the first


def pays(prepared: Prepared, k: int, num_rows: int | None = None) -> bool:
    """Whether rows are stored so that this is exact, and it is the faster way here."""
    train = prepared.train
    return (
        has_bfloat16()
        and train.dtype != "float32"
        and (train.dtype == "int8" or prepared.num_queries >= FEWEST_QUERIES)
        and (num_rows or train.num_rows) >= ROWS_PER_ANSWER * k
    )


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def top_k(prepared: Prepared, k: int) -> TopK:
    """``tda.scorer.top_k`` of rows stored in bfloat16 or int8; k ≤ n."""
    best, worst = ends(prepared, k, (0, prepared.train.num_rows))
    return ranked(prepared.train, (best[0], -best[1]), worst)


def ends(
    prepared: Prepared, k: int, span: tuple[int, int], tick: Tick = lambda count: None
) -> tuple[Found, Found]:
    """What ``blocks.ends`` finds among the rows ``span``, which are at least k."""
    few = prepared.num_queries < FEWEST_QUERIES and prepared.train.dtype == "int8"
    rounded = (Rounded.integers if few else Rounded.halves)(prepared.queries)
    kept = Shortlist(prepared.num_queries, k)
    for low, _, parts in coded(prepared.train, *span):
        size = ROWS_OF_FEW if few else ROWS_AT_FIRST if low == span[0] else ROW_TILE
        for start, tile in _tiles(parts, few, size):
            _add_tile(kept, rounded, tile, prepared.row_weights, low + start)
        tick(len(parts[0][0]))
    queries, rows = kept.finish()
    scores = pair_scores(prepared, queries, rows)
    sides = []
    for sign in (1, -1):
        columns, values = greatest(sign * scores, queries, rows, prepared.num_queries, k)
        sides.append((columns.numpy(), values.neg_().numpy()))
    many = np.flatnonzero(kept.given_up)
    if len(many):
        whole = blocks.ends(prepared.select(many), k, span, lambda count: None)
        for side, rest in zip(sides, whole, strict=True):
            side[0][many], side[1][many] = rest
    best, worst = sides
    return best, worst


class Rounded(NamedTuple):
    """Queries in units of their greatest length at a checkpoint, which changes no ranking.

    terms: of each checkpoint, q' [m, k] bfloat16, or q₁ and q₂ [2, m, k] int8. scale: s [C, m] of
    int8. error: ε [C, m].
    """

    terms: list[Tensor]
    scale: Tensor | None
    error: Tensor

    @staticmethod
    def halves(queries: Sequence[Tensor]) -> Rounded:
        exact = _in_units(queries)
        terms = [q.bfloat16() for q in exact]
        lost = [(q - v.double()).norm(dim=1) for q, v in zip(exact, terms, strict=True)]
        lengths = torch.stack([v.double().norm(dim=1) for v in terms])
        error = torch.stack(lost) + (queries[0].shape[1] + 8) * 2.0**-24 * lengths
        if len(queries) > 1:  # parts may cancel in a score: their rounding is bounded by ‖q'‖ ‖x‖
            error += ROUNDING * lengths
        return Rounded(terms, None, (error * (1 + 4 * ROUNDING)).float())

    @staticmethod
    def integers(queries: Sequence[Tensor]) -> Rounded:
        terms, scales, errors = [], [], []
        for q in _in_units(queries):
            scale = (q.abs().amax(1) / LARGEST).clamp(min=LOST)[:, None]
            first = (q / scale).round()
            second = ((q / scale - first) * HALVES).round()
            lost = (q - scale * (first + second / HALVES)).abs().sum(1)
            summed = (q.shape[1] + 8) * 2.0**-24 * (q.abs().sum(1) + lost)
            terms.append(torch.stack([first, second]).to(torch.int8))
            scales.append(scale[:, 0])
            errors.append(LARGEST * (lost + summed) * (1 + 4 * ROUNDING))
        return Rounded(terms, torch.stack(scales).float(), torch.stack(errors).float())

    def products(self, checkpoint: int, some: slice, rows: Tensor) -> Tensor:
        """fl⟨q', x⟩ of some queries, [r, width] float32."""
        if self.scale is None:
            return (self.terms[checkpoint][some] @ rows.T).float()
        first, second = (_integers(term[some], rows) for term in self.terms[checkpoint])
        return first.add_(second, alpha=1 / HALVES).mul_(self.scale[checkpoint, some, None])


def _in_units(queries: Sequence[Tensor]) -> list[Tensor]:
    unit = torch.stack([q.double().norm(dim=1) for q in queries]).amax(0)
    return [q.double() / torch.where(unit > 0, unit, 1.0)[:, None] for q in queries]


def _integers(term: Tensor, rows: Tensor) -> Tensor:
    return torch._int_mm(term, rows.T).float()


class Tile(NamedTuple):
    """Rows [r, k] bfloat16 or int8, what they are multiplied by, and the lengths [r] of bfloat16.

    The length of int8 rows is in the error of the queries, as the largest there can be.
    """

    rows: Tensor
    factor: Tensor | None
    lengths: Tensor | None


def _tiles(parts: list[Coded], few: bool, size: int) -> Iterator[tuple[int, list[Tile]]]:
    for start in range(0, len(parts[0][0]), size):
        cut, tile = slice(start, start + size), []
        for stored, factor in parts:
            factor = factor if factor is None else factor[cut]
            if few:
                tile.append(Tile(stored[cut], factor, None))
            else:
                rows = stored[cut].bfloat16()
                tile.append(Tile(rows, factor, rows.float().norm(dim=1)))
        yield start, tile


def _add_tile(
    kept: Shortlist, queries: Rounded, rows: list[Tile], weights: Tensor, low: int
) -> None:
    factors, lengths = [], []
    for c, x in enumerate(rows):
        weight = weights[c, low : low + len(x.rows)]
        factors.append(weight if x.factor is None else weight * x.factor)
        size = factors[-1].abs()
        lengths.append(size if x.lengths is None else (x.lengths + LOST) * size)
    for first in range(0, kept.num_queries, QUERY_TILE):
        some = slice(first, first + QUERY_TILE)
        score = None
        for c, (x, factor) in enumerate(zip(rows, factors, strict=True)):
            part = queries.products(c, some, x.rows).mul_(factor)
            score = part if score is None else score.add_(part)
        assert score is not None
        kept.add(score, queries.error[:, some], torch.stack(lengths), low, first)


class Shortlist:
    """Pairs (query, row) that may be among the k best or the k worst, while tiles stream by.

    Of a pair with score s ± ε‖x‖ are known ``below`` = s − ε'‖x‖ and ``above`` = s + ε'‖x‖, with ε'
    a little more than ε: then the true score lies between below − ρ|below| and above + ρ|above|
    (ρ = ROUNDING), which grow with them. So the kth greatest ``below`` decides. Most scores are
    far from both ends whatever their row's length, and are looked at once.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.num_queries = num_queries
        self.given_up = np.zeros(num_queries, bool)
        self._k = k
        self._ends = np.full((2, num_queries, k), -np.inf, np.float32)  # best ``below``, −``above``
        self._least, self._most = _decided(self._ends)
        self._room = max(16 * k, PAIRS // max(1, num_queries))
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._count = 0
        self._new: list[tuple[np.ndarray, ...]] = []  # that have decided nothing yet
        self._waiting = np.zeros(num_queries, np.int64)  # how many, of each query

    def add(self, score: Tensor, error: Tensor, lengths: Tensor, low: int, first: int) -> None:
        """s [r, width] of the queries first.. and the rows low.. (in ascending order), ε' [C, r],
        ‖x‖ [C, width]. Raises StoreError if a score is not finite.
        """
        count, width = score.shape
        s, some = score.numpy(), slice(first, first + count)
        decided = self._least[some].min() > -np.inf
        if not decided:
            slack = (error.T @ lengths).numpy()
            self._decide(some, np.stack([s - slack, -s - slack]))
        slack = ((error.T @ lengths.amax(1)) * (1 + ROUNDING)).numpy()
        # numpy's comparisons are twice as fast as torch's, its search for the true ones seven times
        far = s < (self._least[some] - slack)[:, None]
        far &= s > (self._most[some] + slack)[:, None]
        place = np.flatnonzero(np.logical_not(far, out=far))  # also what is no number
        picked = s.ravel().take(place)
        if not np.isfinite(picked.sum()):
            refuse_not_finite(score, first, low)
        query = place // width
        row = place - query * width
        own = np.zeros_like(picked)
        for e, x in zip(error.numpy(), lengths.numpy(), strict=True):
            own += e.take(query) * x.take(row)
        below, above = picked - own, picked + own
        self._parts.append(((query + first << ROW_BITS) + (row + low), below, above))
        self._count += len(place)
        if decided:
            counts, waiting = np.bincount(query, minlength=count), self._waiting[some]
            nth = np.arange(len(place)) + (waiting - counts.cumsum() + counts).take(query)
            waiting += counts
            self._new.append((query + first, nth, below, above))
            if self._waiting.sum() >= self.num_queries * self._k // 2:
                self._settle()
        if self._count > 2 * self.num_queries * self._room:
            self._forget()

    def finish(self) -> tuple[Tensor, Tensor]:
        """(queries, rows) [p] int64 of the pairs that stay in doubt, in this order."""
        self._settle()
        self._forget()
        pairs = torch.from_numpy(np.sort(self._parts[0][0]))
        return pairs >> ROW_BITS, pairs & (1 << ROW_BITS) - 1

    def _settle(self) -> None:
        """What the pairs that came since the last time decide."""
        width = int(self._waiting.max())
        lines = np.full((2, self.num_queries, width), -np.inf, np.float32)
        for query, nth, below, above in self._new:
            place = query * width + nth
            lines[0].ravel()[place], lines[1].ravel()[place] = below, -above
        self._decide(slice(None), lines)
        self._waiting[:] = 0
        self._new = []

    def _decide(self, some: slice, lines: np.ndarray) -> None:
        """From ``below`` and −``above`` [2, r, width] of more pairs of some queries."""
        held = np.concatenate([lines, self._ends[:, some]], axis=2)
        held.partition(lines.shape[2])
        self._ends[:, some] = held[:, :, lines.shape[2] :]
        self._least, self._most = _decided(self._ends)

    def _forget(self) -> None:
        """What later rows have decided, and queries of which too much stays in doubt."""
        pairs, below, above = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        query = pairs >> ROW_BITS
        gone = (above < self._least.take(query)) & (below > self._most.take(query))
        stays = np.flatnonzero(~(gone | self.given_up[query]))
        counts = np.bincount(query[stays], minlength=self.num_queries)
        self.given_up |= counts > self._room
        if self.given_up.any():
            stays = stays[~self.given_up[query[stays]]]
        self._parts = [(pairs[stays], below[stays], above[stays])]
        self._count = len(stays)


def _decided(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What ``above`` of the k best is at least, and ``below`` of the k worst at most [m].

    The least ``above`` of which above + ρ|above| reaches the kth below − ρ|below|.
    """
    below = ends[:, :, 0]
    least, most = below - 2.5 * ROUNDING * np.abs(below)
    return least, -most
