"""Semivalues against games whose values are known in closed form."""

from __future__ import annotations

import json
from itertools import combinations, permutations
from math import comb

import dask
import numpy as np
import pytest
from scipy.special import beta as B

from tda import valuation
from tda.errors import ConfigError, DataError, MismatchError
from tda.valuation import Beta
from tda.valuation.coalitions import Coalitions
from tda.valuation.semivalues import coefficients

KINDS = ["shapley", "banzhaf", "leave_one_out", Beta(16, 1), Beta(1, 4)]
WORTH = {f"source {i}": float((-1) ** i * i) for i in range(1, 25)}


def additive(members: tuple) -> float:
    return sum(WORTH[name] for name in members)


def airport(members: tuple) -> float:
    """A runway serves all who need less: the longest is paid for."""
    return max(members, default=0)


def glove(members: tuple) -> float:
    """Pairs of a left and a right glove."""
    left = sum(name.startswith("L") for name in members)
    return float(min(left, len(members) - left))


def majority(members: tuple) -> float:
    return float(len(members) >= 3)


def weighted(members: tuple) -> float:
    """Quota 4 of the votes 3, 2, 1, 1: players are (name, votes)."""
    return float(sum(votes for _, votes in members) >= 4)


def by_definition(utility, players, weight) -> np.ndarray:
    """Σ_{S∌i} weight(|S|) (U(S∪i) − U(S)), coalition by coalition."""
    value = []
    for i, player in enumerate(players):
        others = [*players[:i], *players[i + 1 :]]
        total = 0.0
        for size in range(len(players)):
            for some in combinations(others, size):
                joined = tuple(p for p in players if p in some or p == player)
                total += weight(size) * (utility(joined) - utility(some))
        value.append(total)
    return np.array(value)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_in_an_additive_game_everyone_is_worth_what_he_brings(kind):
    """Every semivalue, sampled with 24 players; Shapley without error, for marginals agree."""
    found = valuation.semivalues(additive, WORTH, kind, samples=64)
    miss = np.abs(found.value - list(WORTH.values()))
    if kind in ("shapley", "leave_one_out"):
        np.testing.assert_allclose(miss, 0, atol=1e-9)
    assert np.mean(miss <= 3 * found.standard_error + 1e-9) > 0.9


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_weights_are_those_of_the_papers(kind):
    """Enumerated, against the definition with each paper's weight written out."""
    n = 5
    weight = {
        "shapley": lambda s: 1 / (n * comb(n - 1, s)),
        "banzhaf": lambda s: 0.5 ** (n - 1),
        "leave_one_out": lambda s: float(s == n - 1),
        Beta(16, 1): lambda s: B(s + 1, n - s - 1 + 16) / B(16, 1),
        Beta(1, 4): lambda s: B(s + 4, n - s - 1 + 1) / B(1, 4),
    }[kind]
    players = [1, 2, 4, 7, 7.5]
    found = valuation.semivalues(airport, players, kind)
    assert found.exact and found.settled
    np.testing.assert_allclose(found.value, by_definition(airport, players, weight), atol=1e-12)
    utilities = Coalitions(airport, tuple(players)).utilities(range(2**n))
    np.testing.assert_allclose(coefficients(n, kind) @ utilities, found.value, atol=1e-12)


def test_airport_game_shares_each_stretch_among_those_who_use_it():
    """Littlechild and Owen 1973: φ_i = Σ_{j≤i} (c_j − c_{j−1})/(n − j + 1); 18 players, sampled."""
    costs = np.arange(1, 19) ** 1.5
    found = valuation.semivalues(airport, costs.tolist(), samples=400)
    steps = np.diff(costs, prepend=0) / np.arange(18, 0, -1)
    expected = np.cumsum(steps)
    assert not found.exact
    assert np.mean((found.low <= expected) & (expected <= found.high)) > 0.8
    assert np.corrcoef(found.value, expected)[0, 1] > 0.99
    assert found.value.sum() == pytest.approx(found.full - found.empty)
    assert found.settled and found.num_coalitions <= 400 * 18 + 2


def test_glove_game():
    """One left glove, two right: 2/3, 1/6, 1/6 (Shapley and Shubik)."""
    found = valuation.semivalues(glove, ["L", "R1", "R2"])
    np.testing.assert_allclose(found.value, [2 / 3, 1 / 6, 1 / 6])


def test_banzhaf_of_a_majority_is_the_chance_to_be_decisive():
    """Five equal voters, three needed: C(4, 2)/2⁴ = 3/8 each; and 21 voters, sampled."""
    exact = valuation.semivalues(majority, range(5), "banzhaf")
    np.testing.assert_allclose(exact.value, 3 / 8)
    big = valuation.semivalues(lambda m: float(len(m) > 10), range(21), "banzhaf", samples=4000)
    expected = comb(20, 10) / 2**20
    assert np.mean((big.low <= expected) & (expected <= big.high)) > 0.8
    assert not big.exact and big.num_coalitions <= 4002


def test_weighted_voting_by_all_orders():
    """Shapley–Shubik power of 3, 2, 1, 1 with quota 4: counted over all 24 orders of entry."""
    players = [("a", 3), ("b", 2), ("c", 1), ("d", 1)]
    pivotal = dict.fromkeys(players, 0)
    for order in permutations(players):
        sums = np.cumsum([votes for _, votes in order])
        pivotal[order[int(np.argmax(sums >= 4))]] += 1
    found = valuation.semivalues(weighted, players)
    np.testing.assert_allclose(found.value, np.array(list(pivotal.values())) / 24)


def test_leave_one_out_takes_one_utility_a_player():
    asked = []

    def utility(members):
        asked.append(members)
        return airport(members)

    found = valuation.semivalues(utility, [1, 5, 9], "leave_one_out")
    np.testing.assert_allclose(found.value, [0, 0, 4])
    assert len(asked) == 5


def test_standard_error_is_the_scatter_over_seeds():
    """Sampled values of 20 seeds scatter as their errors say: 18 players, both estimators."""
    costs = (np.arange(1, 19) ** 1.5).tolist()
    for kind, samples in (("shapley", 40), ("banzhaf", 200), (Beta(4, 1), 40)):
        found = [
            valuation.semivalues(airport, costs, kind, samples=samples, seed=seed)
            for seed in range(20)
        ]
        assert not any(one.exact for one in found)
        scatter = np.var([one.value for one in found], axis=0, ddof=1).sum()
        said = np.mean([one.standard_error**2 for one in found], axis=0).sum()
        assert said == pytest.approx(scatter, rel=0.35)


def test_diagnostics_tell_too_few_samples_from_enough():
    random = np.random.default_rng(0)
    noise: dict[tuple, float] = {}

    def noisy(members):
        return airport(members) + noise.setdefault(members, 20 * random.normal())

    costs = np.arange(1, 19).astype(float).tolist()
    few, many = (valuation.semivalues(noisy, costs, samples=s) for s in (8, 800))
    assert not few.settled
    assert many.split_half > few.split_half
    assert many.r_hat.max() < few.r_hat.max()


def test_truncation_saves_utilities_and_loses_no_more_than_it_says():
    """Where n/2 players reach all there is, walks end there; Σφ is right to the tolerance."""

    def saturating(members):
        return 1 - 0.3 ** len(members)

    players = range(20)
    cut = valuation.semivalues(saturating, players, samples=64, truncation=0.01)
    assert cut.truncated == pytest.approx(0.8)  # 0.3⁴ < .01: four steps of 20 are taken
    assert cut.value.sum() == pytest.approx(cut.full - cut.empty, abs=0.01)
    whole = valuation.semivalues(saturating, players, samples=64)
    assert cut.num_coalitions < whole.num_coalitions / 2


def test_the_same_coalition_is_never_computed_twice_whatever_the_interruption(tmp_path):
    """Stopped at any coalition, the same call goes on, and ends with the same bytes of answer."""
    file, asked = tmp_path / "deep" / "game.jsonl", []

    def utility(members):
        asked.append(members)
        if len(asked) == 100:
            raise KeyboardInterrupt
        return airport(members)

    costs = np.arange(1, 19).astype(float).tolist()
    with pytest.raises(KeyboardInterrupt):
        valuation.semivalues(utility, costs, samples=16, cache=file)
    with file.open("a") as torn:
        torn.write('["0x3')
    resumed = valuation.semivalues(utility, costs, samples=16, cache=file)
    fresh = valuation.semivalues(airport, costs, samples=16)
    np.testing.assert_array_equal(resumed.value, fresh.value)
    assert len(asked) - len(set(asked)) == 1  # the one that was stopped
    again = valuation.semivalues(utility, costs, samples=16, cache=file)
    assert again.num_coalitions == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(dict(lines[1:])) == len(lines) - 1


def test_more_samples_go_on_from_fewer():
    cache: dict[str, float] = {}
    costs = np.arange(1, 19).astype(float).tolist()
    few = valuation.semivalues(airport, costs, samples=16, cache=cache)
    more = valuation.semivalues(airport, costs, samples=32, cache=cache)
    alone = valuation.semivalues(airport, costs, samples=32)
    assert few.num_coalitions + more.num_coalitions == alone.num_coalitions
    np.testing.assert_array_equal(more.value, alone.value)


def test_a_file_of_other_players_is_refused(tmp_path):
    file = tmp_path / "game.jsonl"
    valuation.semivalues(airport, [1, 2, 3], cache=file)
    with pytest.raises(MismatchError, match="other players"):
        valuation.semivalues(airport, [1, 2, 4], cache=file)


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["threads", "processes"]
)
def test_dask_gives_the_same_answer(workers):
    """A configured scheduler is used; without one, more workers are processes."""
    alone = valuation.semivalues(glove, ["L", "R1", "R2"])
    with dask.config.set({"scheduler": "threads"} if workers == 1 else {}):
        together = valuation.semivalues(glove, ["L", "R1", "R2"], workers=workers)
    np.testing.assert_array_equal(alone.value, together.value)


def test_what_is_no_game_is_refused():
    with pytest.raises(DataError, match="not a set"):
        valuation.semivalues(airport, [1, 1, 2])
    with pytest.raises(DataError, match="not a finite"):
        valuation.semivalues(lambda m: float("nan"), [1, 2])
    with pytest.raises(ConfigError, match="no semivalue"):
        valuation.semivalues(airport, [1, 2], "owen")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="too few samples"):
        valuation.semivalues(airport, [1, 2], samples=3)
