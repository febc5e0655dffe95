"""Metrics against retraining: the figures, what they must not depend on, and their intervals."""

from __future__ import annotations

import math

import dask.array as da
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score

from tda.errors import ConfigError, DataError
from tda.evaluate import (
    Design,
    GroundTruth,
    curve,
    found_at,
    intervals,
    lds,
    lds_of_queries,
    leave_one_out_correlation,
    mislabel_auc,
    noise_ceiling,
    removal_design,
    stability,
)

NUM_TRAIN, NUM_QUERIES = 30, 6


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def few_draws(monkeypatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 120)


def made(rng, scores, *, num_subsets=24, num_seeds=2, noise=0.0, design=None) -> GroundTruth:
    """A world where outputs are the sums of the scores, and noise."""
    design = design or Design(num_subsets=num_subsets)
    masks = design.masks(scores.shape[1])
    sums = masks.astype(float) @ scores.T
    shape = (len(masks), num_seeds, len(scores))
    return GroundTruth(masks, sums[:, None] + noise * rng.normal(size=shape))


# ---- LDS


def test_true_datamodel_scores_one(rng):
    scores = rng.normal(size=(NUM_QUERIES, NUM_TRAIN))
    found = lds(scores, made(rng, scores))
    assert found.value == pytest.approx(1, abs=1e-12)
    assert lds(-scores, made(rng, scores)).value == pytest.approx(-1, abs=1e-12)
    assert found.high <= 1


def test_lds_by_hand():
    """Sums 1+2, 1+4, 2+4 = 3, 5, 6 against outputs 10, 30, 20: d = 0, 1, 1 → 1 − 6·2/(3·8) = ½."""
    masks = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], np.uint8)
    outputs = np.array([[9.0, 11.0], [31.0, 29.0], [20.0, 20.0]])[:, :, None]
    truth = GroundTruth(masks, outputs)
    assert lds_of_queries(np.array([[1.0, 2.0, 4.0]]), truth)[0] == pytest.approx(0.5)


def test_lds_is_scipys_spearman_query_by_query(rng):
    scores = rng.integers(-2, 3, (NUM_QUERIES, NUM_TRAIN)).astype(float)  # many ties
    truth = made(rng, scores, noise=3)
    outputs = GroundTruth(truth.masks, np.round(truth.outputs))
    expected = [
        spearmanr(truth.masks @ scores[q], outputs.mean[:, q])[0] for q in range(NUM_QUERIES)
    ]
    np.testing.assert_allclose(lds_of_queries(scores, outputs), expected, atol=1e-12)
    assert lds(scores, outputs).value == pytest.approx(np.mean(expected))


def test_a_query_about_which_nothing_is_said_counts_zero(rng):
    scores = rng.normal(size=(2, NUM_TRAIN))
    truth = made(rng, scores)
    for nothing in (0, 0.1, -1 / 3):  # rounding of a sum must not rank equal scores
        scores[1] = nothing
        np.testing.assert_allclose(lds_of_queries(scores, truth), [1, 0], atol=1e-12)


def test_lds_ignores_scale_and_shift_of_every_query(rng):
    scores = rng.normal(size=(NUM_QUERIES, NUM_TRAIN))
    truth = made(rng, scores, noise=2)
    scale = 2.0 ** rng.integers(-40, 40, (NUM_QUERIES, 1))
    assert lds(scores * scale, truth) == lds(scores, truth)
    shifted = scores + rng.integers(-3, 4, (NUM_QUERIES, 1))  # halves are all of one size
    np.testing.assert_allclose(lds_of_queries(shifted, truth), lds_of_queries(scores, truth))


def test_a_dask_matrix_gives_the_figure_of_an_array(rng):
    scores = rng.normal(size=(NUM_QUERIES, NUM_TRAIN)).astype("f4")
    truth = made(rng, scores, noise=2)
    assert lds(da.from_array(scores, chunks=(4, 7)), truth) == lds(scores, truth)


@pytest.mark.parametrize("spoiled", ["shape", "nan"])
def test_scores_of_something_else_are_refused(rng, spoiled):
    scores = rng.normal(size=(NUM_QUERIES, NUM_TRAIN))
    truth = made(rng, scores)
    given = scores[:, 1:] if spoiled == "shape" else np.where(scores > 1, np.nan, scores)
    with pytest.raises(DataError):
        lds(given, truth)


# ---- intervals


def test_ranks_of_a_resample_are_scipys(rng):
    left, right = rng.integers(0, 5, (20, 4)), rng.normal(size=(20, 4))
    picked = rng.integers(0, 20, 20)
    counts = np.bincount(picked, minlength=20).astype(float)
    expected = [spearmanr(left[picked, q], right[picked, q])[0] for q in range(4)]
    np.testing.assert_allclose(intervals.spearman_of(left, right)(counts), expected, atol=1e-12)
    expected = [pearsonr(left[picked, q], right[picked, q])[0] for q in range(4)]
    np.testing.assert_allclose(intervals.pearson_of(left, right)(counts), expected, atol=1e-12)


def correlated(rng, rho, num_subsets, num_queries, shared):
    """Gaussian pairs of correlation rho, part of it shared by the queries of a subset."""

    def draw():
        common = rng.normal(size=(num_subsets, 1))
        own = rng.normal(size=(num_subsets, num_queries))
        return math.sqrt(shared) * common + math.sqrt(1 - shared) * own

    left = draw()
    return left, rho * left + math.sqrt(1 - rho**2) * draw()


@pytest.mark.parametrize(("rho", "shared"), [(0.0, 0.5), (0.8, 0.2)])
def test_intervals_hold_the_truth(rng, few_draws, rho, shared):
    """Spearman's ρ of a Gaussian pair is 6/π·asin(ρ/2): in at least 90 % of 60 experiments."""
    truth = 6 / math.pi * math.asin(rho / 2)
    hits = 0
    for seed in range(60):
        left, right = correlated(rng, rho, 40, 10, shared)
        found = intervals.two_way(intervals.spearman_of(left, right), 40, 10, seed)
        hits += found.low <= truth <= found.high
    assert hits >= 54


def test_shuffled_outputs_have_an_interval_around_zero(rng, few_draws):
    """Which subset had which outputs, at random: the null is 0. In at least 90 % of 60 draws."""
    scores = rng.normal(size=(10, NUM_TRAIN)) + rng.normal(size=NUM_TRAIN)
    truth = made(rng, scores, num_subsets=40, noise=1)
    found = [
        lds(scores, GroundTruth(truth.masks, truth.outputs[rng.permutation(40)])) for _ in range(60)
    ]
    assert sum(each.low <= 0 <= each.high for each in found) >= 54


def test_intervals_shrink_with_the_data_and_repeat(rng):
    widths = []
    for size in (20, 320):
        left, right = correlated(rng, 0.5, size, 5, 0.3)
        statistic = intervals.spearman_of(left, right)
        found = intervals.two_way(statistic, size, 5)
        assert found == intervals.two_way(statistic, size, 5)
        widths.append(found.high - found.low)
    assert widths[1] < 0.5 * widths[0]


def test_noise_ceiling_is_the_lds_of_the_expected_outputs(rng):
    scores = rng.normal(size=(20, NUM_TRAIN))
    truth = made(rng, scores, num_subsets=400, num_seeds=2, noise=4)
    ceiling = noise_ceiling(truth)
    assert ceiling is not None
    reached = lds(scores, truth).value
    assert 0.3 < reached < 0.9
    assert ceiling.value == pytest.approx(reached, abs=0.02)
    assert ceiling.low < reached < ceiling.high


def test_noise_ceiling_of_identical_seeds_is_one_and_of_one_seed_unknown(rng):
    scores = rng.normal(size=(3, NUM_TRAIN))
    ceiling = noise_ceiling(made(rng, scores, num_seeds=3))
    assert ceiling is not None
    assert ceiling.value == pytest.approx(1)
    assert noise_ceiling(made(rng, scores, num_seeds=1)) is None


# ---- leave-one-out, curves, labels, stability


def test_leave_one_out_is_pearson_of_scores_and_effects(rng):
    scores = rng.normal(size=(3, NUM_TRAIN))
    design = Design(kind="leave_one_out", num_subsets=20)
    truth = made(rng, scores, noise=0.5, design=design)
    left_out = (truth.masks == 0).argmax(1)
    effects = scores.sum(1) - truth.mean
    expected = [pearsonr(scores[q, left_out], effects[:, q])[0] for q in range(3)]
    assert leave_one_out_correlation(scores, truth).value == pytest.approx(np.mean(expected))
    with pytest.raises(DataError, match="single examples"):
        leave_one_out_correlation(scores, made(rng, scores))


def test_removing_what_helps_most_makes_the_lowest_curve(rng):
    scores = rng.normal(size=(NUM_QUERIES, NUM_TRAIN))
    total, shares = scores.mean(0), (0, 0.2, 0.5)

    def heights(values, shares=shares, **options):
        design = removal_design(values, shares, **options)
        return [e.value for e in curve(made(rng, scores, design=design))]

    best, chance = heights(total), heights(rng.permutation(total))
    assert best[0] == pytest.approx(chance[0]) == pytest.approx(scores.sum(1).mean())
    assert best[0] > best[1] > best[2]
    assert best[1] < chance[1]
    assert heights(-total, [0.5])[0] == pytest.approx(heights(total, [0.5], keep=True)[0])


def test_equal_values_are_taken_by_index():
    assert removal_design(np.array([1.0, 2.0, 2.0, 1.0]), [0.5, 0.75]).left_out == (
        (1, 2),
        (0, 1, 2),
    )
    assert found_at(np.zeros(4), np.array([1, 0, 0, 1]), 0.5).value == 0.5


def test_mislabel_figures(rng, few_draws):
    wrong = rng.random(200) < 0.2
    values = np.round(wrong + rng.normal(size=200), 1)
    auc = mislabel_auc(values, wrong)
    assert auc.value == pytest.approx(roc_auc_score(wrong, values))
    assert auc.low < auc.value < auc.high
    assert mislabel_auc(3 * values, wrong) == auc
    assert mislabel_auc(wrong.astype(float), wrong).value == 1
    top = np.argsort(-values, kind="stable")[:20]
    assert found_at(values, wrong, 0.1).value == pytest.approx(wrong[top].sum() / wrong.sum())
    with pytest.raises(DataError):
        mislabel_auc(values, np.zeros(200))


def test_stability_by_hand(rng):
    a, b = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[4.0, 2.0, 3.0, 1.0]])
    found = stability([a, b], k=2)
    assert found.rank_correlation.value == pytest.approx(0.8)  # 1 − 6·2/(4·15)
    assert found.top_k_jaccard.value == pytest.approx(1 / 3)
    scores = rng.normal(size=(5, NUM_TRAIN))
    same = stability([scores, 7 * scores, scores])
    assert same.rank_correlation.value == same.top_k_jaccard.value == pytest.approx(1)
    with pytest.raises(DataError):
        stability([scores])


# ---- designs


def test_masks_follow_from_the_design():
    half = Design(num_subsets=5).masks(31)
    assert half.dtype == np.uint8
    np.testing.assert_array_equal(half, Design(num_subsets=5).masks(31))
    np.testing.assert_array_equal(half, Design(num_subsets=9).masks(31)[:5])
    assert not np.array_equal(half, Design(num_subsets=5, draw=1).masks(31))
    assert set((half == 0).sum(1)) == {16}
    assert len(np.unique(half, axis=0)) == 5
    removal = Design(kind="removal", fraction=0.1, num_subsets=4).masks(50)
    assert set((removal == 0).sum(1)) == {5}
    left = Design(kind="leave_one_out", num_subsets=12).masks(12)
    np.testing.assert_array_equal(np.sort((left == 0).argmax(1)), np.arange(12))
    np.testing.assert_array_equal((left == 0).sum(1), 1)
    given = Design.given([[2, 0], []]).masks(3)
    np.testing.assert_array_equal(given, [[0, 1, 0], [1, 1, 1]])


def test_seeds_of_half_subsets_differ_and_those_of_removal_do_not():
    half, removal = Design(seeds=(0, 1)), Design(kind="removal", seeds=(0, 7))
    assert len({half.seed(s, k) for s in range(20) for k in range(2)}) == 40
    assert {removal.seed(s, 1) for s in range(20)} == {7}


@pytest.mark.parametrize("design", [Design(), Design.given([[1], [0, 2]], seeds=(3, 4))])
def test_a_design_survives_json(design):
    assert Design.parse(design.spec()) == design


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("kind", {"kind": "quarter"}),
        ("num_subsets", {"num_subsets": 0}),
        ("fraction", {"fraction": 1.0}),
        ("fraction", {"kind": "leave_one_out", "fraction": 0.1}),
        ("seeds", {"seeds": ()}),
        ("seeds", {"seeds": (1, 1)}),
        ("left_out", {"kind": "given"}),
    ],
)
def test_a_wrong_design_names_its_field(field, options):
    with pytest.raises(ConfigError) as caught:
        Design(**options)
    assert caught.value.where == f"Design.{field}"


@pytest.mark.parametrize(
    "design",
    [Design(kind="leave_one_out", num_subsets=11), Design.given([[10]]), Design.given([range(10)])],
)
def test_a_design_that_does_not_fit_the_data_is_refused(design):
    with pytest.raises(ConfigError):
        design.masks(10)
