"""How near chance brings examples to each other: the null that near-duplicates are held against.

    λ(r) = k·(r/r_k)^D,     D = ln 2 / median ln(r_k/r_{k/2}),     r = √(2 − 2 cos)

λ(r): examples expected within r of one whose k-th nearest is at r_k, if those around it lie as in a
Poisson process in D dimensions (Levina and Bickel 2004, whose 1/D is a mean of such logarithms).
Half of the volume within r_k lies within r_{k/2}, in the median: this gives D. Copies move the
nearest of the k and hardly r_{k/2}, and a median bears the rest.

No distance is below RESOLUTION: where a network maps the examples onto one point, λ is k. In a
group of more than k copies r_k is no measure of density: it is raised to what one example in ten
falls short of.
"""

from __future__ import annotations

import numpy as np

from tda.valuation.nearest import ROUNDING, Neighbours, Space
from tda.valuation.significance import LEVEL, false_discovery_rates

RESOLUTION = 2**-8  # bfloat16 moves a direction by as much at most; a float32 cosine tells no more
CROWDED = 0.1  # of the examples at most are in groups of more than k copies


def expected(space: Space, near: Neighbours, cosine: np.ndarray, *sides: np.ndarray) -> np.ndarray:
    """λ ``[pair]`` of pairs with this cosine; ∞ where there are too few examples to tell.

    near: the nearest in ``space`` of each example, or query. sides: its indices ``[pair]`` on one
    side of the pairs, or on both; then the larger λ of the two.
    """
    k = _even(near.similarity)
    if not k:
        return np.full(len(cosine), np.inf)
    dimension, least = _scale(space)
    reach = np.maximum(distance(near.similarity[:, k - 1]), least)
    share = distance(cosine) / np.minimum.reduce([reach[side] for side in sides])
    return k * np.minimum(share, 1) ** dimension


def rare(count: int, expected: np.ndarray, *sides: np.ndarray) -> np.ndarray:
    """``[pair]`` bool: the pairs that chance does not explain, by their λ.

        p_i = 1 − exp(−min λ)

    is the probability that chance brings anything as near to i as its nearest. The pairs kept have
    a λ as small as an example's with a false discovery rate below LEVEL (Benjamini and Hochberg
    1995), among ``count`` examples: of those with such a pair, chance explains 1 in 20 at most.
    """
    fewest = np.full(count, np.inf)
    for side in sides:
        np.minimum.at(fewest, side, expected)
    called = false_discovery_rates(-np.expm1(-fewest)) < LEVEL
    return expected <= fewest[called].max(initial=-1)


def distance(cosine: np.ndarray) -> np.ndarray:
    """√(2 − 2 cos) of directions, RESOLUTION at least."""
    return np.sqrt(np.maximum(2 - 2 * np.asarray(cosine, np.float64), RESOLUTION**2))


def _scale(space: Space) -> tuple[float, float]:
    """D, and the least r_k that is a measure of density; D is 0 where no distance is resolved."""
    others = space.sample  # enough to know D to 2 %
    k = _even(others)
    if not k:
        return 0.0, RESOLUTION
    half, reach = distance(others[:, k // 2 - 1]), distance(others[:, k - 1])
    ratio = np.log(reach / half)[half > RESOLUTION]
    dimension = np.log(2) / max(np.median(ratio), ROUNDING) if len(ratio) else 0.0
    return float(dimension), float(np.quantile(reach, CROWDED))


def _even(similarity: np.ndarray) -> int:
    """k: the median of (r_{k/2}/r_k)^D, a Beta(k/2, k/2) variable, is ½ if k is even."""
    return similarity.shape[1] // 2 * 2
