"""KNN-Shapley against Shapley's definition, and Data-OOB against its own."""

from __future__ import annotations

import sys
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from tda import valuation
from tda.errors import DataError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def by_definition(x, y, z, wanted, k: int) -> np.ndarray:
    """Σ_S |S|!(n−|S|−1)!/n! (v(S∪i) − v(S)) over all coalitions, float64, averaged over queries."""
    n = len(x)

    def utility(members: tuple[int, ...]) -> float:
        total = 0.0
        for query, label in zip(z, wanted, strict=True):
            near = sorted(members, key=lambda i: (((x[i] - query) ** 2).sum(), i))[:k]
            total += sum(y[i] == label for i in near) / k
        return total / len(z)

    value = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            weight = 1 / (n * comb(n - 1, size))
            for some in combinations(others, size):
                value[i] += weight * (utility((*some, i)) - utility(some))
    return value


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7, 20])
def test_closed_form_is_shapleys_definition(rng, k):
    """All 2⁶ coalitions, three queries, fewer and more examples than k; ties by index."""
    x = rng.integers(0, 3, (6, 2)).astype(float)  # many equal distances
    y, z, wanted = rng.integers(0, 2, 6), rng.integers(0, 3, (3, 2)).astype(float), [0, 1, 1]
    found = valuation.knn_shapley(x, y, z, np.array(wanted), k)
    np.testing.assert_allclose(found.value, by_definition(x, y, z, wanted, k), atol=1e-12)


def test_values_add_up_to_the_accuracy_of_k_neighbours(rng):
    """Efficiency: Σ_i value_i = v(all), the mean share of the k nearest with the right label."""
    x, z = rng.normal(size=(3000, 8)), rng.normal(size=(200, 8))
    y, wanted = rng.integers(0, 5, 3000), rng.integers(0, 5, 200)
    found = valuation.knn_shapley(x, y, z, wanted, k=7)
    near = KNeighborsClassifier(7).fit(x, y).predict_proba(z)
    assert found.utility == pytest.approx(near[np.arange(200), wanted].mean(), abs=1e-6)
    assert found.value.sum() == pytest.approx(found.utility)


def test_blocks_and_threads_change_nothing(rng, monkeypatch):
    x, z = rng.normal(size=(500, 4)), rng.normal(size=(50, 4))
    y, wanted = rng.integers(0, 3, 500), rng.integers(0, 3, 50)
    whole = valuation.knn_shapley(x, y, z, wanted)
    monkeypatch.setattr(sys.modules["tda.valuation.knn_shapley"], "BLOCK_BYTES", 4 * 500 * 7)
    torch.set_num_threads(2)
    np.testing.assert_allclose(
        valuation.knn_shapley(x, y, z, wanted).value, whole.value, atol=1e-12
    )


def test_error_is_the_standard_error_over_queries(rng):
    """As from each query's own values."""
    x, y = rng.normal(size=(30, 3)), rng.integers(0, 2, 30)
    z, wanted = rng.normal(size=(9, 3)), rng.integers(0, 2, 9)
    each = [valuation.knn_shapley(x, y, z[i : i + 1], wanted[i : i + 1]).value for i in range(9)]
    found = valuation.knn_shapley(x, y, z, wanted)
    np.testing.assert_allclose(found.value, np.mean(each, axis=0), atol=1e-12)
    np.testing.assert_allclose(found.standard_error, np.std(each, axis=0, ddof=1) / 3, atol=1e-9)


def test_cosine_is_blind_to_length(rng):
    x, z, y = rng.normal(size=(40, 3)), rng.normal(size=(5, 3)), rng.integers(0, 2, 40)
    longer = x * rng.uniform(0.1, 9, (40, 1))
    first, second = (valuation.knn_shapley(a, y, z, y[:5], 3, "cosine").value for a in (x, longer))
    np.testing.assert_allclose(first, second, atol=1e-12)


def test_a_far_away_cloud_is_ordered_all_the_same(rng):
    """Distances are taken about the mean: an offset of 10⁴ does not drown them in float32."""
    x, z = rng.normal(size=(200, 3)), rng.normal(size=(20, 3))
    y = (x[:, 0] > 0).astype(int)
    here = valuation.knn_shapley(x, y, z, y[:20], 5).value
    there = valuation.knn_shapley(x + 1e4, y, z + 1e4, y[:20], 5).value
    assert np.corrcoef(here, there)[0, 1] > 0.99


def test_wrong_labels_have_the_lowest_values(rng):
    y = rng.integers(0, 3, 600)
    x = 4 * np.eye(3)[y] + rng.normal(size=(600, 3))
    wrong = rng.random(600) < 0.1
    given = np.where(wrong, (y + 1) % 3, y)
    found = valuation.knn_shapley(x[:500], given[:500], x[500:], y[500:])
    assert roc_auc_score(wrong[:500], -found.value) > 0.95


def test_what_does_not_match_is_refused():
    x = np.zeros((4, 2))
    with pytest.raises(DataError, match="do not match"):
        valuation.knn_shapley(x, [0, 1, 0], x, [0, 0, 0, 0])
    with pytest.raises(DataError, match="not a finite"):
        valuation.knn_shapley(x + np.nan, [0] * 4, x, [0] * 4)
    with pytest.raises(DataError, match="not a count"):
        valuation.knn_shapley(x, [0] * 4, x, [0] * 4, k=0)


# ---- Data-OOB


def test_data_oob_is_the_mean_over_bags_that_left_the_example_out(rng):
    """Against the definition, with the same bags (scikit-learn's) and learners fitted anew."""
    from sklearn.ensemble import BaggingClassifier

    x, labels = rng.normal(size=(40, 3)).astype(np.float32), np.array(["b", "a"])
    y = labels[(x[:, 0] + rng.normal(size=40) > 0).astype(int)]
    learner = DecisionTreeClassifier(max_depth=2, random_state=0)
    found = valuation.data_oob(x, y, learner=learner, num_bags=30, seed=3)
    bagging = BaggingClassifier(learner, n_estimators=30, random_state=3).fit(x, y)
    right: list[list[bool]] = [[] for _ in y]
    for model, bag in zip(bagging.estimators_, bagging.estimators_samples_, strict=True):
        for i in set(range(40)) - set(bag.tolist()):
            guess = bagging.classes_[int(model.predict(x[i : i + 1])[0])]
            right[i].append(guess == y[i])
    np.testing.assert_allclose(found.value, [np.mean(r) for r in right])
    np.testing.assert_array_equal(found.num_bags, [len(r) for r in right])
    errors = [np.std(r, ddof=1) / np.sqrt(len(r)) for r in right]
    np.testing.assert_allclose(found.standard_error, errors, atol=1e-12)
    sure = found.value > 0.5
    np.testing.assert_array_equal(found.vote[sure], y[sure])


def test_standard_error_is_the_scatter_over_other_bags(rng):
    """Values from 12 seeds scatter by what one seed says they do."""
    x = rng.normal(size=(60, 2))
    y = (x[:, 0] + rng.normal(size=60) > 0).astype(int)
    learner = DecisionTreeClassifier(max_depth=1)
    found = [valuation.data_oob(x, y, learner=learner, num_bags=25, seed=seed) for seed in range(8)]
    scatter = np.mean(np.var([one.value for one in found], axis=0, ddof=1))
    said = np.nanmean([one.standard_error**2 for one in found])
    assert scatter == pytest.approx(said, rel=0.35)


def test_data_oob_finds_wrong_labels_and_names_the_right_ones(rng):
    y = rng.integers(0, 3, 300)
    x = 4 * np.eye(3)[y] + rng.normal(size=(300, 3))
    wrong = rng.random(300) < 0.1
    given = np.where(wrong, (y + 1) % 3, y)
    found = valuation.data_oob(x, given, num_bags=100)
    assert roc_auc_score(wrong, -found.value) > 0.95
    assert np.mean(found.vote[wrong] == y[wrong]) > 0.9


def test_a_regression_is_valued_by_minus_its_squared_error(rng):
    x = rng.uniform(-1, 1, (200, 1))
    y = x[:, 0] + 0.05 * rng.normal(size=200)
    y[:5] += 3
    found = valuation.data_oob(x, y, learner=DecisionTreeRegressor(max_depth=3), num_bags=50)
    assert found.vote is None
    assert set(np.argsort(found.value)[:5]) == set(range(5))
    assert found.value[:5] == pytest.approx(-9, abs=4)


def test_an_example_in_every_bag_has_no_value(rng):
    found = valuation.data_oob(rng.normal(size=(30, 2)), np.arange(30) % 2, num_bags=2)
    never = found.num_bags == 0
    assert never.any() and np.isnan(found.value[never]).all()
