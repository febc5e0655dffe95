"""Weights of layers, learned without labels: those under which a query's best examples stand out.

    α = argmax_{α ≥ 0, mean 1} mean_q z_q(α) − ρ · mean_l (α_l − 1)²
    z_q(α) = (mean_{i ∈ S_q} s_qi − mean_i s_qi) / std_i s_qi,    s_qi = Σ_l α_l s_qil

s_qil is what layer l adds to the score, S_q the share of the training set that scores highest at
α = 1: a guess at what is truly related to q, for which no retraining is needed. Layers that add
noise to all scores alike lose weight. After Li et al. 2025 (arXiv:2506.05647). As

    z_q(α) = αᵀd_q / √(αᵀV_q α),    d_q [L]: mean over S_q − mean,  V_q [L, L]: covariance of s_qil

one pass over the rows is enough, however long the search for α.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tda.errors import RecipeError
from tda.recipe import Recipe
from tda.recipe.requirements import layer_slices
from tda.scorer.blocks import query_tiles, stream
from tda.scorer.prepared import Prepared, prepare
from tda.scorer.top import top_k

if TYPE_CHECKING:
    from tda.store import Store, Table

SHARE = 0.02  # |S_q| / n
PULL = 0.03  # ρ; this and SHARE were chosen on the digits and the film reviews of the leaderboard
STEPS = 100
SUFFIX = "+layers"  # of the name


def learn_layer_weights(store: Store, recipe: Recipe, queries: Table) -> Recipe:
    """``recipe``, named NAME+layers, with the ``layer_weights`` that suit these queries, of mean 1.

    Reads the training rows twice. Raises RecipeError where the store's rows mix layers or the
    recipe takes norms over them, and what `tda.scorer.prepare` raises.
    """
    if recipe.normalize != "none":
        raise RecipeError(
            "layer weights are learned where a score is a sum over layers",
            where=f"recipe {recipe.name!r}",
            found=f"normalize={recipe.normalize!r}",
            do="use dataclasses.replace(recipe, normalize='none')",
        )
    layers = layer_slices(store.manifest, recipe)
    plain = prepare(store, replace(recipe, layer_weights=(), parameters="all"), queries)
    depth = max(1, round(SHARE * plain.train.num_rows))
    best = top_k(plain, depth).proponents.indices
    weights = _sharpest(_spread(plain, list(layers.values()), best))
    learned = tuple(zip(layers, weights.tolist(), strict=True))
    name = recipe.name.removesuffix(SUFFIX) + SUFFIX
    return replace(recipe, name=name, layer_weights=learned, parameters="all")


@dataclass(frozen=True)
class Spread:
    """d [m, L] and V [m, L, L] of the queries' scores by layer, float64."""

    gap: Tensor
    covariance: Tensor

    def sharpness(self, alpha: Tensor) -> Tensor:
        """z [m]; 0 for a query that scores all examples alike."""
        variance = torch.einsum("l,qlk,k->q", alpha, self.covariance, alpha)
        varies = variance > 0
        z = self.gap @ alpha / torch.where(varies, variance, 1.0).sqrt()
        return torch.where(varies, z, 0.0)


def _spread(prepared: Prepared, layers: Sequence[slice], best: np.ndarray) -> Spread:
    """best: S_q [m, s] as rows of the training set."""
    count, n = prepared.num_queries, prepared.train.num_rows
    pairs = _by_row(best)
    total, of_best = (torch.zeros(count, len(layers), dtype=torch.float64) for _ in range(2))
    squares = torch.zeros(count, len(layers), len(layers), dtype=torch.float64)
    for low, high, rows in stream(prepared.train, 0, n):
        for first, some in query_tiles(prepared, (high - low) * len(layers)):
            last = first + some.num_queries
            scores = _by_layer(some, layers, rows, low)
            is_best = _is_best(pairs, range(first, last), range(low, high))
            total[first:last] += scores.sum(2)
            of_best[first:last] += torch.einsum("qlr,qr->ql", scores, is_best)
            squares[first:last] += scores @ scores.transpose(1, 2)
    mean = total / n
    covariance = squares / n - mean[:, :, None] * mean[:, None, :]
    scale = covariance.diagonal(dim1=1, dim2=2).sum().clamp(min=torch.finfo(mean.dtype).tiny)
    size = (scale / count).sqrt()  # z has no unit: numbers near one, whatever that of the scores
    return Spread((of_best / best.shape[1] - mean) / size, covariance / size**2)


def _by_row(best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, q) with i ∈ S_q, the first row i first."""
    order = best.argsort(axis=None)
    return best.reshape(-1)[order], order // best.shape[1]


def _is_best(pairs: tuple[np.ndarray, np.ndarray], queries: range, rows: range) -> Tensor:
    """1 where i ∈ S_q, else 0, of a tile [m, r] float64; pairs: of `_by_row`."""
    start, stop = np.searchsorted(pairs[0], (rows.start, rows.stop))
    i, q = (part[start:stop] for part in pairs)
    here = (q >= queries.start) & (q < queries.stop)
    found = torch.zeros(len(queries), len(rows), dtype=torch.float64)
    found.numpy()[q[here] - queries.start, i[here] - rows.start] = 1
    return found


def _by_layer(prepared: Prepared, layers: Sequence[slice], rows: list[Tensor], low: int) -> Tensor:
    """s_qil of a tile of rows [m, L, r] float64."""
    total = torch.zeros(prepared.num_queries, len(layers), len(rows[0]), dtype=torch.float64)
    for q, x, weight in zip(prepared.queries, rows, prepared.row_weights, strict=True):
        for number, layer in enumerate(layers):
            product = q[:, layer] @ x[:, layer].T.to(q.dtype)
            total[:, number] += product * weight[low : low + len(x)]
    return total


def _sharpest(spread: Spread) -> Tensor:
    """α [L]."""
    logits = torch.zeros(spread.gap.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logits], max_iter=STEPS, line_search_fn="strong_wolfe")

    def alpha() -> Tensor:
        return torch.softmax(logits, 0) * len(logits)

    def loss() -> Tensor:
        search.zero_grad()
        a = alpha()
        value = PULL * (a - 1).square().mean() - spread.sharpness(a).mean()
        value.backward()
        return value

    search.step(loss)
    return alpha().detach()
