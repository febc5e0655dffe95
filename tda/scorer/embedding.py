"""What a recipe does to the queries, so that only inner products with stored rows remain.

    score[q, i] = Σ_c ⟨E_c[q], ∇f_{i,c}⟩ · r[c, i],      E_c[q] = scale · w_c · α ∘ F_c q / ‖q‖

q is the gradient at checkpoint c, or at the last one where training is unrolled from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tda.cache import Arrays
from tda.curvature import row_ranges
from tda.preconditioner import squared
from tda.recipe import Recipe
from tda.recipe.requirements import checkpoint_weights, layer_alphas, layer_slices
from tda.scorer.operators import Group, Operators
from tda.scorer.row_weights import column, gradient_weights

if TYPE_CHECKING:
    from tda.store import Store, Table

WIDE = 100  # where F spreads more, float32 would lose the small part of F q: it stays in float64


@dataclass(frozen=True)
class Embedding:
    """A recipe bound to a run and to a query set, which without one is the training set.

    Raises RecipeError if the run lacks what the recipe needs, StoreError if it is unfinished.
    """

    recipe: Recipe
    operators: Operators

    @staticmethod
    def of(store: Store, recipe: Recipe, queries: Table | None = None) -> Embedding:
        return Embedding(recipe, Operators.of(store, recipe, queries))

    @property
    def train(self) -> Table:
        return self.operators.train

    @property
    def groups(self) -> list[Group]:
        return self.operators.groups

    @property
    def scale(self) -> float:
        return 1 / self.train.num_rows if self.recipe.scale == "inverse_n" else 1.0

    @cached_property
    def shares(self) -> Tensor:
        """w_c [C, 1] float64."""
        weights = checkpoint_weights(self.operators.manifest, self.recipe)
        if self.operators.unrolled:
            weights = [1 / len(group) for group in self.groups for _ in group]
        return torch.tensor(weights, dtype=torch.float64)[:, None]

    @cached_property
    def alpha(self) -> Tensor | None:
        """α [k] float64; None where every layer counts once."""
        weights = layer_alphas(self.operators.manifest, self.recipe)
        if not weights:
            return None
        alpha = torch.ones(self.train.dim, dtype=torch.float64)
        for name, columns in layer_slices(self.operators.manifest, self.recipe).items():
            alpha[columns] = weights.get(name, 1.0)
        return alpha

    # ---- which multiple of ∇f stands for an example

    @property
    def has_margin(self) -> bool:
        return bool(self.operators.manifest["measurement"]["has_margin"])

    def query_checkpoint(self, checkpoint: int) -> int:
        """Where q is taken."""
        return self.train.num_checkpoints - 1 if self.operators.unrolled else checkpoint

    def query_weights(self) -> Tensor:
        """w_q,c [C, m] float64: of the gradient that stands for a query at checkpoint c."""
        weights = gradient_weights(self.operators.queries, self.recipe.query, self.has_margin)
        return weights[[self.query_checkpoint(c) for c in range(len(weights))]]

    def train_weights(self) -> Tensor:
        """w_i,c [C, n] float64."""
        if self.operators.manifest.get("metric") == "adam_update":
            return torch.ones_like(column(self.train, "slope"))  # rows are steps that lower ℓ
        return gradient_weights(self.train, self.recipe.train, self.has_margin)

    def row_weights(self) -> Tensor:
        """r [C, n] float64: everything that touches the training side."""
        weights = self.train_weights()
        if self.recipe.combine == "product_of_means":
            return (self.shares * weights).sum(0, keepdim=True).expand_as(weights)
        if self.recipe.normalize in ("train", "both"):
            norms = [self.lengths(c, self.recipe.norm) for c in range(len(weights))]
            return weights * reciprocal(torch.stack(norms) * weights.abs())
        return weights

    # ---- F

    def fold(self, group: Group, weights: Tensor) -> Tensor:
        """E_c of every query, for each checkpoint c of ``group``: [m, k], computed in float64.

        weights: w_q [m]. In float32, or float64 where F spreads wide.
        """
        chain, recipe = self.operators.chain(group), self.recipe
        queries, checkpoint = self.operators.queries, self.query_checkpoint(group[0])
        factor = self.scale * float(self.shares[group[0]])
        wide = max(block.spread for block in chain[-1].blocks) > WIDE
        dtype = torch.float64 if wide else torch.float32
        folded = torch.empty(queries.num_rows, queries.dim, dtype=dtype)
        for start, stop in row_ranges(queries):
            q = queries.rows(checkpoint, start, stop).double() * weights[start:stop, None]
            out = q
            for operator in chain:
                out = operator.apply(out)
            heavy = out if self.alpha is None else self.alpha * out
            if recipe.normalize in ("query", "both"):
                squares = heavy * (q if recipe.norm == "metric" else out)
                heavy = heavy * reciprocal(squares.sum(1).clamp(min=0).sqrt())[:, None]
            folded[start:stop] = factor * heavy
        return folded

    def lengths(self, checkpoint: int, norm: str) -> Tensor:
        """√(gᵀFg) ("metric") or ‖Fg‖ ("step") of g = ∇f_i,c for every training row [n] float64.

        With α, √(Σ_layer α·gᵀFg) and √(Σ_layer α·‖Fg‖²): F does not mix layers then.
        """
        r = self.recipe
        method = (r.curvature, r.curvature_rows, r.blocks, r.query_share, r.function, r.damping)

        def compute() -> Arrays:
            operator = self.operators.at((checkpoint,))
            if norm == "step":
                operator = operator.with_functions(lambda block: squared(block.function))
            parts = []
            for span in row_ranges(self.train):
                rows = self.train.rows(checkpoint, *span)
                if self.alpha is not None:
                    rows = rows * self.alpha.sqrt().float()
                largest = rows.abs().amax(1)  # squares of small gradients leave float32
                squares = operator.quadratic(rows * reciprocal(largest)[:, None])
                parts.append(squares.sqrt() * largest)
            return {"lengths": torch.cat(parts).numpy()}

        weights = tuple(layer_alphas(self.operators.manifest, r).items())
        choices = (checkpoint, *method, r.rank, r.shrinkage, r.core, weights, norm)
        return torch.from_numpy(self.operators.cache.get("lengths", choices, compute)["lengths"])

    def own_products(self) -> Tensor:
        """⟨α ∘ F g, g'⟩ [C, n] float64, g' = ∇f_i,c of a training row and g the same as a query."""
        mixes = self.recipe.curvature == "gram" and self.recipe.blocks == "whole"
        count = self.train.num_checkpoints
        if not self.operators.unrolled and (self.alpha is None or not mixes):
            return torch.stack([self.lengths(c, "metric").square() for c in range(count)])
        products = torch.empty(count, self.train.num_rows, dtype=torch.float64)
        for group in self.groups:
            chain, source = self.operators.chain(group), self.query_checkpoint(group[0])
            for start, stop in row_ranges(self.train):
                out = self.train.rows(source, start, stop).double()
                for operator in chain:
                    out = operator.apply(out)
                out = out if self.alpha is None else self.alpha * out
                for c in group:
                    rows = self.train.rows(c, start, stop).double()
                    products[c, start:stop] = (out * rows).sum(1)
        return products


def reciprocal(norms: Tensor) -> Tensor:
    """1/norm, 0 for a zero gradient: it has no direction, and no influence."""
    return torch.where(norms > 0, 1 / norms, 0)
