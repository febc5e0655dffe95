"""What short products leave in doubt is scored again: the answer is that of the plain path.

The oracle is a stable sort of float64 products of the decoded rows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_store import make_store
from test_scorer_store import on_disk

from tda.errors import StoreError
from tda.recipes import RECIPES
from tda.scorer import Prepared, prepare, shortlist, top_k
from tda.scorer.pairs import pair_scores
from tda.scorer.ranking import Ranking, TopK
from tda.store import Store

K = 5


def stored(path: Path, dtype: str, num_checkpoints: int = 1, **change: np.ndarray) -> Store:
    """400 heavy-tailed rows, many of them nearly alike, and 70 queries."""
    memory = make_store(
        path, num_checkpoints=num_checkpoints, num_train=400, num_queries=70, dim=96
    )
    rng = np.random.default_rng(3)
    centres = rng.standard_t(2, (num_checkpoints, 20, 96))
    rows = centres[:, np.arange(400) % 20] + 1e-2 * rng.standard_normal((num_checkpoints, 400, 96))
    memory = memory.with_train(values=change.get("rows", rows.astype(np.float32)))
    if "queries" in change:
        memory.queries.values[:] = change["queries"]
    return on_disk(memory, path / "run", dtype, chunk_rows=150)


def exact(prepared: Prepared) -> np.ndarray:
    total = np.zeros((prepared.num_queries, prepared.train.num_rows))
    for c, q in enumerate(prepared.queries):
        rows = prepared.train.rows(c, 0, prepared.train.num_rows).double().numpy()
        total += q.double().numpy() @ rows.T * prepared.row_weights[c].double().numpy()
    return total


def assert_is_the_sort(found: TopK, scores: np.ndarray, k: int = K) -> None:
    for ranking, signed in ((found.proponents, scores), (found.opponents, -scores)):
        order = np.argsort(-signed, axis=1, kind="stable")[:, :k]
        wanted, given = (np.take_along_axis(scores, i, 1) for i in (order, ranking.indices))
        tolerance = 2e-6 * np.abs(scores).max(1, keepdims=True)  # of sums in float32
        assert (np.abs(given - wanted) <= tolerance).all()
        assert (np.abs(ranking.scores - given) <= tolerance).all()
        assert all(len(set(line)) == k for line in ranking.indices.tolist())


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(shortlist, "has_bfloat16", lambda: True)
    monkeypatch.setattr(shortlist, "ROW_TILE", 64)
    monkeypatch.setattr(shortlist, "ROWS_AT_FIRST", 100)
    monkeypatch.setattr(shortlist, "QUERY_TILE", 32)
    monkeypatch.setattr(shortlist, "ROWS_OF_FEW", 100)
    monkeypatch.setattr("tda.scorer.pairs.GATHERED_BYTES", 4 * 96 * 50)


@pytest.mark.parametrize("num_checkpoints", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "ternary"])
@pytest.mark.parametrize("name", ["grad_dot", "grad_cos", "influence", "trak"])
def test_the_answer_is_a_stable_sort_of_exact_scores(name, dtype, num_checkpoints, tmp_path):
    store = stored(tmp_path, dtype, num_checkpoints)
    prepared = prepare(store, RECIPES[name], store.table("queries/q"))
    assert shortlist.pays(prepared, K)
    assert_is_the_sort(top_k(prepared, K), exact(prepared))


@pytest.mark.parametrize("num_checkpoints", [1, 3])
@pytest.mark.parametrize("name", ["grad_dot", "grad_cos", "influence", "trak"])
@pytest.mark.parametrize("count", [1, 7])
def test_few_queries_meet_int8_rows_as_they_are(count, name, num_checkpoints, tmp_path):
    store = stored(tmp_path, "int8", num_checkpoints)
    prepared = prepare(store, RECIPES[name], store.table("queries/q")).select(slice(0, count))
    assert shortlist.pays(prepared, K)
    assert_is_the_sort(top_k(prepared, K), exact(prepared))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "ternary"])
def test_ranges_of_rows_have_a_shortlist_each(dtype, tmp_path, monkeypatch):
    """As workers have them, and the last is too short for one."""
    store = stored(tmp_path, dtype)
    prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
    count, used = prepared.train.num_rows, []
    enough = shortlist.ROWS_PER_ANSWER * K
    spans = [(0, enough), (enough, count - 2), (count - 2, count)]
    assert enough < count - 2
    ends = shortlist.ends
    monkeypatch.setattr("tda.scorer.top.shares", lambda *about, each: spans)
    monkeypatch.setattr(shortlist, "ends", lambda *given: used.append(given[2]) or ends(*given))
    assert_is_the_sort(top_k(prepared, K), exact(prepared))
    assert used[:1] == spans[:1] and spans[2] not in used


def test_bfloat16_products_alone_would_answer_otherwise(tmp_path):
    """So the tests above need the bounds."""
    store = stored(tmp_path, "bfloat16")
    prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
    rounded = dataclasses.replace(
        prepared, queries=tuple(q.bfloat16().float() for q in prepared.queries)
    )
    scores = exact(rounded)
    order = np.argsort(-scores, axis=1)[:, :K]
    line = Ranking(order.astype(str), order, np.take_along_axis(scores, order, 1))
    with pytest.raises(AssertionError):
        assert_is_the_sort(TopK(line, line), exact(prepared))


def bounds_of(rounded, coded, weights, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(below, above) [m, n] of every pair, as a shortlist is handed them."""
    seen = []

    class Seen(shortlist.Shortlist):
        def add(self, score, error, lengths, low, first):
            slack = error.T @ lengths
            seen.append(((score - slack).double(), (score + slack).double()))

    shortlist._add_tile(Seen(rounded.error.shape[1], 1), rounded, coded, weights, 0)
    below, above = (torch.cat(side) for side in zip(*seen, strict=True))
    return below, above


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e15])
@pytest.mark.parametrize("num_checkpoints", [1, 2])
def test_every_score_lies_between_its_bounds(num_checkpoints, scale, monkeypatch):
    """Queries whose rounding all points the same way, along rows that follow it, are the worst."""
    rng = np.random.default_rng(0)
    shape = (num_checkpoints, 200, 64)
    queries = torch.from_numpy(np.sign(rng.normal(size=shape)) * (1 + 2.0**-8 - 2.0**-20)) * scale
    queries[:, 100:] = torch.from_numpy(rng.standard_t(1, (num_checkpoints, 100, 64))) * scale
    rows = torch.from_numpy(np.sign(rng.normal(size=(num_checkpoints, 300, 64))))
    rows[:, :100] = queries[:, :100].sign()
    rows[:, 200:] = torch.from_numpy(rng.standard_t(1, (num_checkpoints, 100, 64)))
    rows = (rows * scale).bfloat16()
    weights = torch.from_numpy(rng.normal(size=(num_checkpoints, 300))).float()
    weights[:, :100] = torch.tensor([[1.0], [-1.0]])[:num_checkpoints]  # parts that cancel
    rounded = shortlist.Rounded.halves([q.float() for q in queries])
    coded = [shortlist.Tile(x, None, torch.linalg.vector_norm(x.float(), dim=1)) for x in rows]
    below, above = bounds_of(rounded, coded, weights, monkeypatch)
    unit = torch.stack([q.float().double().norm(dim=1) for q in queries]).amax(0)
    true = sum(
        q.float().double() / unit[:, None] @ x.double().T * w.double()
        for q, x, w in zip(queries, rows, weights, strict=True)
    )
    assert (true <= above + shortlist.ROUNDING * above.abs()).all()
    assert (true >= below - shortlist.ROUNDING * below.abs()).all()
    if scale == 1 and num_checkpoints == 1:  # and they are not idle
        assert ((true - below) / (above - below)).aminmax().min < 0.2


@pytest.mark.parametrize("num_checkpoints", [1, 2])
def test_every_score_with_int8_rows_lies_between_its_bounds(num_checkpoints, monkeypatch):
    rng = np.random.default_rng(0)
    queries = torch.from_numpy(rng.standard_t(1, (num_checkpoints, 30, 64))).float()
    queries[:, 0] = 0
    rows = torch.from_numpy(rng.integers(-127, 128, (num_checkpoints, 300, 64))).to(torch.int8)
    rows[:, :30] = torch.where(queries < 0, -127, 127)  # rounding adds up
    weights = torch.from_numpy(rng.normal(size=(num_checkpoints, 300))).float()
    rounded = shortlist.Rounded.integers([*queries])
    coded = [shortlist.Tile(x, torch.full((300,), 0.5), None) for x in rows]
    below, above = bounds_of(rounded, coded, weights, monkeypatch)
    unit = torch.stack([q.double().norm(dim=1) for q in queries]).amax(0).clamp(min=1e-300)
    true = sum(
        q.double() / unit[:, None] @ x.double().T * 0.5 * w.double()
        for q, x, w in zip(queries, rows, weights, strict=True)
    )
    assert (true <= above).all() and (true >= below).all()
    size = torch.stack([w.abs() for w in weights]).sum(0) * 0.5 * 127 * 64**0.5
    assert ((above - below)[1:] <= 2e-3 * size).all()  # narrow enough to be of use


def test_equal_rows_have_equal_scores_in_the_order_of_the_rows(tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((1, 100, 96)).repeat(4, axis=1)[:, rng.permutation(400)]
    store = stored(tmp_path, "bfloat16", rows=rows.astype(np.float32))
    prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
    slope = torch.ones_like(prepared.row_weights)
    found = top_k(dataclasses.replace(prepared, row_weights=slope), 8)
    for ranking in (found.proponents, found.opponents):
        groups = ranking.scores.reshape(-1, 2, 4)
        assert (groups == groups[:, :, :1]).all()
        assert (np.diff(ranking.indices.reshape(-1, 2, 4)) > 0).all()


def test_queries_that_decide_nothing_are_answered_all_the_same(tmp_path, monkeypatch):
    """A zero query ties all rows: it takes no memory, and the answer is the first of them."""
    monkeypatch.setattr(shortlist, "PAIRS", 0)
    queries = np.random.default_rng(0).standard_normal((1, 70, 96)).astype(np.float32)
    queries[0, [3, 60]] = 0
    store = stored(tmp_path, "bfloat16", queries=queries)
    prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
    found = top_k(prepared, K)
    assert_is_the_sort(found, exact(prepared))
    assert found.proponents.indices[3].tolist() == list(range(K))


def test_rows_that_are_all_alike_leave_every_query_to_the_plain_path(tmp_path, monkeypatch):
    monkeypatch.setattr(shortlist, "PAIRS", 0)
    rows = np.random.default_rng(0).standard_normal((1, 1, 96)).repeat(400, axis=1)
    store = stored(tmp_path, "bfloat16", rows=rows.astype(np.float32))
    prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
    slope = torch.ones_like(prepared.row_weights)
    found = top_k(dataclasses.replace(prepared, row_weights=slope), K)
    for ranking in (found.proponents, found.opponents):
        assert (ranking.indices == np.arange(K)).all()
        assert (ranking.scores == ranking.scores[:, :1]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_never_far_from_both_ends(bad):
    """So only the pairs that are kept need be looked at for one."""
    score = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    given = torch.full((1, 3), 1e-3), torch.ones(1, 20)
    kept = shortlist.Shortlist(3, 2)
    kept.add(score, *given, 0, 0)
    score[1, 7] = bad
    with pytest.raises(StoreError, match="query 1, training example 27"):
        kept.add(score, *given, 20, 0)


def test_deleted_rows_are_not_answers(tmp_path):
    store = stored(tmp_path, "int8")
    queries = store.table("queries/q")
    gone = top_k(prepare(store, RECIPES["grad_dot"], queries), K).proponents.ids[0]
    store.delete(gone.tolist())
    prepared = prepare(store, RECIPES["grad_dot"], queries)
    assert_is_the_sort(top_k(prepared, K), exact(prepared))
    assert not set(gone) & set(top_k(prepared, K).proponents.ids[0])


def test_few_queries_few_rows_and_exact_stores_take_the_plain_path(tmp_path, monkeypatch):
    store = stored(tmp_path, "bfloat16")
    prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
    assert not shortlist.pays(prepared.select(slice(0, 10)), K)
    assert not shortlist.pays(prepared, 100)
    monkeypatch.setattr(shortlist, "has_bfloat16", lambda: False)
    assert not shortlist.pays(prepared, K)


def test_a_score_of_a_pair_does_not_depend_on_the_others(tmp_path):
    store = stored(tmp_path, "bfloat16", 2)
    prepared = prepare(store, RECIPES["influence"], store.table("queries/q"))
    queries, rows = torch.arange(70).repeat_interleave(400), torch.arange(400).repeat(70)
    whole = pair_scores(prepared, queries, rows)
    some = torch.from_numpy(np.random.default_rng(0).permutation(28_000)[:300])
    assert torch.equal(pair_scores(prepared, queries[some], rows[some]), whole[some])
    wanted = exact(prepared)
    assert np.abs(whole.view(70, 400).numpy() - wanted).max() <= 1e-5 * np.abs(wanted).max()
