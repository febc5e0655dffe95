"""Values from scores: what they are, and that their p-values mean what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from memory_store import MemoryTable, make_store
from scipy import stats

import tda
from tda import scorer, valuation
from tda.errors import DataError, MismatchError
from tda.gradients import Dense
from tda.run import Run
from tda.valuation.influence import projection_parts
from tda.valuation.significance import false_discovery_rates, significance_of


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def run_of(path: Path, steps=(1, 2), projection=None, **shape) -> Run:
    """A run over a store in memory, whose checkpoints were saved at ``steps``."""
    store = make_store(path, num_checkpoints=len(steps), **shape)
    for record, step in zip(store.manifest["checkpoints"], steps, strict=True):
        record["step"] = step
    store.manifest["projection"] = projection or {"kind": "identity", "dim": 12}
    asked = np.zeros((store.queries.num_rows, 16))
    return with_queries(Run(store), digest=asked)  # type: ignore[arg-type]


def with_queries(run: Run, **columns: np.ndarray) -> Run:
    table = run.store.table("queries/q")
    told = replace(table, columns={**table.columns, **columns})
    return Run(replace(run.store, tables={**run.store.tables, "queries/q": told}))


# ---- significance


@pytest.mark.parametrize("count", [2, 3, 8])
def test_p_is_uniform_where_there_is_no_effect(rng, count):
    """P(p < u) = u: half of all values have p < ½, 5 % have p < .05; whatever their scale."""
    scale = np.exp(rng.normal(size=20_000))
    p = significance_of(scale * rng.normal(size=(count, 20_000))).p
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_p_is_uniform_where_replicates_share_a_projection(rng):
    """Noise of a projection common to all replicates, measured by 16 parts, is accounted for."""
    parts = rng.normal(size=(16, 20_000))
    replicates = parts.sum(0) + 3 * rng.normal(size=(8, 20_000))
    p = significance_of(replicates, parts + (replicates.mean(0) - parts.sum(0)) / 16).p
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.01)
    assert np.mean(significance_of(replicates).p < 0.05) > 0.5  # had it been left out


def test_power_grows_with_replicates(rng):
    """A true effect of σ/2 is found almost always with 100 replicates: errors fall as 1/√R."""
    draws = 0.5 + rng.normal(size=(100, 2000))
    found = [np.mean(significance_of(draws[:count]).p < 0.05) for count in (3, 10, 30, 100)]
    assert found == sorted(found)
    assert found[0] < 0.2 and found[-1] > 0.99
    wide = np.median(significance_of(draws[:25]).standard_error)
    assert np.median(significance_of(draws).standard_error) == pytest.approx(wide / 2, rel=0.1)


def test_interval_covers_the_true_value_19_times_of_20(rng):
    draws = 2.0 + rng.normal(size=(5, 20_000))
    found = significance_of(draws)
    assert np.mean((found.low <= 2) & (found.high >= 2)) == pytest.approx(0.95, abs=0.01)


def test_t_test_is_scipys(rng):
    draws = rng.normal(size=(6, 50)) + 0.3
    np.testing.assert_allclose(significance_of(draws).p, stats.ttest_1samp(draws, 0).pvalue)


def test_false_discoveries_are_rare_among_those_called_reliable(rng):
    """Of 200 effects and 1,800 nothings, at most 5 % of those called are nothings (on average)."""
    wrong, called = 0, 0
    for _ in range(20):
        draws = rng.normal(size=(8, 2000))
        draws[:, :200] += 3
        reliable = significance_of(draws).reliable
        wrong, called = wrong + reliable[200:].sum(), called + reliable.sum()
    assert called > 20 * 150
    assert wrong / called < 0.06


def test_q_is_p_times_number_over_rank_by_hand():
    """p = .01, .02, .03, .5: ·4/rank = .04, .04, .04, .5; what is no test stays out."""
    q = false_discovery_rates(np.array([[0.5, 0.01], [np.nan, 0.03], [0.02, np.nan]]))
    np.testing.assert_allclose(q, [[0.5, 0.04], [np.nan, 0.04], [0.04, np.nan]])


def test_one_replicate_tells_nothing_and_copies_no_more():
    one = significance_of(np.array([[2.0, 0.0]]))
    copies = significance_of(np.array([[2.0, 0.0]] * 3))
    assert np.isnan(one.p).all() and not one.reliable.any()
    assert np.isnan(copies.p[0]) and copies.p[1] == 1 and not copies.reliable.any()


def test_checkpoints_of_one_training_have_no_p(tmp_path, rng):
    """They share the training's own noise: the t-test calls most nothings effects, so none is made.

    Were they independent, 5 % would be called; here it is four of five, and the interval that is
    shown as a lower bound is indeed too short for most.
    """
    drawn = rng.normal(size=(1, 4000)) + 0.1 * rng.normal(size=(5, 4000))
    assert np.mean(significance_of(drawn).p < 0.05) > 0.8
    found = significance_of(drawn, independent=False)
    assert np.isnan(found.p).all() and np.isnan(found.q).all() and not found.reliable.any()
    assert np.mean((found.low <= 0) & (found.high >= 0)) < 0.2
    values = valuation.values(run_of(tmp_path, steps=(1, 2, 3)), "q")
    groups = valuation.roll_up(values, np.arange(40) % 3)
    for tested in (values.significance, groups.total, groups.interaction):
        assert np.isnan(tested.p).all() and np.isfinite(tested.standard_error).all()


# ---- values


@pytest.mark.parametrize("recipe", ["grad_dot", "influence", "trak", "tracin", "grad_cos"])
def test_value_is_the_sum_of_scores_over_queries(tmp_path, recipe):
    run = run_of(tmp_path)
    prepared = scorer.prepare(run.store, tda.RECIPES[recipe], run.store.table("queries/q"))
    scores = scorer.scores(prepared).compute()
    found = valuation.values(run, "q", recipe)
    np.testing.assert_allclose(found.value[0], scores.sum(0), rtol=2e-5, atol=1e-6)
    assert found.value.shape == (1, 40) and found.num_queries.tolist() == [6]


def test_slices_add_up_to_the_whole(tmp_path):
    """Additive over queries, by a column of the query set, by names, and by a Python slice."""
    labels = np.array([1, 0, 1, 2, 0, 1])
    run = with_queries(run_of(tmp_path), label=labels)
    whole, by_label = valuation.values(run, "q"), valuation.values(run, "q", by="label")
    assert by_label.slices == ("0.0", "1.0", "2.0") and by_label.num_queries.tolist() == [2, 3, 1]
    np.testing.assert_allclose(by_label.value.sum(0), whole.value[0], atol=1e-12)
    np.testing.assert_allclose(
        valuation.values(run, "q", by=labels.astype(str)).value, by_label.value
    )
    halves = [valuation.values(run, "q", by=some).value for some in (slice(0, 2), slice(2, None))]
    np.testing.assert_allclose(sum(halves), whole.value, atol=1e-12)


def test_replicates_of_a_mean_are_the_checkpoints_own_scores(tmp_path):
    run = run_of(tmp_path, steps=(1, 2, 3))
    found = valuation.values(run, "q", "grad_dot")
    train, queries = run.store.table("train"), run.store.table("queries/q")
    for c in range(3):
        t, q = (x.values[c] * -x.columns["slope"][c][:, None] for x in (train, queries))
        np.testing.assert_allclose(found.replicates[c, 0], (q @ t.T).sum(0), rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(found.value, found.replicates.mean(0))


def test_trainings_are_the_replicates_where_steps_begin_again(tmp_path):
    """Steps 1, 2, 1, 2 are two trainings: two replicates, each the value of its own checkpoints."""
    run = run_of(tmp_path, steps=(1, 2, 1, 2))
    found = valuation.values(run, "q", "grad_dot")
    alone = valuation.values(run_of(tmp_path / "b", steps=(1, 2, 3, 4)), "q", "grad_dot")
    assert found.independent and not alone.independent
    pairs = alone.replicates.reshape(2, 2, 1, -1).mean(1)
    np.testing.assert_allclose(found.replicates, pairs)
    np.testing.assert_allclose(found.value, alone.value)
    assert "one training" in alone.verdict and "one training" not in found.verdict


@pytest.mark.parametrize("steps", [(1, 2, 3, 4, 5, 1), (1, 1, 2, 3, 1, 2)])
def test_a_training_counts_once_however_many_its_checkpoints(tmp_path, steps):
    """A replicate is the mean over its training's own checkpoints; the parts are of their mean."""
    sketched = {"kind": "count_sketch", "dim": 32, "seed": 0}
    run = run_of(tmp_path, steps, sketched, dim=32)
    found = valuation.values(run, "q", "grad_dot")
    alone = run_of(tmp_path / "b", range(6), sketched, dim=32)
    own = valuation.values(alone, "q", "grad_dot").replicates
    first = [c for c, step in enumerate(steps) if step == 1]
    means = [group.mean(0) for group in np.split(own, first[1:])]
    np.testing.assert_allclose(found.replicates, means, atol=1e-12)
    np.testing.assert_allclose(found.parts.sum(0), found.value, atol=1e-12)
    some = np.array([39, 0, 7])
    parts = projection_parts(run, "q", tda.RECIPES["grad_dot"], some)
    np.testing.assert_allclose(parts, found.parts[:, 0, some], atol=1e-12)


def test_a_sum_along_one_training_has_no_replicates(tmp_path):
    """TracIn's terms are parts of one path, not repetitions: it says so instead of guessing."""
    found = valuation.values(run_of(tmp_path), "q", "tracin")
    assert found.verdict.startswith("not enough replicates")
    assert not found.reliable.any() and np.isnan(found.significance.standard_error).all()


def test_runs_are_independent_replicates(tmp_path):
    runs = [run_of(tmp_path / str(seed), steps=(1,), seed=seed) for seed in range(3)]
    found = valuation.values(runs, "q")
    singles = [valuation.values(run, "q").value for run in runs]
    np.testing.assert_allclose(found.replicates, singles)
    assert found.independent and "3 of them" in found.covers
    with pytest.raises(MismatchError, match="not of the same training examples"):
        valuation.values([runs[0], run_of(tmp_path / "x", num_train=39)], "q")


def test_a_training_that_several_runs_hold_counts_once(tmp_path):
    """Whatever else is in them: it says nothing of how much a training changes."""
    first, other = (run_of(tmp_path / str(seed), seed=seed) for seed in range(2))
    once, pair = (valuation.values(runs, "q") for runs in (first, [first, other]))
    again, ending = run_of(tmp_path / "again"), run_of(tmp_path / "ending", steps=(2,))
    (record,) = ending.store.manifest["checkpoints"]
    record["digest"] = first.store.manifest["checkpoints"][-1]["digest"]
    for runs, wanted in (
        ([first, again], once),
        ([first, ending, again], once),
        ([first, again, other], pair),
    ):
        found = valuation.values(runs, "q")
        assert found.independent == wanted.independent and found.covers == wanted.covers
        np.testing.assert_array_equal(found.replicates, wanted.replicates)
    assert not once.independent and "2 of them" in pair.covers


def test_runs_of_other_queries_are_not_averaged(tmp_path):
    """One name, but other contents, another number, or other slices: a sum over other queries."""
    labels = np.array([1, 0, 1, 2, 0, 0])
    first = with_queries(run_of(tmp_path / "a"), label=labels)
    for other in (
        with_queries(run_of(tmp_path / "b"), digest=np.eye(6, 16)),
        run_of(tmp_path / "b", num_queries=5),
    ):
        with pytest.raises(MismatchError, match="'q' is not the same") as raised:
            valuation.values([first, other], "q")
        assert str(tmp_path / "b") in raised.value.where
    turned = with_queries(run_of(tmp_path / "b", seed=1), label=labels[::-1])
    assert len(valuation.values([first, turned], "q").replicates) == 2
    with pytest.raises(MismatchError, match="not sliced alike") as raised:
        valuation.values([first, turned], "q", by="label")
    assert raised.value.found == "query 0 in slice '0.0'"


def test_true_effects_are_found_and_others_are_not(tmp_path, rng):
    """Ten trainings whose rows are noise but for five examples that always help."""
    num_train, dim, steps = 60, 8, (1,) * 10
    run = run_of(tmp_path, steps=steps, num_train=num_train, num_queries=4, dim=dim)
    direction = np.ones(dim)
    rows = rng.normal(size=(10, num_train, dim))
    rows[:, :5] += 3 * direction
    queries = direction + 0.1 * rng.normal(size=(10, 4, dim))
    slopes = {"slope": -np.ones((10, num_train)), "curvature": np.ones((10, num_train))}
    asked = {name: column[:, :4] for name, column in slopes.items()}
    tables = {
        "train": MemoryTable("train", rows, slopes),
        "queries/q": MemoryTable("q", queries, asked),
    }
    found = valuation.values(Run(replace(run.store, tables=tables)), "q", "grad_dot")
    assert found.reliable[0, :5].all()
    assert found.reliable[0, 5:].sum() <= 2


@pytest.mark.parametrize("kind", ["rademacher", "count_sketch"])
def test_parts_measure_the_error_of_the_projection(tmp_path, rng, kind):
    """Over many random projections, the scatter of a value is what its parts say it is.

    For dense signs exactly; the count sketch's parts also share out the parameters: ≥, and < 2.
    """
    dim, num_parameters, num_train = 64, 1500, 12
    q, rows = rng.normal(size=num_parameters), rng.normal(size=(num_train, num_parameters))
    q[:200] += 1
    rows[:, :200] += 1
    shapes = {"w": (30, 50)}
    ones = {"slope": -np.ones((1, num_train)), "curvature": np.ones((1, num_train))}
    asked = {name: column[:, :1] for name, column in ones.items()}
    record = {"name": "c", "digest": "", "step": 1, "learning_rate": None}
    values, variances = [], []
    for seed in range(80):
        projector = tda.Projection(kind, dim, seed).bind(shapes)
        sketched = []
        for x in (rows, q[None]):
            buffer = projector.zeros(len(x))
            given = torch.from_numpy(x.reshape(-1, 30, 50)).float()
            projector.add(buffer, "w", [Dense(given)])
            sketched.append(projector.rows(buffer).numpy()[None])
        run = run_of(tmp_path / str(seed), steps=(1,), projection={"kind": kind, "dim": dim})
        run.store.manifest["checkpoints"] = [record]
        tables = {
            "train": MemoryTable("train", sketched[0], ones),
            "queries/q": MemoryTable("q", sketched[1], asked),
        }
        found = valuation.values(Run(replace(run.store, tables=tables)), "q", "grad_dot")
        values.append(found.value[0])
        variances.append(len(found.parts) * found.parts.var(0, ddof=1)[0])
        np.testing.assert_allclose(found.parts.sum(0), found.value)
    ratio = np.mean(variances) / np.mean(np.var(values, axis=0))
    assert 0.8 < ratio < (1.25 if kind == "rademacher" else 2)


def test_parts_of_some_examples_are_those_of_all(tmp_path):
    """…also where the dimensions do not go up evenly in 16 parts."""
    recipe = tda.RECIPES["grad_dot"]
    for dim in (32, 37):
        sketched = {"kind": "count_sketch", "dim": dim, "seed": 0}
        run = run_of(tmp_path / str(dim), projection=sketched, dim=dim)
        some = np.array([39, 0, 7])
        found = projection_parts(run, "q", recipe, some)
        every = valuation.values(run, "q", recipe)
        np.testing.assert_allclose(found, every.parts[:, 0, some], atol=1e-12)
        np.testing.assert_allclose(every.parts.sum(0), every.value, atol=1e-12)


def test_no_parts_where_dimensions_do_not_add_up(tmp_path):
    sketched = {"kind": "count_sketch", "dim": 32, "seed": 0}
    run = run_of(tmp_path, projection=sketched, dim=32)
    assert valuation.values(run, "q", "grad_dot").parts.shape == (16, 1, 40)
    assert valuation.values(run, "q", "influence").parts is None
    assert valuation.values(run, "q", "grad_cos").parts is None


def test_names_that_do_not_match_the_queries_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be sliced"):
        valuation.values(run_of(tmp_path), "q", by=["a", "b"])
    with pytest.raises(DataError, match="holds no query"):
        valuation.values(run_of(tmp_path), "q", by=slice(6, 9))


def test_table_has_one_row_a_slice_and_example(tmp_path, monkeypatch):
    """In the order of the arrays; pandas is asked for only then (here: a stand-in)."""
    from tda.valuation import frames

    monkeypatch.setattr(frames, "partner", lambda *_: SimpleNamespace(DataFrame=dict))
    found = valuation.values(run_of(tmp_path), "q", by=["a", "a", "a", "b", "b", "b"])
    table = found.to_frame()
    assert table["slice"].tolist() == ["a"] * 40 + ["b"] * 40
    np.testing.assert_array_equal(table["value"][40:], found.value[1])
    np.testing.assert_array_equal(table["id"][40:], found.ids)


# ---- groups


def test_a_groups_error_knows_what_its_examples_have_in_common(tmp_path):
    """value(group) is tested on its own sums: equal to the t-test of the summed replicates."""
    run = run_of(tmp_path, steps=(1, 1, 1, 1))
    found = valuation.values(run, "q", "grad_dot")
    source = np.arange(40) % 3
    groups = valuation.roll_up(found, source)
    for g in range(3):
        sums = found.replicates[:, 0, source == g].sum(1)
        assert groups.total.value[0, g] == pytest.approx(sums.mean())
        assert groups.total.p[0, g] == pytest.approx(stats.ttest_1samp(sums, 0).pvalue)
    assert groups.count.tolist() == [14, 13, 13]
    assert groups.total.value.sum() == pytest.approx(found.value.sum())
    assert groups.share_of_absolute.sum() == pytest.approx(1)


def test_interaction_is_what_neither_side_explains():
    """value[slice, group] = a[slice] + b[group] has none; what is added in one cell is found."""
    groups = np.array([0, 0, 1, 1, 1, 2])
    additive = np.array([1.0, 5.0])[:, None] + np.array([0.0, 2.0, -1.0])[groups]
    assert np.allclose(valuation.roll_up(additive, groups).interaction.value, 0)
    additive[0, groups == 2] += 6
    found = valuation.roll_up(additive, groups).interaction.value
    np.testing.assert_allclose(found, [[-1, -1, 2], [1, 1, -2]])
    np.testing.assert_allclose([found.sum(0).max(), found.sum(1).max()], 0, atol=1e-12)


def test_groups_may_be_as_many_as_examples(rng):
    """A million annotators of one example each: memory is that of the values, not n × groups."""
    values = rng.normal(size=300_000)
    groups = valuation.roll_up(values, np.arange(300_000)[::-1])
    np.testing.assert_array_equal(groups.total.value[0], values[::-1])


def test_concentration_at_its_ends_and_by_hand():
    """Equal: 0; one has all: 1 − 1/n; 1, 2, 3 of either sign: Gini 2/9."""
    equal, one = valuation.concentration(np.ones(200)), valuation.concentration(np.eye(200)[3])
    assert equal.gini == pytest.approx(0) and one.gini == pytest.approx(1 - 1 / 200)
    assert equal.effective == pytest.approx(200) and one.effective == pytest.approx(1)
    assert equal.top_1_percent == pytest.approx(0.01) and one.top_1_percent == 1
    assert valuation.concentration(np.array([-3.0, 1, 2])).gini == pytest.approx(2 / 9)
    assert valuation.concentration(np.zeros(5)).gini == pytest.approx(0)


def test_groups_must_match_the_examples():
    with pytest.raises(DataError, match="groups do not match"):
        valuation.roll_up(np.zeros(5), ["a"] * 4)
