"""Approximate search: FAISS proposes candidates, the store's own rows decide.

Under any recipe a score is one inner product of concatenated vectors,
    score[q, i] = ⟨ [Q_c[q]]_c , [r[c, i]·∇f_{i,c}]_c ⟩,
so a FAISS index over the right-hand vectors serves every query set whose recipe has these row
weights. Its candidates, of both signs, are scored again exactly, and how many of the true answer it
finds is measured on a sample of the queries and comes with every result.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import faiss
import numpy as np
import torch

from tda.cache import Cache
from tda.errors import StoreError
from tda.scorer.blocks import stream
from tda.scorer.pairs import greatest, pair_scores
from tda.scorer.prepared import Prepared
from tda.scorer.ranking import TopK, clipped, limit_faiss_threads, ranked
from tda.scorer.top import top_k

if TYPE_CHECKING:
    from tda.store import Store

Kind = Literal["flat", "ivf", "ivfpq"]

FLAT_BYTES = 2 * 2**30  # up to here all vectors stay in memory, uncompressed
MIN_RECALL = 0.95  # lists are probed until a sample of queries reaches it
SAMPLE = 64  # queries the recall is measured on
WIDTH = {"flat": 1.25, "ivf": 1.25, "ivfpq": 10}  # candidates per answer: compressed ones mislead
POINTS_PER_LIST = 39  # FAISS's own minimum for k-means
PIECES = 256  # of a vector, each coded by the nearest of 16 centroids: 128 bytes a row
CENTROIDS = 16


@dataclass(frozen=True)
class RowIndex:
    """A searchable copy of the weighted training rows of a run; keep it to ask again."""

    kind: Kind
    faiss_index: Any
    cache: Cache
    weights: str

    @staticmethod
    def of(store: Store, prepared: Prepared, kind: Kind | None = None) -> RowIndex:
        """Built for the recipe of a prepared query set, or read from ``cache/``.

        kind None: "flat" while the vectors fit in 2 GiB, else "ivfpq"; "flat" also where there are
        too few rows to train another. Only trained indexes are kept on disk.
        """
        n, dim = prepared.train.num_rows, len(prepared.queries) * prepared.train.dim
        if kind is None:
            kind = "flat" if 4 * n * dim <= FLAT_BYTES else "ivfpq"
        if n < POINTS_PER_LIST * (CENTROIDS if kind == "ivfpq" else 1):
            kind = "flat"
        cache = Cache.of(store)
        weights = hashlib.sha256(prepared.row_weights.numpy().tobytes()).hexdigest()
        limit_faiss_threads()
        if kind == "flat":
            return RowIndex(kind, _filled(faiss.IndexFlatIP(dim), prepared), cache, weights)

        def compute() -> dict[str, np.ndarray]:
            return {
                "index": faiss.serialize_index(_filled(_trained(kind, dim, prepared), prepared))
            }

        # FAISS does not guard against bytes that a stranger made, so these are not kept in the run.
        stored = cache.mine().get("faiss", (kind, weights), compute)
        return RowIndex(kind, faiss.deserialize_index(stored["index"]), cache, weights)

    def top_k(self, prepared: Prepared, k: int) -> TopK:
        """The k best and worst of every query, exact scores, with the measured recall@k.

        The recall is measured once per recipe, k and size of sample (up to 64 queries), on the
        first query set that asks; the lists to probe are then fixed.
        """
        k = clipped(k, prepared.train.num_rows)

        def compute() -> dict[str, np.ndarray]:
            return {"probes_recall": np.array(self._calibrate(prepared, k))}

        sampled = min(SAMPLE, prepared.num_queries)
        choices = (self.kind, self.weights, prepared.recipe.explain(), k, sampled)
        found = self.cache.get("recall", choices, compute)
        probes, recall = found["probes_recall"].tolist()
        return self._search(prepared, k, int(probes), recall)

    @property
    def num_lists(self) -> int:
        return 1 if self.kind == "flat" else self.faiss_index.nlist

    def _calibrate(self, prepared: Prepared, k: int) -> tuple[int, float]:
        """(lists to probe, recall): the fewest, doubling, that reach ``MIN_RECALL`` on a sample."""
        count = min(SAMPLE, prepared.num_queries)
        sample = prepared.select(np.linspace(0, prepared.num_queries - 1, count).astype(np.int64))
        exact, probes = top_k(sample, k), 1
        while True:
            recall = _recall(self._search(sample, k, probes), exact)
            if recall >= MIN_RECALL or probes == self.num_lists:
                return probes, recall
            probes = min(2 * probes, self.num_lists)

    def _search(self, prepared: Prepared, k: int, probes: int, recall: float | None = None) -> TopK:
        queries = torch.cat(prepared.queries, dim=1).numpy()
        width = min(prepared.train.num_rows, int(np.ceil(WIDTH[self.kind] * k)))
        best, worst = (
            _reranked(prepared, self._candidates(sign * queries, width, probes), k, sign)
            for sign in (1, -1)
        )
        return ranked(prepared.train, best, worst, recall)

    def _candidates(self, queries: np.ndarray, width: int, probes: int) -> np.ndarray:
        """Row numbers [m, width]; FAISS pads with −1 where the lists probed hold too few rows."""
        limit_faiss_threads()
        faiss.cvar.distance_compute_blas_threshold = 1  # its plain loops are 13× slower
        if self.kind == "flat":
            return self.faiss_index.search(queries, width)[1]
        while True:
            parameters = faiss.SearchParametersIVF()
            parameters.nprobe = probes
            found = self.faiss_index.search(queries, width, params=parameters)[1]
            if (found >= 0).all():
                return found
            if probes == self.num_lists:
                raise StoreError(
                    "the FAISS index holds fewer rows than the store",
                    where=self.cache.folder,
                    do="delete the folder; it is built again",
                )
            probes = min(2 * probes, self.num_lists)


def approximate_top_k(store: Store, prepared: Prepared, k: int, kind: Kind | None = None) -> TopK:
    """``RowIndex.of(...).top_k(...)``: for one question; keep the index to ask more."""
    return RowIndex.of(store, prepared, kind).top_k(prepared, k)


def _trained(kind: Kind, dim: int, prepared: Prepared) -> Any:
    """An empty inverted-file index; lists and codes are learnt on a seeded sample of rows."""
    n = prepared.train.num_rows
    lists = max(1, min(int(n**0.5), n // POINTS_PER_LIST))
    pieces = max(m for m in range(1, PIECES + 1) if dim % m == 0)
    codes = "Flat" if kind == "ivf" else f"PQ{pieces}x4fs"
    index = faiss.index_factory(dim, f"IVF{lists},{codes}", faiss.METRIC_INNER_PRODUCT)
    wanted = POINTS_PER_LIST * max(lists, CENTROIDS)
    sample = np.sort(np.random.default_rng(0).choice(n, min(n, wanted), replace=False))
    index.train(_gathered(prepared, sample))
    return index


def _filled(index: Any, prepared: Prepared) -> Any:
    for low, high, rows in stream(prepared.train, 0, prepared.train.num_rows):
        weights = prepared.row_weights[:, low:high, None]
        weighted = torch.cat([x * w for x, w in zip(rows, weights, strict=True)], dim=1)
        if not torch.isfinite(weighted).all():
            row = low + int((~torch.isfinite(weighted)).any(1).nonzero()[0])
            raise StoreError(
                "a training row is not finite",
                where=f"training example {row}",
                do="run `tda verify`; if the store is sound, index this example again",
            )
        index.add(weighted.numpy())
    return index


def _gathered(prepared: Prepared, indices: np.ndarray) -> np.ndarray:
    """The weighted, concatenated rows of some training examples [len, C·k] float32."""
    weights = prepared.row_weights[:, indices, None]
    rows = (prepared.train.gather(c, indices) * w for c, w in enumerate(weights))
    return torch.cat(list(rows), dim=1).numpy()


def _reranked(
    prepared: Prepared, candidates: np.ndarray, k: int, sign: int
) -> tuple[np.ndarray, np.ndarray]:
    """(indices, exact scores) [m, k] of the best candidates, or the worst for sign −1."""
    m, width = candidates.shape
    rows = torch.from_numpy(np.sort(candidates, axis=1).reshape(-1))
    queries = torch.arange(m).repeat_interleave(width)
    scores = sign * pair_scores(prepared, queries, rows)
    indices, best = greatest(scores, queries, rows, m, k)
    return indices.numpy(), sign * best.numpy()


def _recall(found: TopK, exact: TopK) -> float:
    """Mean share of the exact answer that was found, over queries and both signs."""
    pairs = [
        (found.proponents.indices, exact.proponents.indices),
        (found.opponents.indices, exact.opponents.indices),
    ]
    shares = [np.isin(e, f).mean() for a, b in pairs for f, e in zip(a, b, strict=True)]
    return float(np.mean(shares))
