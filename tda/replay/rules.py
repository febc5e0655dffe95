"""One step of an optimiser, and its adjoint: SGD with momentum, Adam and AdamW as torch has them.

A step takes the state s = (θ, moments) and the gradient g of the batch to s'. For a function M of
the last state write s̄ = ∂M/∂s. Going back, a rule turns s̄' into the two parts of the chain rule:

    ḡ = (∂s'/∂g)ᵀ s̄'       and       (∂s'/∂s)ᵀ s̄'  with g held fixed.

The rest of s̄, through g = g(θ), is the network's: Hḡ is added to θ̄ by the caller.
States are flat vectors ``[parameter]``; adjoints of several queries ``[query, parameter]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class State(NamedTuple):
    """Weights and the optimiser's moments of a run between two steps, or their adjoints."""

    weights: Tensor
    moments: tuple[Tensor, ...]


class Rule(Protocol):
    """How an optimiser steps. ``step`` counts from 0, ``rate`` is its learning rate."""

    num_moments: int

    def forward(self, state: State, gradient: Tensor, step: int, rate: float) -> State:
        """s' from s and the gradient g of the batch."""

    def back(
        self, adjoint: State, before: State, gradient: Tensor, after: State, step: int, rate: float
    ) -> tuple[Tensor, State]:
        """(ḡ, (∂s'/∂s)ᵀ s̄') from s̄'."""


@dataclass(frozen=True)
class Sgd:
    """v' = βv + g + wd·θ ;  θ' = θ − ηv'.  (torch.optim.SGD without dampening or Nesterov.)"""

    momentum: float
    weight_decay: float
    num_moments = 1

    def forward(self, state: State, gradient: Tensor, step: int, rate: float) -> State:
        slope = gradient.add(state.weights, alpha=self.weight_decay)
        velocity = self.momentum * state.moments[0] + slope
        return State(state.weights.sub(velocity, alpha=rate), (velocity,))

    def back(
        self, adjoint: State, before: State, gradient: Tensor, after: State, step: int, rate: float
    ) -> tuple[Tensor, State]:
        of_velocity = adjoint.moments[0].sub(adjoint.weights, alpha=rate)
        weights = adjoint.weights.add(of_velocity, alpha=self.weight_decay)
        return of_velocity, State(weights, (self.momentum * of_velocity,))


@dataclass(frozen=True)
class Adam:
    """m' = β₁m + (1−β₁)g ;  v' = β₂v + (1−β₂)g² ;  θ' = θ − (η/c₁)·m' / (√(v'/c₂) + ε).

    c_k = 1 − β_k^(step+1). Weight decay is part of g (torch.optim.Adam), or θ shrinks by 1 − η·wd
    first where it is ``decoupled`` (torch.optim.AdamW; Loshchilov and Hutter 2019, algorithm 2).
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    num_moments = 2

    def forward(self, state: State, gradient: Tensor, step: int, rate: float) -> State:
        (beta1, beta2), slope = self.betas, self._slope(state, gradient)
        mean = state.moments[0].lerp(slope, 1 - beta1)
        square = (beta2 * state.moments[1]).addcmul(slope, slope, value=1 - beta2)
        size, _, divisor = self._divisor(square, step, rate)
        weights = self._kept(rate) * state.weights
        return State(weights.addcdiv(mean, divisor, value=-size), (mean, square))

    def back(
        self, adjoint: State, before: State, gradient: Tensor, after: State, step: int, rate: float
    ) -> tuple[Tensor, State]:
        (beta1, beta2), slope, (mean, square) = (
            self.betas,
            self._slope(before, gradient),
            after.moments,
        )
        size, root, divisor = self._divisor(square, step, rate)
        # ∂√v' = ∂v'/(2√v'). Where v' is 0 so is every g up to now: θ' is then −(η/c₁)·m'/ε to
        # first order, and v' has no part in it.
        by_square = torch.where(square > 0, size * mean / (2 * square.sqrt() * root), 0)
        of_mean = adjoint.moments[0] - adjoint.weights * (size / divisor)
        of_square = adjoint.moments[1] + adjoint.weights * (by_square / divisor**2)
        of_slope = (1 - beta1) * of_mean + of_square * (2 * (1 - beta2) * slope)
        weights = self._kept(rate) * adjoint.weights
        if not self.decoupled:
            weights = weights.add(of_slope, alpha=self.weight_decay)
        return of_slope, State(weights, (beta1 * of_mean, beta2 * of_square))

    def _slope(self, state: State, gradient: Tensor) -> Tensor:
        return gradient if self.decoupled else gradient.add(state.weights, alpha=self.weight_decay)

    def _kept(self, rate: float) -> float:
        return 1 - rate * self.weight_decay if self.decoupled else 1.0

    def _divisor(self, square: Tensor, step: int, rate: float) -> tuple[float, float, Tensor]:
        """(η/c₁, √c₂, √(v'/c₂) + ε)."""
        beta1, beta2 = self.betas
        root = (1 - beta2 ** (step + 1)) ** 0.5
        return rate / (1 - beta1 ** (step + 1)), root, square.sqrt() / root + self.eps
