"""Faults that were planted are found, and what is merely rare is left alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import tda
from tda import valuation
from tda.errors import DataError
from tda.valuation import faults, nearest
from tda.valuation.duplicates import components
from tda.valuation.faults import gradient_neighbours, tally

SIZES = (800, 400, 200, 100, 50, 25, 12)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- near-duplicates


def test_near_duplicates_are_all_pairs_above_the_cosine(rng):
    """Against the whole matrix in float64; a row of zeros is like nothing, not even itself."""
    rows = rng.normal(size=(400, 3))
    rows[7] = 0
    found = valuation.near_duplicates(rows, 0.98)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    cosine = np.triu(unit @ unit.T, 1)
    left, right = np.nonzero(cosine >= 0.98)
    np.testing.assert_array_equal(found.left, left)
    np.testing.assert_array_equal(found.right, right)
    np.testing.assert_allclose(found.similarity, cosine[left, right], atol=1e-6)


def test_copies_are_found_at_a_threshold_of_one(rng):
    """Rounding never hides a copy."""
    rows = rng.normal(size=(300, 70))
    queries = rows[::7] * rng.uniform(0.1, 10, (43, 1))
    found = valuation.near_identical(queries, rows, 1.0)
    np.testing.assert_array_equal(found.right[np.unique(found.left, return_index=True)[1]],
                                  np.arange(300)[::7])  # fmt: skip


def test_groups_are_what_pairs_join(rng):
    """a–b and b–c make one group though a–c is no pair."""
    angle = np.deg2rad([0, 5, 10, 90, 180])
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    pairs = valuation.near_duplicates(rows, np.cos(np.deg2rad(6)))
    assert list(zip(pairs.left, pairs.right, strict=True)) == [(0, 1), (1, 2)]
    group = components(5, pairs)
    assert group[0] == group[1] == group[2] and len(set(group)) == 3


def test_a_threshold_that_is_no_cosine_is_refused():
    with pytest.raises(DataError, match="no cosine"):
        valuation.near_duplicates(np.ones((2, 2)), 1.5)


@dataclass(frozen=True)
class Planted:
    """Digits with faults at known places, indexed."""

    run: tda.Run
    copies: dict[int, int]  # index of the copy -> of the original
    relabelled: dict[int, int]
    wrong: np.ndarray
    truth: np.ndarray


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:420] / 16).float(), torch.tensor(labels[:420])
    truth = y.numpy().copy()
    wrong = np.zeros(420, bool)
    wrong[10:400:20] = True
    y[torch.from_numpy(wrong)] = (y[torch.from_numpy(wrong)] + 3) % 10
    copies = {400: 0, 401: 0, 402: 1, 403: 2, 404: 3}
    relabelled = {410: 4, 411: 5}
    for copy, original in {**copies, **relabelled}.items():
        x[copy], y[copy], truth[copy] = x[original], y[original], truth[original]
    x[403] += 0.002 * torch.randn(64)
    for copy in relabelled:
        y[copy], wrong[copy] = (y[copy] + 1) % 10, True
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    weights = list(model.parameters())
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        with torch.no_grad():
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight -= 0.5 * slope
    task = tda.Task(model, checkpoints=[model.state_dict()], measurement="cross_entropy")
    path = tmp_path_factory.mktemp("planted") / "run"
    run = tda.index(task, (x, y), path, proj_dim=512, progress=False)
    queries = torch.tensor(images[1000:1020] / 16).float()
    targets = torch.tensor(labels[1000:1020])
    queries[:3], targets[:3] = x[20:23], y[20:23]
    queries[3], targets[3] = x[24] + 0.002 * torch.randn(64), y[24]
    run.add_queries((queries, targets), "test")
    return Planted(run, copies, relabelled, wrong, truth)


def test_planted_copies_are_found_and_nothing_else(planted):
    """Exact, nearly exact, and exact with another label; each group keeps its first."""
    found = valuation.duplicates(planted.run)
    every = {**planted.copies, **planted.relabelled}
    assert set(found.redundant) == set(every)
    kept = dict(zip(found.member.tolist(), found.representative.tolist(), strict=True))
    assert {copy: kept[copy] for copy in every} == every
    assert set(found.member[found.conflicting]) == {4, 5, 410, 411}
    exact = set(found.pairs.right[found.pairs.exact].tolist())
    assert exact == set(planted.copies) - {403}


def test_leaked_queries_are_found_and_nothing_else(planted):
    found = valuation.leakage(planted.run, "test")
    assert found.pairs.left.tolist() == [0, 1, 2, 3]
    assert found.pairs.right.tolist() == [20, 21, 22, 24]
    assert found.pairs.exact.tolist() == [True, True, True, False]
    assert found.share == pytest.approx(4 / 20)


def test_planted_wrong_labels_come_first_with_the_right_one_suggested(planted):
    found = valuation.mislabelled_in(planted.run)
    assert roc_auc_score(planted.wrong, found.score) > 0.95
    flagged = found.flagged
    assert planted.wrong[flagged].mean() > 0.8 and flagged[planted.wrong].mean() > 0.6
    right = found.suggested[flagged & planted.wrong] == planted.truth[flagged & planted.wrong]
    assert right.mean() > 0.9
    assert (np.diff(found.score[found.order]) <= 0).all()


def test_knn_shapley_of_a_run_is_that_of_its_embeddings(planted):
    found = valuation.knn_shapley_of(planted.run, "test", k=5)
    assert found.value.shape == (420,) and found.ids is not None
    assert found.value.sum() == pytest.approx(found.utility)
    clean = found.value[:400][~planted.wrong[:400]].mean()
    assert found.value[planted.wrong].mean() < clean


# ---- wrong labels


def long_tailed(rng, separation: float, hidden: bool = False):
    """Gaussian classes of very different sizes, 5 % of labels wrong; hidden: two inside others."""
    centres = rng.normal(size=(len(SIZES), 20))
    centres *= separation / np.linalg.norm(centres, axis=1, keepdims=True)
    if hidden:
        centres[5], centres[6] = centres[0], centres[1]
    truth = np.repeat(np.arange(len(SIZES)), SIZES)
    rows = centres[truth] + rng.normal(size=(len(truth), 20))
    wrong = rng.random(len(truth)) < 0.05
    given = np.where(wrong, (truth + rng.integers(1, len(SIZES), len(truth))) % len(SIZES), truth)
    return rows, truth, given, wrong


@pytest.mark.parametrize("hidden", [False, True], ids=["apart", "inside frequent ones"])
def test_rare_classes_are_not_flagged_wholesale(rng, hidden):
    """In each class, however rare and even where it lies inside a frequent one, few false flags."""
    shares = []
    for _ in range(3):
        rows, truth, given, wrong = long_tailed(rng, 6, hidden)
        flagged = valuation.mislabelled(given, valuation.neighbours(rows, 15)).flagged & ~wrong
        shares.append([flagged[truth == c].mean() for c in range(len(SIZES))])
    assert np.mean(shares, axis=0).max() < 0.05


def test_wrong_labels_of_a_long_tail_are_found_and_mended(rng):
    rows, truth, given, wrong = long_tailed(rng, 6)
    found = valuation.mislabelled(given, valuation.neighbours(rows, 15))
    assert found.flagged[wrong].mean() > 0.9
    assert wrong[found.flagged].mean() > 0.9
    both = found.flagged & wrong
    assert (found.suggested[both] == truth[both]).mean() > 0.95


def test_clean_labels_are_left_alone(rng):
    rows, truth, _, _ = long_tailed(rng, 6)
    assert valuation.mislabelled(truth, valuation.neighbours(rows, 15)).flagged.mean() < 0.005


def test_self_influence_orders_the_flagged_but_flags_nobody(rng):
    rows, _, given, wrong = long_tailed(rng, 6)
    near = valuation.neighbours(rows, 15)
    weight = rng.random(len(given))
    plain, ordered = (valuation.mislabelled(given, near, w) for w in (None, weight))
    np.testing.assert_array_equal(plain.flagged, ordered.flagged)
    heaviest = np.argmax(np.where(wrong, weight, 0))
    assert ordered.score[ordered.flagged].min() >= 1 > ordered.score[~ordered.flagged].max()
    assert list(ordered.order).index(heaviest) < len(ordered.order) / 2


def test_neighbours_are_scikit_learns_without_the_example_itself(rng):
    rows = rng.normal(size=(200, 5))
    rows[50:70] = rows[50]  # more copies than neighbours
    found = valuation.neighbours(rows, 6)
    expected, _ = NearestNeighbors(n_neighbors=7, metric="cosine").fit(rows).kneighbors(rows)
    np.testing.assert_allclose(1 - found.similarity, expected[:, 1:], atol=1e-6)
    assert (found.indices != np.arange(200)[:, None]).all()


def clusters(rng, n: int = 4000, dim: int = 8) -> np.ndarray:
    return rng.normal(size=(40, dim))[rng.integers(0, 40, n)] + 0.1 * rng.normal(size=(n, dim))


def test_an_approximate_search_tells_what_it_misses(rng, monkeypatch):
    """Beyond EXACT: recall is the true share (here, of all examples, in float64) to ± .05."""
    rows = clusters(rng)
    exact = valuation.neighbours(rows, 10)
    monkeypatch.setattr(nearest, "EXACT", 1)
    monkeypatch.setattr(nearest, "SCANNED", 1)
    found = valuation.neighbours(rows, 10)
    assert exact.recall == 1
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.testing.assert_allclose(
        found.similarity, np.take_along_axis(cosine, found.indices.astype(int), 1), atol=1e-6
    )
    np.fill_diagonal(cosine, -2)
    least = np.sort(cosine, axis=1)[:, -10]
    share = (found.similarity >= least[:, None] - 1e-6).mean()
    assert share > 0.8 and found.recall == pytest.approx(share, abs=0.05)
    assert (found.indices >= 0).all() and (found.indices != np.arange(4000)[:, None]).all()


def test_an_approximate_search_finds_the_same_faults(planted, monkeypatch):
    """Equal content always; the rest of so small a set as well, as it lies in few cells."""
    exact = valuation.duplicates(planted.run), valuation.leakage(planted.run, "test")
    monkeypatch.setattr(nearest, "EXACT", 1)
    found = valuation.duplicates(planted.run), valuation.leakage(planted.run, "test")
    for one, other in zip(exact, found, strict=True):
        np.testing.assert_array_equal(one.pairs.left, other.pairs.left)
        np.testing.assert_array_equal(one.pairs.right, other.pairs.right)
    assert 0.5 < found[0].pairs.recall <= 1


def test_no_cell_with_too_few_examples_shortens_an_answer(rng, monkeypatch):
    """Far fewer in the cells looked into than are asked for: those are searched exactly."""
    for limit in ("EXACT", "SCANNED", "PROBES"):
        monkeypatch.setattr(nearest, limit, 1)
    found = valuation.neighbours(clusters(rng, 1200), 60)
    assert (found.indices >= 0).all() and np.isfinite(found.similarity).all()


def test_votes_are_shares_of_neighbours():
    near = valuation.neighbours(np.array([[1, 0], [1, 0.1], [1, 0.2], [0, 1]]), 2)
    own, strongest, other = tally(np.array([1, 0, 1, 0]), 2, near)
    np.testing.assert_allclose(own, [0.5, 0, 0.5, 0.5])
    np.testing.assert_allclose(other, [0.5, 1, 0.5, 0.5])
    assert strongest.tolist() == [0, 1, 0, 1]


def test_votes_do_not_depend_on_how_many_are_counted_at_a_time(rng, monkeypatch):
    near = valuation.neighbours(rng.normal(size=(500, 4)), 15)
    code = rng.integers(0, 7, 500)
    whole = tally(code, 7, near)
    monkeypatch.setattr(faults, "_VOTES", 100)
    for one, other in zip(whole, tally(code, 7, near), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradient_neighbours_are_the_largest_absolute_cosines(planted):
    table = planted.run.store.table("train")
    rows = table.rows(0, 0, 420).double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = np.abs(unit @ unit.T)
    np.fill_diagonal(cosine, -1)
    found = gradient_neighbours(table, 5)
    np.testing.assert_allclose(found.similarity, -np.sort(-cosine, axis=1)[:, :5], atol=1e-5)


# ---- outliers, inert


def test_outliers_are_far_for_their_own_class(rng):
    """A wide class is not an outlier among narrow ones; planted strangers are."""
    label = np.repeat([0, 1], 300)
    rows = np.concatenate([
        [10, 0, 0] + 0.1 * rng.normal(size=(300, 3)), [0, 10, 0] + 3 * rng.normal(size=(300, 3))
    ])  # fmt: skip
    rows[:3] = [[5, 5, 8], [5, -6, 8], [-3, 2, -9]]
    found = valuation.outliers(valuation.neighbours(rows, 5), label)
    assert found[:3].all() and found[3:300].mean() < 0.05 and found[300:].mean() < 0.1
    without = valuation.outliers(valuation.neighbours(rows, 5))
    assert not without[:3].any()  # near enough for the wide class


def test_inert_examples_hold_no_more_than_the_share_together(rng):
    weights = np.concatenate([rng.normal(size=500), 1e-6 * rng.normal(size=100)])
    found = valuation.inert(weights)
    assert found[500:].all()
    assert np.abs(weights[found]).sum() <= 0.001 * np.abs(weights).sum()
    heavier = np.sort(np.abs(weights[~found]))[0]
    assert np.abs(weights[found]).sum() + heavier > 0.001 * np.abs(weights).sum()
    assert valuation.inert(np.zeros(4)).all() and not valuation.inert(np.ones(4)).any()


def test_labels_that_are_no_classes_are_refused(rng):
    near = valuation.neighbours(rng.normal(size=(20, 3)), 15)
    with pytest.raises(DataError, match="no classes"):
        valuation.mislabelled(rng.normal(size=20), near)
