"""The metric of gradients: each scaled by Adam's moments, coordinate by coordinate, then projected.

Scaling does not keep outer products, so gradients are formed, tile by tile, as the projection asks
for them (`tda.gradients.Elementwise`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda.errors import ConfigError
from tda.gradients import Elementwise, Factor, Lookup
from tda.projection import Projection, Shapes
from tda.training.optimizer import Moments

Transform = Callable[[str, list[Factor]], list[Factor]]


@dataclass(frozen=True)
class Scaling:
    """∇f ↦ s ⊙ ∇f, s = (√v̂ + ε)^power with v̂ = v/(1−β₂ᵗ): by parameter, ``[O, I]`` float32."""

    scales: Mapping[str, Tensor]

    def __call__(self, name: str, factors: list[Factor]) -> list[Factor]:
        scale = self.scales[name]
        lookups = [f for f in factors if isinstance(f, Lookup)]
        if len(lookups) == len(factors):  # rows that were not looked up stay zero
            return [Lookup(f.index, f.value.float() * scale[f.index], f.num_rows) for f in lookups]
        return [Elementwise(factors, lambda grad, start, stop: grad * scale[start:stop])]


@dataclass(frozen=True)
class Update:
    """∇f ↦ −Γ, what Adam's next step on the example alone adds to the weights, over its rate.

    Γ = m'/(√v' + ε), m' = (β₁m + (1−β₁)g)/(1−β₁ᵗ⁺¹), v' = (β₂v + (1−β₂)g²)/(1−β₂ᵗ⁺¹) for the loss
    gradient g = ℓ'(f)·∇f (Xia et al. 2024, LESS, definition 3.1). Decoupled weight decay, which no
    example is answerable for, is no part of it.

    slope: ℓ'(f) ``[example]``. moments: by parameter, as matrices ``[O, I]``.
    """

    moments: Mapping[str, Moments]
    slope: Tensor

    def __call__(self, name: str, factors: list[Factor]) -> list[Factor]:
        moments, slope = self.moments[name], self.slope[:, None, None]
        first, second = moments.betas
        grown = moments.step + 1

        def step(grad: Tensor, start: int, stop: int) -> Tensor:
            gradient = slope * grad
            mean = first * moments.mean[start:stop] + (1 - first) * gradient
            square = second * moments.square[start:stop] + (1 - second) * gradient.square()
            if moments.peak is not None:
                square = torch.maximum(moments.peak[start:stop], square)
            deviation = (square / (1 - second**grown)).sqrt() + moments.eps
            return -mean / (1 - first**grown) / deviation

        return [Elementwise(factors, step)]


_POWERS = {"adam": -0.5, "second_moment": -1.0}


def scaling(
    metric: str, moments: Mapping[str, Moments], shapes: Shapes, device: torch.device
) -> Scaling:
    """The scaling of metric "adam" or "second_moment"."""

    def scale(moments: Moments) -> Tensor:
        square = moments.square if moments.peak is None else moments.peak
        corrected = square.double() / (1 - moments.betas[1] ** moments.step)
        return (corrected.sqrt() + moments.eps).pow(_POWERS[metric])

    return Scaling({n: _matrix(scale(moments[n]), shapes[n], device) for n in shapes})


def as_matrices(
    moments: Mapping[str, Moments], shapes: Shapes, device: torch.device
) -> dict[str, Moments]:
    """Moments as `Update` takes them."""

    def matrices(of: Moments, shape: tuple[int, int]) -> Moments:
        peak = None if of.peak is None else _matrix(of.peak, shape, device)
        mean, square = (_matrix(values, shape, device) for values in (of.mean, of.square))
        return replace(of, mean=mean, square=square, peak=peak)

    return {name: matrices(moments[name], shape) for name, shape in shapes.items()}


def _matrix(values: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    return values.reshape(shape).to(device, torch.float32)


def check_projection(metric: str, projection: Projection) -> None:
    """Raises ConfigError for a projection fitted to gradients other than those it would get."""
    eigen = projection.needs_pilot and projection.basis == "eigen"
    if projection.kind != "eigenbasis" and not (metric == "adam_update" and eigen):
        return
    raise ConfigError(
        f"metric {metric!r} does not go with projection {projection.kind!r}",
        found="a basis fitted to gradients as they are",
        wanted="count_sketch, rademacher, identity, or a kind with basis='random'",
        do="choose another projection, or metric='euclidean'",
    )
