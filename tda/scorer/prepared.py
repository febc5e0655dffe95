"""The queries with the whole method folded in, and one number for every training row.

score[q, i] = Σ_c ⟨Q_c[q], ∇f_{i,c}⟩ · r[c, i]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tda.errors import RecipeError
from tda.recipe import Recipe
from tda.scorer.embedding import Embedding, reciprocal
from tda.scorer.operators import Operators

if TYPE_CHECKING:
    from tda.store import Store, Table


@dataclass(frozen=True)
class Prepared:
    """A query set under a recipe.

    queries: C arrays [m, k], float32, or float64 where float32 would lose their small parts.
    row_weights: [C, n] float32. damping: λ of every checkpoint; empty without a curvature.
    """

    recipe: Recipe
    train: Table
    queries: tuple[Tensor, ...]
    row_weights: Tensor
    damping: tuple[float, ...] = ()

    @property
    def num_queries(self) -> int:
        return len(self.queries[0])

    def select(self, which: slice | np.ndarray) -> Prepared:
        """The same for some of the queries."""
        return replace(self, queries=tuple(q[which] for q in self.queries))


def prepare(store: Store, recipe: Recipe, queries: Table) -> Prepared:
    """Preconditions, normalises and weights a stored query set; reads the training rows only to
    find a curvature or the training norms, once per store (then ``cache/`` has them).

    Raises StoreError if a table is unfinished, RecipeError if the run lacks what the recipe needs.
    """
    embedding = Embedding.of(store, recipe, queries)
    weights = embedding.query_weights()
    folded, damping = [], []
    for group in embedding.groups:
        folded += [embedding.fold(group, weights[group[0]])] * len(group)
        damping += [embedding.operators.at(group).damping] * len(group)
    known = tuple(damping) if recipe.curvature != "identity" else ()
    rows = embedding.row_weights().float()
    return Prepared(recipe, embedding.train, tuple(folded), rows, known)


def damping_used(store: Store, recipe: Recipe, queries: Table | None = None) -> list[float]:
    """λ of every checkpoint, in units of the curvature's eigenvalues; empty without a curvature.

    Where blocks have their own, its mean over dimensions. ``queries`` matter to recipes whose
    curvature is partly theirs. Raises as `prepare` does.
    """
    if recipe.curvature == "identity":
        return []
    operators = Operators.of(store, recipe, queries)
    return [operators.at(group).damping for group in operators.groups for _ in group]


def self_influence(store: Store, recipe: Recipe) -> np.ndarray:
    """Score of every training example for itself, as if it were also the query [n] float32.

    The diagonal of ``scores`` with the training set as query set, without making the rest:
    scale · Σ_c w_c · w_q w_t ⟨F ∇f, ∇f⟩ / norms, or, for product_of_means, scale ·
    (Σ_c w_c · w_q ⟨F ∇f, ∇f⟩) · (Σ_c w_c · w_t). With both sides of unit F-norm an example scores
    ±1, or 0 if its gradient vanishes.
    """
    embedding = Embedding.of(store, recipe)
    if store.manifest.get("metric") == "adam_update":
        raise RecipeError(
            "self-influence needs each training example as a query, but this run holds its update",
            where=f"recipe {recipe.name!r}",
            do="use a run of another metric",
        )
    query, train = embedding.query_weights(), embedding.train_weights()
    own = embedding.own_products()
    if recipe.normalize != "none":
        norms = [embedding.lengths(c, recipe.norm) for c in range(len(train))]
        shorter = reciprocal(torch.stack(norms))
        if recipe.normalize in ("query", "both"):
            query = query.sign() * shorter
        if recipe.normalize in ("train", "both"):
            train = train.sign() * shorter
    if recipe.combine == "product_of_means":
        total = (embedding.shares * query * own).sum(0) * (embedding.shares * train).sum(0)
    else:
        total = (embedding.shares * query * own * train).sum(0)
    return (embedding.scale * total).numpy().astype(np.float32)
