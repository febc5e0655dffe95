"""What the page proposes, how far it says to trust it, and what removal is foretold to do."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from report_run import FakeRun, Page, digits_run, fake_find, numbers_of

from tda.evaluate.intervals import Estimate
from tda.evaluate.record import GroundTruth
from tda.report import collect, render, summarise
from tda.report.actions import as_csv, propose
from tda.report.data import Values
from tda.report.findings import Checked, Findings
from tda.report.removal import FRACTIONS, Measured, class_balance, losses, measured_in
from tda.report.trust import LARGE, NOT, PLAUSIBLE, RELIABLE, judge
from tda.valuation import DuplicateGroups, Leakage, significance_of
from tda.valuation.duplicates import Pairs


@pytest.fixture(scope="module", autouse=True)
def _found() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr("tda.report.gather.find", fake_find)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return digits_run(tmp_path_factory.mktemp("digits_run"))


# ---- decisions


def test_the_intervals_of_the_tables_are_those_of_the_replicates_per_query(run):
    """low, high = t-interval of Σ_q score / num_queries, of every value and of every roll-up."""
    data = collect(run)
    given = fake_find(run, "test", None, run.itself).values.replicates[:, 0] / 40
    whole = significance_of(given)
    for scored in (*data.valuable, *data.harmful):
        i = scored.example.index
        assert (scored.low, scored.high) == pytest.approx((whole.low[i], whole.high[i]))
        assert scored.low <= scored.score <= scored.high
    source = run.store.table("train").column("source")
    (rollup,) = [r for r in data.rollups if r.column == "source"]
    for part in rollup.slices:
        mine = significance_of(given[:, source == part.name].mean(1))
        assert (part.low, part.high) == pytest.approx((float(mine.low), float(mine.high)))


def test_every_example_has_one_action_and_all_its_reasons():
    """A leaked copy is removed once; a copy under another label is looked at; the rest kept."""
    ids, asked = np.array([f"t{i}" for i in range(6)]), np.array(["q0", "q1"])
    one = np.ones(2)
    pairs = Pairs(np.array([0, 2]), np.array([1, 3]), one, one, one > 0, one > 0)
    copies = DuplicateGroups(
        np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1]), np.array([0, 0, 2, 2]),
        np.array([False, False, True, True]), ids, pairs,
    )  # fmt: skip
    leaks = Pairs(np.array([1]), np.array([1]), one[:1], one[:1], one[:1] > 0, one[:1] > 0)
    found = Findings(copies=copies, leakage=Leakage(leaks, asked, ids, 2))
    actions = propose(Values(np.zeros(6)), found, ids, asked)
    assert [(a.index, a.action) for a in actions] == [(1, "remove"), (2, "review"), (3, "review")]
    assert actions[0].notes == ("copy of query q1", "copy of t0")


def test_equal_inputs_under_several_labels_are_called_so_and_not_near(run):
    data = collect(run)
    leaks = [replace(leak, exact=False, same_input=True) for leak in data.decisions.leaks]
    data = replace(data, decisions=replace(data.decisions, leaks=tuple(leaks), copies=()))
    text = Page(render(data)).text
    assert "equal inputs" in text and "Near: the model" not in text
    assert summarise(data)["decisions"]["leaks"][0]["same_input"]


@pytest.mark.parametrize(("independent", "proposed"), [(True, [(3, "remove")]), (False, [])])
def test_harm_is_acted_on_only_where_trainings_are_independent(independent, proposed):
    replicates = np.random.default_rng(0).normal(size=(6, 40)) * 0.01
    replicates[:, 3] -= 5
    sure = significance_of(replicates, independent=independent)
    values = Values(replicates.mean(0), sure=sure, num_replicates=6, independent=independent)
    ids = np.arange(40).astype(str)
    assert [(a.index, a.action) for a in propose(values, Findings(), ids, ids)] == proposed


def test_no_cell_of_the_actions_is_a_formula():
    ids = np.array(["=cmd|' /C calc'!A0", "+1", "@x", "-2", "ok"])
    one = np.ones(4)
    pairs = Pairs(np.zeros(4, int), np.arange(1, 5), one, one, one > 0, one > 0)
    group = DuplicateGroups(
        np.arange(5), np.zeros(5, int), np.zeros(5, int), np.zeros(5) > 0, ids, pairs
    )
    values = Values(np.zeros(5))
    text = as_csv(propose(values, Findings(copies=group), ids, ids), values, {"id": ids})
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["id"] for row in rows] == ["'+1", "'@x", "'-2", "ok"]
    assert all(row["note"] == f"copy of {ids[0]}" for row in rows)


# ---- trust

GOOD = Checked("half", Estimate(0.4, 0.3, 0.5), 0.8, 64, 2)
POOR = Checked("half", Estimate(0.4, -0.1, 0.5), 0.8, 64, 2)


def verdict(checked=(), stability=(), projection=1.0, effect=9.0, count=3, independent=True) -> str:
    replicates = effect + np.random.default_rng(0).normal(size=(count, 20)) * 0.01
    sure = significance_of(replicates, independent=independent)
    values = Values(replicates.mean(0), None, sure, count, independent, "nothing")
    found = Findings(checked=checked, stability=stability, projection=projection)
    return judge(values, found).verdict


def test_the_verdict_follows_its_rule():
    assert verdict() == NOT  # nothing tells
    assert verdict(stability=(0.1, 0.1)) == NOT
    assert verdict(stability=(0.6, 0.7)) == PLAUSIBLE
    assert verdict((GOOD,), (0.6,)) == RELIABLE
    assert verdict((GOOD,), (0.1,)) == LARGE
    assert verdict((GOOD,)) == LARGE
    assert verdict((GOOD,), (0.6,), effect=0.0) == LARGE  # no sign survives
    assert verdict((GOOD,), (0.6,), projection=0.2) == NOT
    assert verdict((GOOD, POOR), (0.9,)) == NOT  # one retraining that fails is enough
    assert verdict((GOOD,), (0.9,), count=1) == LARGE
    assert verdict((GOOD,), (0.9,), independent=False) == LARGE  # one training: no sign is tested


def test_retrained_removals_that_went_the_other_way_overrule_everything():
    """Of the clear ones, three of four must have the predicted sign; the unclear do not count."""

    def trust(*changes: float) -> str:
        replicates = 9 + np.random.default_rng(0).normal(size=(3, 20)) * 0.01
        sure = significance_of(replicates)
        values = Values(replicates.mean(0), None, sure, 3, True, "nothing")
        judged = judge(values, Findings(checked=(GOOD,), stability=(0.6,), projection=1.0))
        measured = tuple(Measured("x", 5, 0, 0.1, c, c - 0.05, c + 0.05, 1) for c in changes)
        return judged.with_removals(measured).verdict

    assert trust() == trust(0.1, 0.2) == trust(0.1, 0.1, 0.1, -0.1) == trust(-0.01) == RELIABLE
    assert trust(-0.1) == trust(0.1, 0.1, -0.1, -0.01) == NOT


def test_the_mean_of_independent_trainings_is_trusted_more_than_one_of_them():
    """Spearman–Brown: r = .31 of one training is 3·.31/(1 + 2·.31) = .574 of the mean of three."""
    assert verdict(stability=(0.31,), independent=False) == NOT
    assert verdict(stability=(0.31,)) == PLAUSIBLE


def test_the_verdict_stands_at_the_top_and_its_rule_on_the_page(run):
    data = collect(run)
    text = Page(render(data)).text
    assert data.trust.verdict in text.split("What to do")[0]
    assert summarise(data)["trust"]["rule"] in text


# ---- removal


def test_the_predicted_curve_is_the_sum_of_the_values_left_out(run):
    data = collect(run)
    value = data.values.mean
    for curve in data.removal.curves[:2]:
        sign = 1 if curve.name.startswith("most valuable") else -1
        for fraction, predicted in zip(FRACTIONS, curve.predicted, strict=True):
            most = np.sort(sign * value)[::-1][: round(fraction * 200)]
            assert predicted == pytest.approx(sign * most.sum(), abs=1e-12)


def truth_of(masks: list, losses_by_subset: list) -> GroundTruth:
    """Outputs are log-odds of these losses; one seed, three queries."""
    loss = np.array(losses_by_subset)[:, None, None] * np.ones((1, 1, 3))
    outputs = -np.log(np.expm1(loss))
    return GroundTruth(np.array(masks, np.uint8), outputs, None, {"design": {"kind": "given"}})


def test_what_is_measured_is_the_change_of_the_loss_against_leaving_nothing_out():
    truth = truth_of([[1, 1, 1], [0, 1, 1], [1, 0, 0]], [0.5, 0.7, 0.4])
    found = measured_in((("x", truth),), np.array([0.2, -0.3, 0.1]), "cross_entropy", True)
    assert [(m.count, m.predicted) for m in found] == [(1, 0.2), (2, pytest.approx(-0.2))]
    np.testing.assert_allclose([m.change for m in found], [0.2, -0.1], atol=1e-9)
    np.testing.assert_allclose([m.low for m in found], [0.2, -0.1], atol=1e-9)


def test_leaked_queries_and_seeds_are_told_apart_from_what_changed():
    """Query 2 is in the training set: it alone gets worse. Two seeds: −.1 and −.3 on the others."""
    whole, without = np.ones((2, 4)), np.ones((2, 4))
    without[:, [0, 1, 3]] += np.array([[-0.1], [-0.3]])
    without[:, 2] += 2.6
    outputs = -np.log(np.expm1(np.stack([whole, without])))
    masks = np.array([[1, 1, 1], [0, 1, 1]], np.uint8)
    truth = GroundTruth(masks, outputs, None, {"design": {"kind": "given"}})
    value = np.array([-0.2, 0.0, 0.0])
    (found,) = measured_in((("x", truth),), value, "cross_entropy", True, [2])
    assert found.change == pytest.approx(0.5) and found.clean == pytest.approx(-0.2)
    assert found.seed_error == pytest.approx(np.std([0.575, 0.425], ddof=1) / 2**0.5)
    assert found.outcome == "within chance"  # one query carries it
    (alone,) = measured_in((("x", truth),), value, "cross_entropy", True)
    assert alone.clean is None


@pytest.mark.parametrize(
    ("predicted", "change", "seed_error", "outcome"),
    [
        (-0.3, -0.2, 0.01, "as foretold"),
        (-0.3, 0.2, 0.01, "against"),
        (-0.3, -0.2, 0.2, "within chance"),
        (-0.3, -0.05, None, "within chance"),
    ],
)
def test_an_outcome_is_judged_by_both_errors(predicted, change, seed_error, outcome):
    found = Measured("x", 1, 0, predicted, change, change - 0.1, change + 0.1, 2, seed_error)
    assert found.outcome == outcome


def test_without_the_whole_set_nothing_is_called_a_change():
    truth = truth_of([[0, 1, 1], [1, 0, 0]], [0.7, 0.4])
    assert measured_in((("x", truth),), np.zeros(3), "cross_entropy", True) == ()


def test_losses_of_log_odds_are_minus_the_log_of_the_probability():
    p = np.array([0.01, 0.5, 0.999])
    odds = np.log(p / (1 - p))
    np.testing.assert_allclose(losses(odds, "cross_entropy", True), -np.log(p))
    np.testing.assert_allclose(losses(-p, "mean_squared_error", False), p)


def test_removals_that_fall_on_one_class_are_warned_of(run):
    """Class a loses 5 of 10, all together 6 of 110: nine times the share."""
    of = np.repeat([0, 1], [10, 100])
    balance = class_balance(np.array([0, 1, 2, 3, 4, 50]), ("a", "b"), of)
    assert [(c.label, c.removed, c.unbalanced) for c in balance] == [
        ("a", 5, True),
        ("b", 1, False),
    ]
    data = collect(run)
    warned = replace(data, removal=replace(data.removal, balance=balance))
    assert "loses 50 %" in Page(render(warned)).text
    assert "Warning" not in Page(render(data)).text


def test_with_measured_points_every_number_of_the_page_is_still_in_the_summary(run):
    data = collect(run)
    masks = np.ones((3, 200), int)
    masks[1, :20], masks[2, 30:70] = 0, 0
    truth = truth_of(masks.tolist(), [0.5, 0.7, 0.4])
    measured = measured_in((("x", truth),), data.values.mean, "cross_entropy", True, [0])
    assert all(each.clean is not None for each in measured)
    data = replace(data, removal=replace(data.removal, measured=measured, leaked=(0,)))
    page, known = Page(render(data)), numbers_of(summarise(data))
    shown = [float(v) for tag, a in page.elements if tag == "data" for v in a.values()]
    assert [value for value in shown if value not in known] == []
    assert "Predicted against retrained" in page.text
    assert "Predicted only" in Page(render(collect(run))).text
