"""Is a value other than zero? Student's t over replicates, and false discovery rates.

A value is the mean of R replicates that are independent of each other (trainings, say). Its
standard error is s/√R, s the replicates' standard deviation: it falls as replicates are added, so a
true effect of any size is found in the end (leaving out √R, it never is).

Checkpoints of one training are not independent. Whatever they have in common – the seed, the
order – moves their mean and not their spread, so s/√R is a lower bound of the error, and a test by
it calls far more than 5 % of nothings effects. Then there is no p and no q: no sign is reliable.

Where every replicate went through the same random projection, their spread does not show that
projection's error. It then comes as B parts of the value, one from each part of the projection's
dimensions, which scatter around value/B; both variances add (Welch 1947, Satterthwaite 1946).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class Significance:
    """Arrays of one shape, float64; NaN where there are fewer than two replicates.

    value: the mean. standard_error: of the mean. low, high: the 95 % interval. p: of the hypothesis
    that the true value is 0, two-sided. q: the smallest false discovery rate at which the value is
    still called (Benjamini and Hochberg 1995), among all values of the array. Where replicates
    depend on each other, error and interval are lower bounds, and p and q are NaN.
    """

    value: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    q: np.ndarray

    @property
    def reliable(self) -> np.ndarray:
        """Whether the sign survives: q < .05; False where q is not known."""
        return np.less(self.q, LEVEL, where=np.isfinite(self.q), out=np.zeros(self.q.shape, bool))


def significance_of(
    replicates: np.ndarray, parts: np.ndarray | None = None, independent: bool = True
) -> Significance:
    """The mean of ``replicates [replicate, ...]`` and how sure its sign is.

        t = v / √(s²/R + B·s_B²),   s² and s_B² with R − 1 and B − 1 in the denominator,

    with the degrees of freedom of Welch and Satterthwaite. parts ``[part, ...]``: pieces that sum
    to the value, for the error of a projection that all replicates share. independent: whether the
    replicates are; else p and q are NaN.

    Replicates that agree to the last bit are copies of each other: unless all are 0 (then p = 1),
    they tell nothing of the uncertainty, and p and q are NaN.
    """
    replicates = np.asarray(replicates, np.float64)
    count = len(replicates)
    value = replicates.mean(0)
    if count < 2:
        unknown = np.full(value.shape, np.nan)
        return Significance(value, *([unknown] * 5))
    variance = replicates.var(0, ddof=1) / count
    squares = variance**2 / (count - 1)
    if parts is not None:
        parts = np.asarray(parts, np.float64)
        shared = len(parts) * parts.var(0, ddof=1)
        squares = squares + shared**2 / (len(parts) - 1)
        copies, variance = variance == 0, np.where(variance == 0, 0, variance + shared)
    else:
        copies = variance == 0
    nothing = copies & (value == 0)
    error = np.where(copies & ~nothing, np.nan, np.sqrt(variance))
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = np.where(copies, count - 1, variance**2 / squares)
        t = np.where(nothing, 0.0, value / error)
    p = 2 * stats.t.sf(np.abs(t), degrees) if independent else np.full(value.shape, np.nan)
    reach = stats.t.ppf(0.975, degrees) * error
    return Significance(value, error, value - reach, value + reach, p, false_discovery_rates(p))


def false_discovery_rates(p: np.ndarray) -> np.ndarray:
    """q of every p, in p's shape (Benjamini and Hochberg 1995); NaN is no test and stays NaN."""
    q = np.full(np.shape(p), np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known], method="bh")
    return q
