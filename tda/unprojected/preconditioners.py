"""F(H) in parameter space: what `tda.attribute` puts between its queries and the training set."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tda.curvature.gauss_newton import GaussNewton
from tda.curvature.kfac import EkFac
from tda.gradients import Factor
from tda.preconditioner import (
    SpectralFunction,
    Spectrum,
    above,
    inverse,
    nowhere,
    require_curvature,
    require_invertible,
)
from tda.projection.eigenbasis import example_tiles, rotated
from tda.projection.tiles import square_norm
from tda.recipe import Recipe
from tda.unprojected.conjugate_gradient import solve

log = logging.getLogger(__name__)

Vectors = dict[str, Tensor]  # parameter -> [m, O, I]: m vectors in parameter space


class Preconditioner(Protocol):
    """F, known by its products."""

    def apply(self, x: Vectors) -> Vectors:
        """F x."""
        ...

    def squares(self, name: str, factors: list[Factor], step: bool) -> Tensor:
        """One parameter's part of gᵀFg ``[example]``, or of ‖Fg‖² for a step; float64."""
        ...


@dataclass(frozen=True)
class Unchanged:
    """F = I."""

    def apply(self, x: Vectors) -> Vectors:
        return x

    def squares(self, name: str, factors: list[Factor], step: bool) -> Tensor:
        return square_norm(factors).double()


@dataclass(frozen=True)
class Factored:
    """F of EK-FAC: F(Λ) [O, I] float64 in each parameter's eigenbasis."""

    curvature: EkFac
    values: Mapping[str, Tensor]

    @staticmethod
    def of(
        curvature: EkFac, recipe: Recipe, num_train: int, where: str, given: float | None = None
    ) -> Factored:
        """(Λ + λ)⁻¹, λ one number or, with blocks="layer", one a parameter.

        given: λ, where it is not the recipe's. Raises RecipeError.
        """

        def function(eigenvalues: Tensor) -> SpectralFunction:
            spectrum = Spectrum(eigenvalues, None, len(eigenvalues), num_train)
            damping = given
            if damping is None:
                damping = recipe.absolute_damping(spectrum.trace, spectrum.dim, num_train)
            if recipe.rank is not None:
                return above(spectrum.cut(recipe.rank), inverse(damping))
            require_invertible(spectrum, damping, where)
            return inverse(damping)

        require_curvature(curvature.trace, where)
        every = {name: block.eigenvalues for name, block in curvature.blocks.items()}
        if recipe.blocks == "whole":
            one = function(torch.cat([own.flatten() for own in every.values()]))
            return Factored(curvature, {name: one(own) for name, own in every.items()})
        # Where nothing has a gradient there is no curvature, and nothing to be divided by it.
        each = {n: function(own.flatten()) if own.any() else nowhere for n, own in every.items()}
        return Factored(curvature, {name: each[name](own) for name, own in every.items()})

    def apply(self, x: Vectors) -> Vectors:
        blocks = self.curvature.blocks
        return {name: blocks[name].apply(self.values[name], x[name]) for name in x}

    def squares(self, name: str, factors: list[Factor], step: bool) -> Tensor:
        block, device = self.curvature.blocks[name], factors[0].device
        left, right = (None if s is None else s.to(device) for s in (block.left, block.right))
        values = self.values[name].to(device)
        values = values.square() if step else values
        parts = [
            (rotated(some, left, right).double().square() * values).sum((1, 2))
            for _, some in example_tiles(factors, values.numel())
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class Solved:
    """((1−s)·G + s·D + λI)⁻¹ by conjugate gradients: G the whole Gauss–Newton matrix, D that of
    EK-FAC, s the shrinkage; ``near`` ≈ it."""

    matrix: GaussNewton
    damping: float
    near: Factored
    shrinkage: float

    @staticmethod
    def of(
        matrix: GaussNewton, ekfac: EkFac, recipe: Recipe, implied: float | None, where: str
    ) -> Solved:
        """Preconditioned by EK-FAC with the same λ; implied: that of the schedule.

        Raises RecipeError.
        """
        trace = ekfac.trace if ekfac.gauss_newton else matrix.mean_diagonal() * ekfac.dim
        require_curvature(trace, where)
        damping = recipe.absolute_damping(trace, ekfac.dim, matrix.num_examples, implied)
        near = Factored.of(ekfac, recipe, matrix.num_examples, where, damping)
        return Solved(matrix, damping, near, recipe.shrinkage)

    def apply(self, x: Vectors) -> Vectors:
        shapes = {name: p.shape for name, p in self.matrix.parameters.items()}

        def factored(by: Factored, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
            matrices = {
                name: value.reshape(x[name][: len(value)].shape) for name, value in v.items()
            }
            return {n: y.reshape(-1, *shapes[n]) for n, y in by.apply(matrices).items()}

        blocks = self.near.curvature.blocks
        target = Factored(self.near.curvature, {n: b.eigenvalues for n, b in blocks.items()})
        share = self.shrinkage

        def product(v: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            whole = self.matrix.product(v)
            if not share:
                return whole
            diagonal = factored(target, v)
            return {name: (1 - share) * whole[name] + share * diagonal[name] for name in v}

        right = {name: value.reshape(-1, *shapes[name]) for name, value in x.items()}
        near = partial(factored, self.near)
        found = solve(product, right, damping=self.damping, precondition=near)
        if not found.converged.all():
            log.warning(
                "conjugate gradients stopped short for %d of %d queries: residual up to %.1g",
                int((~found.converged).sum()), len(found.converged), float(found.residuals.max()),
            )  # fmt: skip
        return {name: value.reshape(x[name].shape) for name, value in found.x.items()}

    def squares(self, name: str, factors: list[Factor], step: bool) -> Tensor:
        raise AssertionError("tda.attribute refuses to solve for every training example")
