"""The k best and worst training examples of every query, exactly, in one pass over the rows."""

from __future__ import annotations

from dataclasses import dataclass

from tda.cluster import run, shares
from tda.progress import Tick
from tda.scorer import shortlist
from tda.scorer.blocks import ends
from tda.scorer.prepared import Prepared
from tda.scorer.ranking import Found, TopK, clipped, merged, ranked


def top_k(prepared: Prepared, k: int) -> TopK:
    """The exact k best and worst training examples of every query in one pass over the rows.

    k is clipped to n. Memory: the answer, a few pairs for each score in it, and two tiles of rows;
    the full matrix is never made. Products are float32, or bfloat16 with what those leave in doubt
    scored again (see ``shortlist``). The workers of an open cluster have ranges of the rows.
    """
    return _top_k(prepared, clipped(k, prepared.train.num_rows), shortened=True)


def plain_top_k(prepared: Prepared, k: int) -> TopK:
    """``top_k`` by products in the precision of the queries alone; k ≤ n."""
    return _top_k(prepared, k, shortened=False)


def _top_k(prepared: Prepared, k: int, shortened: bool) -> TopK:
    spans = shares(prepared.train.num_rows, prepared.train.chunk_rows, each=2)
    parts = run(Ends(prepared, k, shortened), spans)
    best, worst = (merged([part[end] for part in parts], k) for end in (0, 1))
    return ranked(prepared.train, (best[0], -best[1]), worst)


@dataclass(frozen=True)
class Ends:
    """Both ends of the scores among a range of the rows.

    shortened: by a ``shortlist``, where that is the faster way.
    """

    prepared: Prepared
    k: int
    shortened: bool

    def __call__(self, span: tuple[int, int], tick: Tick) -> tuple[Found, Found]:
        num_rows = span[1] - span[0]
        k = min(self.k, num_rows)
        shortened = self.shortened and shortlist.pays(self.prepared, k, num_rows)
        return (shortlist.ends if shortened else ends)(self.prepared, k, span, tick)
