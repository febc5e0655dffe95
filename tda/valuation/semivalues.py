"""What each player of a game contributes: Shapley, Beta-Shapley, Banzhaf, leave-one-out.

    φ_i = Σ_{S ∌ i} w(|S|) · (U(S ∪ {i}) − U(S))

Players are anything: examples, sources, annotators, shards, data sets, parts of a model; the
utility says what a coalition of them achieves. A semivalue is the weights of coalition sizes
(Dubey et al. 1981), with s = |S| and n players:

    shapley        s!(n − s − 1)!/n!
    Beta(α, β)     B(s + β, n − s − 1 + α)/B(α, β)       Kwon and Zou 2022, "Beta Shapley", eq. 5
    banzhaf        2^{1−n}                               Wang and Jia 2023, "Data Banzhaf"
    leave_one_out  1 for s = n − 1, else 0

Beta(1, 1) is Shapley; α > β looks at small coalitions, where the noise of training matters less.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats
from scipy.special import betaln, gammaln

from tda.errors import ConfigError
from tda.valuation.coalitions import Coalitions, Player, Utility
from tda.valuation.frames import frame

MAX_EXACT = 16  # players whose 65,536 coalitions are still enumerated
CHAINS = 4
ENOUGH = (1.05, 0.95)  # of r_hat at most, of split_half at least


class Beta(NamedTuple):
    """The weights of Beta-Shapley; Beta(16, 1) is the paper's choice for finding bad examples."""

    alpha: float
    beta: float


Kind = Literal["shapley", "banzhaf", "leave_one_out"] | Beta


@dataclass(frozen=True, eq=False)
class Semivalues:
    """What each player is worth ``[player]``, in units of the utility, and whether that is settled.

    standard_error, low, high: of sampling coalitions alone (95 %, normal): not of the noise in the
    utility, nor of truncation. 0 and equal where every coalition was seen (``exact``).
    r_hat ``[player]``: Gelman and Rubin 1992 over independent chains of samples, 1 when settled.
    split_half: correlation over players of the values from two halves of the chains, stepped up to
    the whole (Spearman 1910, Brown 1910). full, empty: utility of all players and of none.
    truncated: share of marginal contributions taken to be 0. num_coalitions: utilities computed.
    """

    players: tuple[Player, ...]
    kind: str
    value: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    r_hat: np.ndarray
    split_half: float
    full: float
    empty: float
    truncated: float
    num_coalitions: int
    exact: bool

    @property
    def settled(self) -> bool:
        """Whether more samples would change little: all r_hat ≤ 1.05 and split_half ≥ .95."""
        return self.exact or bool(self.r_hat.max() <= ENOUGH[0] and self.split_half >= ENOUGH[1])

    def to_frame(self) -> Any:
        """One row a player (pandas)."""
        return frame(
            {
                "player": [str(player) for player in self.players],
                "value": self.value,
                "standard_error": self.standard_error,
                "ci_lo": self.low,
                "ci_hi": self.high,
                "r_hat": self.r_hat,
            }
        )


def semivalues(
    utility: Utility,
    players: Iterable[Player],
    kind: Kind = "shapley",
    *,
    samples: int = 256,
    truncation: float | None = None,
    seed: int = 0,
    cache: str | Path | MutableMapping[str, float] | None = None,
    workers: int = 1,
) -> Semivalues:
    """The worth of each player in the game ``utility(tuple of players) -> float``.

    samples: permutations (n utilities each; Castro et al. 2009), or coalitions for banzhaf, each of
    which serves all players (maximum sample reuse). Where enumerating all 2^n coalitions takes no
    more, that is done, and the answer is exact. truncation: a permutation ends, and the players
    left in it are given 0, once the utility is this close to that of all players (Ghorbani and Zou
    2019); biased where late players still matter. cache, workers: see `Coalitions`. More samples
    with the same seed and cache go on from where the last call ended.
    """
    game = Coalitions(utility, tuple(players), cache, workers)
    n = len(game.players)
    if samples < 2 * CHAINS:
        raise ConfigError("too few samples", found=samples, wanted=f"{2 * CHAINS} or more")
    _log_weights(n, kind)  # an unknown kind is refused before anything is computed
    empty, full = game.utilities([0, game.everyone])
    truncated = 0.0
    if kind == "leave_one_out":
        without = game.utilities([game.everyone & ~(1 << i) for i in range(n)])
        found = _exactly(full - without)
    elif n <= MAX_EXACT and 2**n <= samples * (1 if kind == "banzhaf" else n):
        found = _exactly(coefficients(n, kind) @ game.utilities(range(2**n)))
    elif kind == "banzhaf":
        found = _banzhaf(game, samples, seed)
    else:
        weights = np.exp(_log_choices(n) + _log_weights(n, kind)) * n
        marginals, truncated = _marginals(game, samples, truncation, seed, full, empty)
        found = _from_samples(marginals[0] * weights[marginals[1]])
    name = kind if isinstance(kind, str) else f"beta({kind.alpha:g}, {kind.beta:g})"
    value, error, r_hat, split_half, exact = found
    reach = stats.norm.ppf(0.975) * error
    return Semivalues(
        game.players, name, value, error, value - reach, value + reach, r_hat, split_half,
        float(full), float(empty), truncated, game.num_computed, exact,
    )  # fmt: skip


def coefficients(n: int, kind: Kind = "shapley") -> np.ndarray:
    """A ``[player, coalition]`` with φ = A U, coalitions as binary numbers; for few players."""
    coalition = np.arange(2**n)
    inside = (coalition >> np.arange(n)[:, None] & 1).astype(bool)
    size = inside.sum(0)
    weights = np.append(np.exp(_log_weights(n, kind)), 0.0)
    return np.where(inside, weights[size - 1], -weights[size])


def _log_weights(n: int, kind: Kind) -> np.ndarray:
    """log w(s) for s = 0 … n − 1."""
    s = np.arange(n)
    if kind == "banzhaf":
        return np.full(n, (1 - n) * np.log(2))
    if kind == "leave_one_out":
        return np.where(s == n - 1, 0.0, -np.inf)
    if kind == "shapley":
        kind = Beta(1, 1)
    if not isinstance(kind, Beta) or min(kind) <= 0:
        raise ConfigError(
            "this is no semivalue",
            found=repr(kind),
            wanted="'shapley', 'banzhaf', 'leave_one_out', or Beta(α, β) with both > 0",
        )
    return betaln(s + kind.beta, n - s - 1 + kind.alpha) - betaln(*kind)


def _log_choices(n: int) -> np.ndarray:
    """log of the number of coalitions of s = 0 … n − 1 of n − 1 players."""
    s = np.arange(n)
    return gammaln(n) - gammaln(s + 1) - gammaln(n - s)


Found = tuple[np.ndarray, np.ndarray, np.ndarray, float, bool]


def _exactly(value: np.ndarray) -> Found:
    return value, np.zeros_like(value), np.ones_like(value), 1.0, True


def _marginals(
    game: Coalitions, samples: int, truncation: float | None, seed: int, full: float, empty: float
) -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """((gains, sizes of the coalitions joined), each ``[chain, draw, player]``, share cut off).

    All permutations take their next player together: their coalitions are one batch for Dask.
    """
    n, draws = len(game.players), samples // CHAINS
    chains = [np.random.default_rng([seed, chain]) for chain in range(CHAINS)]
    order = np.array([[random.permutation(n) for _ in range(draws)] for random in chains])
    order = order.reshape(CHAINS * draws, n)
    gain, size = np.zeros(order.shape), np.argsort(order, axis=1)
    coalition, utility = [0] * len(order), np.full(len(order), empty)
    going, skipped = np.arange(len(order)), 0
    for position in range(n):
        if truncation is not None:
            going = going[np.abs(full - utility[going]) > truncation]
            skipped += len(order) - len(going)
        joined = order[going, position]
        for row, player in zip(going.tolist(), joined.tolist(), strict=True):
            coalition[row] |= 1 << player
        reached = game.utilities([coalition[row] for row in going])
        gain[going, joined] = reached - utility[going]
        utility[going] = reached
    shape = (CHAINS, draws, n)
    return (gain.reshape(shape), size.reshape(shape)), skipped / order.size


def _banzhaf(game: Coalitions, samples: int, seed: int) -> Found:
    """φ_i = mean of U over sampled coalitions with i, less the mean over those without."""
    n, draws = len(game.players), samples // CHAINS
    inside = np.stack(
        [np.random.default_rng([seed, chain]).random((draws, n)) < 0.5 for chain in range(CHAINS)]
    )
    coalitions = [sum(1 << int(i) for i in np.flatnonzero(one)) for one in inside.reshape(-1, n)]
    utility = game.utilities(coalitions)
    flat = inside.reshape(-1, n)

    def mean_and_variance(member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = np.maximum(member.sum(0), 1)
        mean = utility @ member / count
        squares = ((utility[:, None] - mean) ** 2 * member).sum(0)
        return mean, squares / np.maximum(count - 1, 1) / count

    (with_i, error), (without, other) = mean_and_variance(flat), mean_and_variance(~flat)
    # Each sample's own estimate, whose mean differs from φ by the imbalance of the draw alone.
    terms = 2.0 * np.where(flat, 1, -1) * (utility - utility.mean())[:, None]
    _, _, r_hat, split_half, _ = _from_samples(terms.reshape(inside.shape))
    return with_i - without, np.sqrt(error + other), r_hat, split_half, False


def _from_samples(terms: np.ndarray) -> Found:
    """Means of ``terms [chain, draw, player]`` with their diagnostics.

    R̂ = √(((L − 1)/L · W + B/L)/W), W the mean variance within a chain of L draws, B/L the variance
    of the chains' means (Gelman and Rubin 1992, eq. 3 without the correction for few chains).
    """
    chains, draws, n = terms.shape
    means = terms.mean(1)
    within, between = terms.var(1, ddof=1).mean(0), means.var(0, ddof=1)
    pooled = (draws - 1) / draws * within + between
    r_hat = np.sqrt(np.divide(pooled, within, out=np.ones(n), where=within > 0))
    error = terms.reshape(-1, n).std(0, ddof=1) / np.sqrt(chains * draws)
    first, second = means[: chains // 2].mean(0), means[chains // 2 :].mean(0)
    return means.mean(0), error, r_hat, _stepped_up(first, second), False


def _stepped_up(first: np.ndarray, second: np.ndarray) -> float:
    """2r/(1 + r) of two halves; 1 where they are the same, NaN where too few players tell."""
    if np.allclose(first, second, rtol=1e-9, atol=0):
        return 1.0
    if len(first) < 3 or min(np.ptp(first), np.ptp(second)) == 0:
        return float("nan")
    r = float(np.corrcoef(first, second)[0, 1])
    return 2 * r / (1 + r) if r > 0 else r
