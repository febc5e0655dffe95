"""Pairs (example, label), drawn by what they add to a curvature and weighted by 1/π.

    a_ic = p_ic ‖e_c − p_i‖²      what label c of example i adds to Σ_i tr(∇²ℓ_i), at the outputs

Horvitz and Thompson 1952: Σ_r y_r/π_r is without bias whatever π is, and exact where all are taken.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST_CLASSES = 128  # beyond, labels are drawn from the model: a_ic is held for every pair
_SHARE_AT_RANDOM = 0.05  # of the pairs, whatever a_ic says: other weights may weigh them otherwise


@dataclass(frozen=True)
class Sample:
    """Pairs (example, label), in order. All ``[row]``.

    example: place in the training set; label: a class, or the number of a draw of D;
    weight: R/(n π), so that (1/R) Σ_r weight_r y_r estimates (1/n) Σ_i Σ_c y_ic; 1/D of it for
    draws, of which G is the mean and not the sum.
    """

    example: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    drawn: bool


def pair_traces(p: Tensor) -> Tensor:
    """a_ic = p_ic (1 − 2 p_ic + Σ_d p_id²) of probabilities p ``[example, class]``."""
    return p * (1 - 2 * p + p.square().sum(1, keepdim=True))


def none_out_of_reach(shares: np.ndarray) -> np.ndarray:
    """Shares of all pairs, some of each at random."""
    return (1 - _SHARE_AT_RANDOM) * shares + _SHARE_AT_RANDOM / shares.size


def generator_of(key: str) -> torch.Generator:
    """Of the draws for one row: they depend on its name, on nothing else."""
    seed = hashlib.blake2b(key.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "little"))


def draw(importance: np.ndarray, num_rows: int, seed: int = 0) -> Sample:
    """``num_rows`` of the pairs ``[example, label]``, or all of them if there are not so many.

    π = min(1, τ a) with Σ π = num_rows, drawn systematically: of the pairs in a random order, one
    is taken at every whole step of the running sum of π.
    """
    generator = np.random.default_rng(seed)
    n, labels = importance.shape
    a = importance.reshape(-1).astype(np.float64)
    pi = _inclusion(a, min(num_rows, a.size))
    if num_rows < a.size:
        order = generator.permutation(a.size)
        sums = np.cumsum(pi[order])
        steps = np.arange(num_rows) + generator.random()
        picked = np.sort(order[np.searchsorted(sums * (num_rows / sums[-1]), steps, "right")])
    else:
        picked = np.arange(a.size)
    weight = len(picked) / (n * pi[picked])
    return Sample(picked // labels, picked % labels, weight.astype(np.float32), drawn=False)


def _inclusion(a: np.ndarray, count: int) -> np.ndarray:
    """min(1, τ a), with sum ``count``: the t largest for sure and τ = (count − t)/Σ of the rest."""
    if count == a.size:
        return np.ones(a.size)
    falling = np.sort(a)[::-1]
    rest = np.cumsum(falling[::-1])[::-1]  # rest[t]: all but the t largest
    sure = np.arange(count)
    tau = (count - sure) / rest[:count]
    t = int(np.argmax(tau * falling[:count] <= 1))  # at count − 1 at the latest, but for ties
    return np.minimum(1.0, tau[t] * a)
