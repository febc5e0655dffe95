"""Scores are the formulas of the papers, whatever the chunks, the scheduler or the cache.

The oracles are float64 numpy, one explicit matrix at a time, and share nothing with ``tda``.
"""

from __future__ import annotations

import dataclasses
import pickle

import dask
import numpy as np
import pytest
import zarr
from memory_store import MemoryStore, MemoryTable, make_store

from tda.errors import RecipeError, StoreError
from tda.recipes import RECIPES
from tda.scorer import chunk_shape, prepare, scores, self_influence, top_k

DIMS = {"primal": 12, "dual": 90}


@dataclasses.dataclass(frozen=True)
class Plain:
    """Float64 gradients of one table at one checkpoint: ∇f, −∇ℓ, the margin's, and ℓ''."""

    f: np.ndarray
    loss: np.ndarray
    margin: np.ndarray
    link: np.ndarray


def plain(store: MemoryStore, name: str) -> list[Plain]:
    table, out = store.table(name), []
    for c in range(table.num_checkpoints):
        f = table.values[c].astype(np.float64)
        better = -table.columns["slope"][c].astype(np.float64)[:, None] * f
        margin = f if store.manifest["measurement"]["has_margin"] else better
        out.append(Plain(f, better, margin, table.columns["curvature"][c].astype(np.float64)))
    return out


def pairs(store: MemoryStore) -> list[tuple[Plain, Plain]]:
    return list(zip(plain(store, "queries/q"), plain(store, "train"), strict=True))


def damped(rows: np.ndarray, damping: float | str) -> np.ndarray:
    """(1/n) Σ x xᵀ + λI with λ = tr(H)/n or a multiple of the mean eigenvalue."""
    n, k = rows.shape
    H = rows.T @ rows / n
    scale = np.trace(H) / n if damping == "auto" else damping * np.trace(H) / k
    return H + scale * np.eye(k)


def grad_dot(store):
    return np.mean([q.loss @ t.loss.T for q, t in pairs(store)], axis=0)


def grad_cos(store):
    def unit(x):
        return x / np.sqrt((x**2).sum(1, keepdims=True))

    return np.mean([unit(q.loss) @ unit(t.loss).T for q, t in pairs(store)], axis=0)


def tracin(store):
    rates = [c["learning_rate"] for c in store.manifest["checkpoints"]]
    return sum(eta * q.loss @ t.loss.T for eta, (q, t) in zip(rates, pairs(store), strict=True))


def trak(store, damping="auto"):
    """mean_c φ_q (ΦᵀΦ + nλI)⁻¹ ∇f_i · mean_c of (−∇ℓ_i)/∇f_i."""
    kernels, weights = [], []
    for c, (q, t) in enumerate(pairs(store)):
        n = len(t.f)
        total = n * damped(t.margin, damping)
        kernels.append(q.margin @ np.linalg.inv(total) @ t.f.T)
        weights.append(-store.train.columns["slope"][c].astype(np.float64))
    return np.mean(kernels, axis=0) * np.mean(weights, axis=0)


def influence(store, damping="auto", rows="link", diagonal=False):
    found = []
    for q, t in pairs(store):
        X = {"link": np.sqrt(t.link)[:, None] * t.f, "loss": t.loss, "margin": t.margin}[rows]
        H = damped(X, 0.1 if diagonal and damping == "auto" else damping)
        inverse = np.diag(1 / np.diag(H)) if diagonal else np.linalg.inv(H)
        found.append(q.loss @ inverse @ t.loss.T / len(t.f))
    return np.mean(found, axis=0)


def normalised(store, sides):
    """Influence with rows of unit length in the metric of the inverse curvature, after it."""
    found = []
    for q, t in pairs(store):
        inverse = np.linalg.inv(damped(np.sqrt(t.link)[:, None] * t.f, "auto"))
        score = q.loss @ inverse @ t.loss.T / len(t.f)
        if sides in ("query", "both"):
            score /= np.sqrt(np.einsum("mk,kl,ml->m", q.loss, inverse, q.loss))[:, None]
        if sides in ("train", "both"):
            score /= np.sqrt(np.einsum("mk,kl,ml->m", t.loss, inverse, t.loss))
        found.append(score)
    return np.mean(found, axis=0)


def variant(name, **changes):
    return dataclasses.replace(RECIPES[name], **changes)


CASES = {
    "grad_dot": (RECIPES["grad_dot"], grad_dot),
    "grad_cos": (RECIPES["grad_cos"], grad_cos),
    "tracin": (RECIPES["tracin"], tracin),
    "trak": (RECIPES["trak"], trak),
    "trak λ": (variant("trak", damping=0.3), lambda s: trak(s, 0.3)),
    "influence": (RECIPES["influence"], influence),
    "influence λ": (variant("influence", damping=1e-2), lambda s: influence(s, 1e-2)),
    "fisher": (variant("influence", curvature_rows="loss"), lambda s: influence(s, rows="loss")),
    "diagonal": (variant("influence", curvature="diagonal"), lambda s: influence(s, diagonal=True)),
    "unit query": (variant("influence", normalize="query"), lambda s: normalised(s, "query")),
    "unit train": (variant("influence", normalize="train"), lambda s: normalised(s, "train")),
    "unit both": (variant("influence", normalize="both"), lambda s: normalised(s, "both")),
}


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def matrix(store: MemoryStore, recipe) -> np.ndarray:
    return scores(prepare(store, recipe, store.queries)).compute(scheduler="synchronous")


@pytest.mark.parametrize("has_margin", [True, False], ids=["margin", "no margin"])
@pytest.mark.parametrize("form", DIMS)
@pytest.mark.parametrize("case", CASES)
def test_scores_are_the_written_formula(case, form, has_margin, tmp_path):
    recipe, formula = CASES[case]
    store = make_store(tmp_path, num_checkpoints=3, dim=DIMS[form], has_margin=has_margin)
    found = matrix(store, recipe)
    assert found.dtype == np.float32
    close(found, formula(store))


def test_ridge_influence_is_leave_one_out_to_first_order(tmp_path):
    """Refits by the normal equations: score = rise of the query's loss without example i."""
    rng = np.random.default_rng(0)
    n, m, d, alpha = 1000, 40, 8, 0.05
    x, xq = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    truth = rng.normal(size=d)
    y, yq = x @ truth + rng.normal(size=n), xq @ truth + rng.normal(size=m)

    def fit(keep):
        gram = x[keep].T @ x[keep] / n + alpha * np.eye(d)
        return np.linalg.solve(gram, x[keep].T @ y[keep] / n)

    def loss(w):
        return 0.5 * (xq @ w - yq) ** 2

    w = fit(np.ones(n, bool))
    rises = np.stack([loss(fit(np.arange(n) != i)) - loss(w) for i in range(n)], axis=1)

    store = make_store(tmp_path, num_checkpoints=1, dim=d, has_margin=False)
    tables = {
        name: MemoryTable(
            name, rows[None], {"slope": residual[None], "curvature": np.ones((1, len(rows)))}
        )
        for name, rows, residual in (("train", x, x @ w - y), ("queries/q", xq, xq @ w - yq))
    }
    store = dataclasses.replace(store, tables=tables)
    relative = alpha * d / np.trace(x.T @ x / n)
    found = matrix(store, variant("influence", damping=relative)).astype(np.float64)
    clear = np.abs(rises) > 0.01 * np.abs(rises).max()
    assert (np.sign(found) == np.sign(rises))[clear].all()
    assert (found * rises).sum() / (found**2).sum() == pytest.approx(1, abs=0.02)
    # the exact refit divides each first-order term by 1 − leverage and adds a second-order term
    inverse = np.linalg.inv(x.T @ x / n + alpha * np.eye(d))
    leverage = np.einsum("ik,kl,il->i", x, inverse, x) / n
    step = (xq @ inverse @ x.T) * (x @ w - y) / n / (1 - leverage)
    np.testing.assert_allclose((xq @ w - yq)[:, None] * step + step**2 / 2, rises, atol=1e-9)
    close(found / (1 - leverage), (xq @ w - yq)[:, None] * step)


@pytest.mark.parametrize("case", CASES)
def test_scores_do_not_depend_on_the_chunks(case, tmp_path, monkeypatch):
    recipe, _ = CASES[case]
    store = make_store(tmp_path)
    expected = matrix(store, recipe)
    monkeypatch.setattr("tda.curvature.moments.TILE_BYTES", 1)
    monkeypatch.setattr("tda.scorer.blocks.DECODED_BYTES", 1)
    monkeypatch.setattr("tda.scorer.blocks.QUERY_TILE", 4)
    for chunk_rows in (1, 9, 1000):
        close(matrix(store.with_train(chunk_rows=chunk_rows), recipe), expected)


@pytest.mark.parametrize("case", CASES)
def test_training_order_only_orders_the_scores(case, tmp_path):
    recipe, _ = CASES[case]
    store = make_store(tmp_path)
    order = np.random.default_rng(1).permutation(store.train.num_rows)
    columns = {name: values[:, order] for name, values in store.train.columns.items()}
    permuted = store.with_train(values=store.train.values[:, order], columns=columns)
    close(matrix(permuted, recipe), matrix(store, recipe)[:, order])


@pytest.mark.parametrize("case", [*CASES, "trak unit query"])
def test_self_influence_is_the_diagonal(case, tmp_path):
    recipe = variant("trak", normalize="query") if case not in CASES else CASES[case][0]
    store = make_store(tmp_path, num_checkpoints=3)
    itself = dataclasses.replace(store, tables={**store.tables, "queries/q": store.train})
    close(self_influence(store, recipe), np.diag(matrix(itself, recipe)))


def test_self_influence_of_trak_multiplies_its_two_means(tmp_path):
    store = make_store(tmp_path, num_checkpoints=3)
    kernels = [
        np.einsum("ik,kl,il->i", t.f, np.linalg.inv(len(t.f) * damped(t.margin, "auto")), t.f)
        for t in plain(store, "train")
    ]
    weight = -store.train.columns["slope"].astype(np.float64).mean(0)
    close(self_influence(store, RECIPES["trak"]), np.mean(kernels, axis=0) * weight)


@pytest.mark.parametrize("k", [1, 5, 40, 1000])
@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_top_k_is_a_stable_sort_of_the_scores(k, chunk_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("tda.curvature.moments.TILE_BYTES", 1)
    monkeypatch.setattr("tda.scorer.blocks.DECODED_BYTES", 1)
    monkeypatch.setattr("tda.scorer.blocks.QUERY_TILE", 4)
    store = make_store(tmp_path, num_checkpoints=2, num_train=40)
    whole = np.random.default_rng(0).integers(-1, 2, store.train.values.shape)  # many exact ties
    ones = np.ones_like(store.train.columns["slope"])
    store = store.with_train(
        values=whole.astype(np.float32), columns={"slope": ones}, chunk_rows=chunk_rows
    )
    store.queries.values[:] = np.sign(store.queries.values)
    store.queries.columns["slope"][:] = 1
    prepared = prepare(store, RECIPES["grad_dot"], store.queries)
    full = scores(prepared).compute(scheduler="synchronous")
    assert len(np.unique(full[0])) < 30
    found, width = top_k(prepared, k), min(k, 40)
    for ranking, order in (
        (found.proponents, np.argsort(-full, axis=1, kind="stable")),
        (found.opponents, np.argsort(full, axis=1, kind="stable")),
    ):
        np.testing.assert_array_equal(ranking.indices, order[:, :width])
        np.testing.assert_array_equal(ranking.scores, np.take_along_axis(full, order, 1)[:, :width])
        np.testing.assert_array_equal(ranking.ids, store.train.column("id")[order[:, :width]])
    assert found.recall is None


@pytest.mark.parametrize("k", [0, -1, 2.5, None, True, "3"])
def test_k_is_a_count(k, tmp_path):
    store = make_store(tmp_path)
    with pytest.raises(RecipeError, match="k is not a count"):
        top_k(prepare(store, RECIPES["grad_dot"], store.queries), k)


def test_top_k_reads_each_training_row_once(tmp_path):
    store = make_store(tmp_path, num_checkpoints=2)
    prepared = prepare(store, RECIPES["grad_dot"], store.queries)
    assert store.train.reads == []
    top_k(prepared, 3)
    assert sum(store.train.reads) == 2 * store.train.num_rows


@pytest.mark.parametrize(
    ("shape", "chunk_rows"),
    [((10_000, 60_000), 2048), ((1000, 1_000_000), 2048), ((1, 50_000), 512), ((3, 5), 4096)],
)
def test_a_full_matrix_is_few_tasks_of_bounded_size(shape, chunk_rows):
    queries, rows = chunk_shape(shape, chunk_rows)
    tasks = -(-shape[0] // queries) * -(-shape[1] // rows)
    assert tasks <= 400
    assert 4 * queries * rows <= max(256 * 2**20, 4 * queries * chunk_rows)
    assert rows % chunk_rows == 0 or rows == shape[1]


def test_blocks_stay_bounded_however_large_the_matrix():
    queries, rows = chunk_shape((100_000, 10_000_000), 2048)
    assert 4 * queries * rows <= 256 * 2**20


def test_slicing_the_array_computes_only_what_is_looked_at(tmp_path, monkeypatch):
    one_chunk = 6 * 7 * 4
    monkeypatch.setattr("tda.scorer.blocks.BLOCK_BYTES", (one_chunk, one_chunk))
    store = make_store(tmp_path, num_checkpoints=1, num_train=40, chunk_rows=7)
    lazy = scores(prepare(store, RECIPES["grad_dot"], store.queries))
    assert lazy.chunks == ((6,), (7, 7, 7, 7, 7, 5))
    assert len(dict(lazy.dask)) <= lazy.npartitions + 1
    full = lazy.compute(scheduler="synchronous")
    for index in (np.s_[2:4, 8:12], np.s_[3], np.s_[:, 39], np.s_[::-2, 30:3:-4], np.s_[[4, 1], 5]):
        store.train.reads.clear()
        np.testing.assert_allclose(
            lazy[index].compute(scheduler="synchronous"), full[index], rtol=1e-5, atol=1e-5
        )
        assert sum(store.train.reads) <= 40
    store.train.reads.clear()
    lazy[:, 8:12].compute(scheduler="synchronous")
    assert sum(store.train.reads) <= 7


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_every_scheduler_computes_the_same(scheduler, tmp_path):
    store = make_store(tmp_path, num_train=100)
    lazy = scores(prepare(store, RECIPES["trak"], store.queries))
    close(lazy.compute(scheduler=scheduler), trak(store))


def test_a_prepared_query_set_and_its_scores_travel_between_processes(tmp_path):
    store = make_store(tmp_path)
    prepared = prepare(store, RECIPES["trak"], store.queries)
    close(scores(pickle.loads(pickle.dumps(prepared))).compute(scheduler="threads"), trak(store))
    lazy = pickle.loads(pickle.dumps(scores(prepared)))
    close(lazy.compute(scheduler="threads"), trak(store))


def test_scores_are_written_to_zarr(tmp_path):
    store = make_store(tmp_path)
    lazy = scores(prepare(store, RECIPES["influence"], store.queries))
    with dask.config.set(scheduler="threads"):
        lazy.to_zarr(str(tmp_path / "scores.zarr"))
    close(zarr.open_array(str(tmp_path / "scores.zarr"))[:], influence(store))


def test_a_recipe_that_needs_learning_rates_names_the_checkpoint_without(tmp_path):
    store = make_store(tmp_path)
    store.manifest["checkpoints"][1]["learning_rate"] = None
    with pytest.raises(RecipeError, match="step 1"):
        prepare(store, RECIPES["tracin"], store.queries)
    prepare(store, RECIPES["grad_dot"], store.queries)


@pytest.mark.parametrize(("column", "value"), [("slope", np.nan), ("curvature", -0.5)])
def test_a_column_no_score_can_be_made_from_names_the_example(column, value, tmp_path):
    store = make_store(tmp_path)
    store.train.columns[column][1, 17] = value
    with pytest.raises(StoreError, match="checkpoint 1, example 17"):
        prepare(store, RECIPES["influence"], store.queries)


@pytest.mark.parametrize("read", [lambda p: scores(p).compute(), lambda p: top_k(p, 2)])
def test_a_score_that_is_not_finite_is_refused_by_name(read, tmp_path):
    store = make_store(tmp_path)
    prepared = prepare(store, RECIPES["grad_dot"], store.queries)
    store.train.values[0, 23, 4] = np.inf
    with pytest.raises(StoreError, match="query 0, training example 23"):
        read(prepared)


def test_a_zero_gradient_has_no_cosine_and_no_influence(tmp_path):
    store = make_store(tmp_path, num_checkpoints=1)
    store.train.values[0, 3] = 0
    store.queries.values[0, 2] = 0
    for case in ("grad_cos", "unit both"):
        found = matrix(store, CASES[case][0])
        assert (found[:, 3] == 0).all()
        assert (found[2] == 0).all()
        assert np.isfinite(found).all()


@pytest.mark.parametrize("case", ["grad_cos", "influence", "fisher", "unit both", "trak"])
def test_a_fully_fitted_model_still_has_finite_exact_scores(case, tmp_path):
    """Losses of 1e-15, gradients of 1e-12: their squares leave the range of float32."""
    recipe, formula = CASES[case]
    store = make_store(tmp_path)
    for table in store.tables.values():
        table.values[:] *= 1e-12
        table.columns["slope"][:] *= 1e-15
        table.columns["curvature"][:] *= 1e-15
    close(matrix(store, recipe), formula(store))
