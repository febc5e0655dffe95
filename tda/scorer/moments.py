"""Mean and variance of every training example's score over the queries, without the scores.

Scores are linear in the queries. Their mean over a set of queries is the score of the mean query,
and with x̃ the rows of all checkpoints side by side, Q̃ the queries' [m, C·k] and Q̄ their mean,

    Σ_q (s_q − s̄)² = ‖(Q̃ − Q̄) x̃‖² = ‖R x̃‖²        Q̃ − Q̄ = U R, UᵀU = I

so it costs min(m, C·k) products a training example, and nothing of size [query, train] is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tda.scorer.blocks import stream
from tda.scorer.prepared import Prepared

_HELD = 2**23  # numbers of rows held at a time


@dataclass(frozen=True, eq=False)
class Moments:
    """mean, variance ``[train]`` float64: over the queries; the variance with m − 1 in the
    denominator, NaN for one query. averages ``[average, train]`` float64: see `moments`.
    """

    mean: np.ndarray
    variance: np.ndarray
    averages: np.ndarray


def moments(prepared: Prepared, averages: np.ndarray | None = None) -> Moments:
    """In one pass over the training rows. averages ``[average, query]``: weights of more means."""
    count, n = prepared.num_queries, prepared.train.num_rows
    given = np.zeros((0, count)) if averages is None else averages
    weights = torch.from_numpy(np.concatenate([np.full((1, count), 1 / count), given]))
    queries = torch.cat([q.double() for q in prepared.queries], dim=1)  # of all checkpoints
    means = weights @ queries
    centred = queries - means[0]
    if count > centred.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R
    centred = centred.float()
    found, squares = np.empty((len(weights), n)), np.empty(n)
    size = max(1, _HELD // max(queries.shape[1], len(centred)))
    for low, high, rows in stream(prepared.train, 0, n):
        for first in range(low, high, size):
            some = slice(first, min(first + size, high))
            here = slice(some.start - low, some.stop - low)
            weights_here = zip(rows, prepared.row_weights, strict=True)
            x = torch.cat([row[here] * r[some, None] for row, r in weights_here], dim=1)
            found[:, some] = (means @ x.double().T).numpy()
            squares[some] = (centred @ x.T).square().sum(0).numpy()
    variance = squares / (count - 1) if count > 1 else np.full(n, np.nan)
    return Moments(found[0], variance, found[1:])


def scores_at(prepared: Prepared, rows: np.ndarray) -> np.ndarray:
    """Scores ``[query, row]`` float32 for some of the training examples, given by index."""
    parts = []
    for some in np.array_split(rows, max(1, len(rows) * prepared.train.dim // _HELD)):
        total = torch.zeros(prepared.num_queries, len(some))
        for c, (q, r) in enumerate(zip(prepared.queries, prepared.row_weights, strict=True)):
            total += (q @ prepared.train.gather(c, some).to(q.dtype).T * r[some]).float()
        parts.append(total.numpy())
    return np.concatenate(parts, axis=1)
