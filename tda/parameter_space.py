"""F(H) in parameter space: what `tda.attribute` puts between its queries and the training set."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tda.conjugate_gradient import solve
from tda.gauss_newton import GaussNewton
from tda.gradients import Factor
from tda.kfac import EkFac
from tda.preconditioner import (
    SpectralFunction,
    Spectrum,
    above,
    inverse,
    nowhere,
    relative,
    require_curvature,
    require_invertible,
)
from tda.projection.eigenbasis import device_of, example_tiles, rotated
from tda.projection.tiles import square_norm
from tda.recipe import Recipe

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
        curvature: EkFac, recipe: Recipe, num_train: int, implied: float | None, where: str
    ) -> Factored:
        """(Λ + λ)⁻¹, λ one number or, with blocks="layer", one a parameter.

        implied: λ itself, where the training schedule tells it. Raises RecipeError.
        """

        def function(eigenvalues: Tensor) -> SpectralFunction:
            spectrum = Spectrum(eigenvalues, None, len(eigenvalues), num_train)
            damping = implied
            if damping is None:
                damping = relative(spectrum.trace, spectrum.dim, num_train, recipe.damping)
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
        block, device = self.curvature.blocks[name], device_of(factors[0])
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
    """(G + λI)⁻¹ of the whole Gauss–Newton matrix, by conjugate gradients; ``near`` ≈ it."""

    matrix: GaussNewton
    damping: float
    near: Factored

    @staticmethod
    def of(
        matrix: GaussNewton, ekfac: EkFac, recipe: Recipe, implied: float | None, where: str
    ) -> Solved:
        """Preconditioned by EK-FAC with the same λ. Raises RecipeError."""
        trace = ekfac.trace if ekfac.gauss_newton else matrix.mean_diagonal() * ekfac.dim
        require_curvature(trace, where)
        damping = implied
        if damping is None:
            damping = relative(trace, ekfac.dim, matrix.num_examples, recipe.damping)
        near = Factored.of(ekfac, recipe, matrix.num_examples, damping, where)
        return Solved(matrix, damping, near)

    def apply(self, x: Vectors) -> Vectors:
        shapes = {name: p.shape for name, p in self.matrix.parameters.items()}

        def near(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
            matrices = {
                name: value.reshape(x[name][: len(value)].shape) for name, value in v.items()
            }
            return {n: y.reshape(-1, *shapes[n]) for n, y in self.near.apply(matrices).items()}

        right = {name: value.reshape(-1, *shapes[name]) for name, value in x.items()}
        found = solve(self.matrix.product, right, damping=self.damping, precondition=near)
        if not found.converged.all():
            log.warning(
                "conjugate gradients stopped short for %d of %d queries: residual up to %.1g",
                int((~found.converged).sum()), len(found.converged), float(found.residuals.max()),
            )  # fmt: skip
        return {name: value.reshape(x[name].shape) for name, value in found.x.items()}

    def squares(self, name: str, factors: list[Factor], step: bool) -> Tensor:
        raise AssertionError("tda.attribute refuses to solve for every training example")
