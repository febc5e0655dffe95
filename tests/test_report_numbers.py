"""The report's numbers: each equals what its definition says, computed another way."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from report_run import MANIFEST, FakeRows, FakeRun, FakeTopK, Page, digits_run, fake_find
from scipy import stats

from tda.evaluate.intervals import spearman
from tda.recipes import RECIPES
from tda.report import collect, render, summarise
from tda.report.data import CLEAR, Values
from tda.report.examples import Gallery, clean
from tda.report.findings import Findings
from tda.report.gather import select
from tda.report.numbers import percent, plain, unit_exponent
from tda.scorer import Prepared


@pytest.fixture(scope="module", autouse=True)
def _found() -> Iterator[None]:
    """A run without a model holds no rows to find anything in."""
    patch = pytest.MonkeyPatch()
    patch.setattr("tda.report.gather.find", fake_find)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return digits_run(tmp_path_factory.mktemp("digits_run"))


def test_values_are_the_mean_score_and_its_standard_error(run):
    values = collect(run, compare=()).values
    exact = run.matrix.astype(np.float64)
    np.testing.assert_allclose(values.mean, exact.mean(0), rtol=1e-12)
    error = exact.std(0, ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(values.error, error, rtol=1e-5, atol=1e-12)
    assert values.num_clearly_helping == (exact.mean(0) > CLEAR * error).sum()


def test_ranks_of_a_large_set_are_those_of_examples_spread_over_it(run, monkeypatch):
    """…and the page says how many: 50 of 200 here."""
    monkeypatch.setattr("tda.report.gather.RANKED", 50)
    data = collect(run, compare=("grad_cos",))
    (found,) = (a for a in data.agreements if a.right == "grad_cos")
    some = np.linspace(0, 199, 50).round().astype(int)
    pairs = zip(run.matrix[:, some], run.cosine[:, some], strict=True)
    each = np.array([stats.spearmanr(a, b).statistic for a, b in pairs])
    shown = [query.example.index for query in data.queries]
    assert found.value == pytest.approx(each[shown].mean(), abs=1e-6)
    assert "the scores of 50 training examples" in Page(render(data)).text


def test_too_few_queries_give_no_standard_error_and_no_claim_of_clarity(tmp_path):
    data = collect(digits_run(tmp_path, num_queries=3))
    assert data.values.error is None
    assert "clearly" not in summarise(data)["headline"]
    assert "only 3 queries" in Page(render(data)).text


def test_rollups_and_class_matrix_add_up_to_the_whole(run):
    data = collect(run)
    for rollup in data.rollups:
        assert sum(part.count for part in rollup.slices) == 200
        assert sum(part.share_of_influence for part in rollup.slices) == pytest.approx(1)
        assert sum(part.share_of_self_influence for part in rollup.slices) == pytest.approx(1)
        total = sum(part.count * part.mean for part in rollup.slices)
        assert total == pytest.approx(data.values.mean.sum(), rel=1e-9)
    train = run.store.table("train").column("label")
    query = run.store.table("queries/test").column("label")
    for i, j in ((0, 0), (3, 8), (9, 1)):
        block = run.matrix[np.ix_(query == i, train == j)]
        assert data.class_matrix.mean[i, j] == pytest.approx(block.mean(), rel=1e-4)


def test_concentration_of_equal_values_is_none_and_of_one_value_is_all():
    equal = Values(np.full(100, -2.0)).concentration
    assert (equal.gini, equal.top_10_percent) == (pytest.approx(0), pytest.approx(0.1))
    one = Values(np.eye(1, 100)[0]).concentration
    assert (one.gini, one.top_1_percent) == (pytest.approx(0.99), 1)


def test_histogram_counts_every_training_example_once(run):
    assert sum(summarise(collect(run))["values"]["histogram"]["counts"]) == 200


def test_nothing_is_called_a_proponent_that_does_not_help(tmp_path):
    run = digits_run(tmp_path, num_train=12, num_queries=10)
    for query in collect(run, k=12).queries:
        assert all(scored.score > 0 for scored in query.proponents)
        assert all(scored.score < 0 for scored in query.opponents)
        shown = len(query.proponents) + len(query.opponents)
        row = run.matrix[query.example.index]
        assert shown == np.count_nonzero(row)


def test_rank_correlation_is_that_of_the_ranks_with_ties_averaged():
    assert spearman(np.array([1, 2, 3, 9]), np.array([0, 5, 6, 7])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1, 1, 2, 2]), np.array([1, 2, 1, 2])) == pytest.approx(0)
    assert np.isnan(spearman(np.zeros(3), np.arange(3)))


def test_the_shown_queries_are_the_hardest_half_then_an_even_spread(run):
    queries = Gallery(run.store.table("queries/test"))
    shown, said = select(queries, 10)
    loss = queries.last("loss")
    assert len(set(shown)) == 10
    assert shown[:5] == np.argsort(-loss)[:5].tolist()
    assert "5 with the highest loss" in said
    assert sorted(select(queries, 100)[0]) == list(range(40))


def test_numbers_keep_three_digits_and_zero_has_no_sign():
    assert plain(1234.5) == "1,234"  # half to even
    assert [plain(x) for x in (12.34, 1.234, 0.1234, 0.00001, None)] == [
        "12.3",
        "1.23",
        "0.123",
        "<0.001",
        "–",
    ]
    assert plain(-2.5e-6, sign=True, exponent=-6) == "−2.50"
    assert plain(-1e-9, sign=True, exponent=-6, beside=5e-6) == "0.00"
    assert [unit_exponent([x]) for x in (0.5, 999, 0.05, 2e-7, 1e5, 0)] == [0, 0, -3, -9, 3, 0]
    assert [percent(x) for x in (0.0512, 0.512)] == ["5.1 %", "51 %"]
    assert clean("a\nb\ud800" + "c" * 50, 8) == "a b\ufffdccc…"


def test_every_recipe_explains_itself_on_the_card(run):
    for recipe in RECIPES.values():
        card = collect(run, recipe=recipe, compare=()).card
        assert card.formula == recipe.formula
        assert card.reference == recipe.reference
        assert ("no curvature" in card.damping) == (recipe.function == "identity")
    assert (
        "0.1 · tr(H)/k" in collect(run, recipe=replace(RECIPES["trak"], damping=0.1)).card.damping
    )


def test_a_recipe_that_normalises_takes_its_suspects_from_one_that_does_not(run):
    asked = []
    spy = replace(run)
    spy.self_influence = lambda recipe: asked.append(recipe) or run.itself
    assert any(
        "suspects are those of grad_dot" in note for note in collect(spy, recipe="grad_cos").notes
    )
    assert asked == ["grad_dot"]


def test_undefined_losses_and_values_of_zero_break_nothing(tmp_path):
    run = digits_run(tmp_path)
    run.matrix[:] = 0
    run.itself[:] = 0
    for table in run.store.tables.values():
        table.held["loss"][:, ::2] = np.nan
    data = collect(run)
    json.dumps(summarise(data), allow_nan=False)
    page = Page(render(data))
    assert "None of 200 training examples makes a clear difference" in page.text
    assert not re.search(r"\bnan\b|\binf\b", page.text, re.I)


def test_the_score_matrix_is_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("tda.report.gather.find", lambda *_: Findings())
    num_train, num_queries = 40_000, 400  # 64 MB of scores
    run = digits_run(tmp_path, num_train=40, num_queries=8)
    tile = {"train": num_train // 40, "queries/test": num_queries // 8}
    for name, table in run.store.tables.items():
        table.held = {
            key: np.concatenate([column] * tile[name], axis=int(key in ("loss", "p")))
            for key, column in table.held.items()
            if key != "image"
        }
    small = run.matrix

    @dataclass
    class Tiled(FakeRows):
        num_rows = num_train
        num_checkpoints = 1

        def gather(self, checkpoint: int, indices: np.ndarray) -> torch.Tensor:
            return super().gather(checkpoint, np.asarray(indices) % 40)

        def rows(self, checkpoint: int, start: int, stop: int) -> torch.Tensor:
            return self.gather(checkpoint, np.arange(start, stop))

    monkeypatch.setitem(MANIFEST, "checkpoints", MANIFEST["checkpoints"][:1])

    def prepare(name: str, recipe: Any) -> Prepared:
        queries = torch.eye(8).repeat(num_queries // 8, 1)
        return Prepared(RECIPES["influence"], Tiled(small), (queries,), torch.ones(1, num_train))

    few = FakeTopK(run._ranking(-small, 3), run._ranking(small, 3))
    for ranking in (few.proponents, few.opponents):
        for name in ("ids", "indices", "scores"):
            setattr(ranking, name, np.tile(getattr(ranking, name), (num_queries // 8, 1)))
    run.prepare, run.itself = prepare, np.tile(run.itself, num_train // 40)
    run.top_k = lambda prepared, k: few
    run.baseline_top_k = lambda name, k, only: few
    tracemalloc.start()
    collect(run, max_queries=4, compare=("trak",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < num_train * num_queries * 4 / 2
