"""What the papers' methods are to each other: limits, bounds, sums and invariances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive
import numpy as np
import pytest
import torch
from memory_store import MemoryStore, exact_rows, make_store

from tda.recipe import Recipe
from tda.recipes import RECIPES
from tda.scorer import prepare, scores, self_influence

DIMS = (12, 90)  # columns, of 40 rows: the curvature of the second is singular


def variant(name: str, **changes: Any) -> Recipe:
    return replace(RECIPES[name], **changes)


def matrix(store: MemoryStore, recipe: Recipe) -> np.ndarray:
    return scores(prepare(store, recipe, store.queries)).compute(scheduler="synchronous")


def one_checkpoint(tmp_path: Any, dim: int, learning_rate_sum: float = 1.0, **known: Any):
    store = make_store(tmp_path, num_checkpoints=1, dim=dim)
    return store.with_checkpoints({"learning_rate_sum": learning_rate_sum, **known})


def spectrum(store: MemoryStore) -> np.ndarray:
    """σ > 0 of the link curvature."""
    sigma = np.linalg.eigvalsh(naive.link_hessian(exact_rows(store)[0]))
    return sigma[sigma > 1e-12 * sigma.max()]


# Unrolling.


@pytest.mark.parametrize("dim", DIMS)
def test_short_training_is_tracin(dim, tmp_path):
    """F(σ) → τ for τσ → 0: source = τ·grad_dot/n."""
    store = one_checkpoint(tmp_path, dim, learning_rate_sum=1e-9)
    wanted = 1e-9 / store.train.num_rows * matrix(store, RECIPES["grad_dot"])
    assert naive.relative_error(matrix(store, RECIPES["source"]), wanted) < 1e-5


@pytest.mark.parametrize("dim", DIMS)
def test_long_training_is_the_pseudo_inverse(dim, tmp_path):
    """F(σ) → 1/σ for τσ → ∞, and no training example reaches beyond the span of all."""
    store = one_checkpoint(tmp_path, dim)
    store = one_checkpoint(tmp_path, dim, learning_rate_sum=40 / spectrum(store).min())
    (q,), (t,) = exact_rows(store, "queries/q"), exact_rows(store)
    pseudo = np.linalg.pinv(naive.link_hessian(t), rcond=1e-12, hermitian=True)
    wanted = q.dl @ pseudo @ t.dl.T / len(t.dl)
    assert naive.relative_error(matrix(store, RECIPES["source"]), wanted) < 1e-5
    full = variant("arnoldi", rank=10_000)
    assert naive.relative_error(matrix(store, full), wanted) < 1e-5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("time", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dim", DIMS)
def test_unrolled_training_is_damped_influence_within_thirty_percent(dim, time, momentum, tmp_path):
    """With λ = 1/τ, τ = Σ_t η_t/(1−β): F(σ)/(σ+λ)⁻¹ = (1 − e^{−x})(1 + x)/x, x = τσ, which is
    1 at both ends and at most 1.2985 between; so is the ratio of any quadratic form."""
    store = one_checkpoint(
        tmp_path, dim, learning_rate_sum=time, momentum=momentum, weight_decay=0.0
    )
    unrolled = self_influence(store, RECIPES["source"])
    ratio = unrolled / self_influence(store, RECIPES["influence"])  # whose automatic λ is 1/τ
    assert (ratio > 1 - 1e-5).all()
    assert (ratio < 1.2985).all()
    mean = np.trace(naive.link_hessian(exact_rows(store)[0])) / dim
    explicit = variant("influence", damping=(1 - momentum) / time / mean)
    np.testing.assert_allclose(
        self_influence(store, explicit), self_influence(store, RECIPES["influence"]), rtol=1e-5
    )


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_unrolled_training_ignores_a_loss_times_c_at_a_learning_rate_over_c(factor, tmp_path):
    """c·ℓ with η/c takes the same steps, so it does the same to a query."""
    store = make_store(tmp_path, num_checkpoints=3, dim=12)
    columns = {name: factor * values for name, values in store.train.columns.items()}
    other = store.with_train(columns=columns).with_checkpoints(
        *({"learning_rate": c["learning_rate"] / factor} for c in store.manifest["checkpoints"])
    )
    expected = matrix(store, RECIPES["source"])
    assert naive.relative_error(matrix(other, RECIPES["source"]), expected) < 1e-5


def test_later_training_forgets_what_came_before(tmp_path):
    """e^{−τH} of a long last segment leaves of the first only what no example reaches."""
    store = make_store(tmp_path, num_checkpoints=2, dim=12)
    long = store.with_checkpoints({"learning_rate_sum": 1.0}, {"learning_rate_sum": 1e9})
    two = matrix(long, variant("source", segments=2))
    last = replace(long, tables={k: replace(t, values=t.values[1:], columns={
        name: values[1:] for name, values in t.columns.items()
    }) for k, t in long.tables.items()})  # fmt: skip
    last = last.with_manifest(checkpoints=long.manifest["checkpoints"][1:])
    assert naive.relative_error(two, matrix(last, RECIPES["source"])) < 1e-5


def test_weight_decay_is_part_of_the_curvature_training_saw(tmp_path):
    """e^{−τ(H + λI)}: the oracle takes the Hessian of the objective with its penalty."""
    store = make_store(tmp_path, num_checkpoints=2, dim=12)
    store = store.with_checkpoints(
        *({"learning_rate_sum": s, "weight_decay": 0.3} for s in (0.7, 1.9))
    )
    wanted = naive.source(
        exact_rows(store, "queries/q"), exact_rows(store), [[0], [1]], [0.7, 1.2], weight_decay=0.3
    )
    assert naive.relative_error(matrix(store, RECIPES["source"]), wanted) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_segments_are_of_equal_count_and_at_most_one_a_checkpoint(count, tmp_path):
    store = make_store(tmp_path, num_checkpoints=4, dim=12)
    groups = {1: [[0, 1, 2, 3]], 2: [[0, 1], [2, 3]], 3: [[0, 1], [2], [3]]}
    split = groups.get(count, [[0], [1], [2], [3]])
    sums = np.cumsum([10 * c["learning_rate"] for c in store.manifest["checkpoints"]])
    times = np.diff([0, *(sums[group[-1]] for group in split)])
    wanted = naive.source(exact_rows(store, "queries/q"), exact_rows(store), split, times)
    found = matrix(store, variant("source", segments=count))
    assert naive.relative_error(found, wanted) < 1e-5


# Inverses.


@pytest.mark.parametrize("dim", DIMS)
def test_the_mean_of_one_inverse_is_the_inverse(dim, tmp_path):
    """For one training example datainf = influence with the curvature of its loss."""
    store = make_store(tmp_path, num_train=1, dim=dim)
    one = variant("influence", curvature_rows="loss", blocks="layer", damping=0.1)
    found = matrix(store, RECIPES["datainf"])
    assert naive.relative_error(found, matrix(store, one)) < 3e-5  # both are rounded to float32


def test_the_inverse_of_a_mean_is_below_the_mean_of_inverses(tmp_path):
    """By convexity (Jensen), in every quadratic form and at every damping."""
    store = make_store(tmp_path, dim=12)
    for damping in (1e-3, 0.1, 10.0):
        changes = {"curvature_rows": "loss", "damping": damping}
        mean = self_influence(store, variant("influence", function="mean_of_inverses", **changes))
        inverse = self_influence(store, variant("influence", **changes))
        assert (mean >= inverse * (1 - 1e-5)).all()


@pytest.mark.parametrize("name", ["influence", "datainf"])
def test_large_damping_is_grad_dot(name, tmp_path):
    """(H + λI)⁻¹ → I/λ."""
    store = make_store(tmp_path, num_checkpoints=1)
    layers = variant(name, damping=1e8, blocks="whole")
    q, t = exact_rows(store, "queries/q")[0].dl, exact_rows(store)[0]
    squares = t.curvature if name == "influence" else t.slope**2
    damping = 1e8 * (squares * (t.df**2).sum(1)).mean() / t.df.shape[1]
    assert naive.relative_error(matrix(store, layers), q @ t.dl.T / damping / len(t.dl)) < 1e-5


@pytest.mark.parametrize("dim", DIMS)
def test_a_truncated_inverse_grows_to_the_whole(dim, tmp_path):
    """Each direction adds a term ≥ 0 to every quadratic form; all of them are the inverse."""
    store = make_store(tmp_path, num_checkpoints=1, dim=dim)
    before = np.zeros(store.train.num_rows)
    for rank in (1, 2, 5, 12, 40):
        now = self_influence(store, variant("arnoldi", rank=rank, damping=0.01))
        assert (now >= before * (1 - 1e-5)).all()
        before = now
    whole = self_influence(store, variant("influence", damping=0.01))
    np.testing.assert_allclose(before, whole, rtol=2e-5)


def test_equal_eigenvalues_are_kept_or_dropped_together(tmp_path):
    """Which of two equal directions comes first depends on the basis: F may not."""
    store = make_store(tmp_path, num_checkpoints=1, num_train=6, dim=12)
    store.train.values[0] = 0
    store.train.values[0, np.arange(6), np.arange(6)] = [2, 1, 1, 1, 0.5, 0.25]
    store.train.columns["curvature"][:] = 1
    whole = {rank: matrix(store, variant("arnoldi", rank=rank)) for rank in (1, 2, 3, 4)}
    np.testing.assert_allclose(whole[2], whole[4], rtol=1e-6)
    np.testing.assert_allclose(whole[3], whole[4], rtol=1e-6)
    assert not np.allclose(whole[1], whole[2])


@pytest.mark.parametrize(("share", "table"), [(0.0, "train"), (1.0, "queries/q")])
def test_a_query_share_of_nought_or_one_is_one_set_alone(share, table, tmp_path):
    store = make_store(tmp_path, dim=12, num_queries=20)
    recipe = variant("trackstar", metric="any", query_share=share, blocks="whole", damping=0.1)
    q, t = exact_rows(store, "queries/q"), exact_rows(store)
    found = []
    for a, b, rows in zip(q, t, exact_rows(store, table), strict=True):
        R = naive.damped(rows.dl.T @ rows.dl / len(rows.dl), 0.1, len(b.dl))
        root = np.linalg.cholesky(np.linalg.inv(R))
        found.append(naive.unit(a.dl @ root) @ naive.unit(b.dl @ root).T)
    assert naive.relative_error(matrix(store, recipe), np.mean(found, axis=0)) < 1e-5


# Ensembles and layers.


def test_trak_of_independent_models_is_its_ensemble(tmp_path):
    """Eq. 17: the mean of the models' kernels times the mean of their 1 − p."""
    store = make_store(tmp_path, num_checkpoints=3)
    kernels = []
    for c in range(3):
        tables = {
            name: replace(
                t, values=t.values[c : c + 1],
                columns={k: v[c : c + 1] for k, v in t.columns.items()},
            )
            for name, t in store.tables.items()
        }  # fmt: skip
        alone = replace(store, tables=tables)
        alone = alone.with_manifest(checkpoints=store.manifest["checkpoints"][c : c + 1])
        kernels.append(matrix(alone, RECIPES["d_trak"]))
    wanted = np.mean(kernels, axis=0) * -store.train.columns["slope"].mean(0)
    assert naive.relative_error(matrix(store, RECIPES["trak"]), wanted) < 1e-5


@pytest.mark.parametrize("name", ["grad_dot", "trak", "influence", "datainf", "source"])
def test_scores_are_the_weighted_sum_of_those_of_the_layers(name, tmp_path):
    store = make_store(tmp_path)
    layers, alphas = ("first", "middle", "last"), (0.3, 0.0, 2.0)

    def only(kept: str) -> np.ndarray:
        others = tuple((layer, 0.0) for layer in layers if layer != kept)
        return matrix(store, variant(name, layer_weights=others))

    wanted = sum(alpha * only(layer) for layer, alpha in zip(layers, alphas, strict=True))
    weights = tuple(zip(layers, alphas, strict=True))
    found = matrix(store, variant(name, layer_weights=weights))
    assert naive.relative_error(found, wanted) < 1e-5


def test_a_layer_no_example_has_a_gradient_in_adds_nothing(tmp_path):
    store = make_store(tmp_path, dim=12)
    store.train.values[:, :, 3:7] = 0
    for name in ("influence", "datainf"):
        recipe = variant(name, blocks="layer")
        silent = replace(recipe, layer_weights=(("middle", 0.0),))
        found = matrix(store, recipe)
        assert np.isfinite(found).all()
        assert naive.relative_error(found, matrix(store, silent)) < 1e-6


def test_the_last_layer_alone_is_a_model_with_the_others_frozen(index_exactly):
    """tracin on stored rows of all layers, against rows of a model that trains the last one."""
    import tda

    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    data = torch.randn(8, 5), torch.arange(8) % 3
    saved = [tda.Checkpoint(model.state_dict(), step=1, learning_rate=0.5)]
    whole = index_exactly(tda.Task(model, checkpoints=saved), data)
    model[0].requires_grad_(False)
    last = index_exactly(tda.Task(model, checkpoints=saved), data)
    silent = variant("tracin", layer_weights=(("0.weight", 0.0), ("0.bias", 0.0)))
    found, wanted = whole.scores(data, silent).compute(), last.scores(data, "tracin").compute()
    assert naive.relative_error(found, wanted) < 1e-5


# Invariances.


@pytest.mark.parametrize("name", ["grad_cos", "less", "relatif", "relatif_l"])
def test_normalised_training_examples_have_no_size(name, tmp_path):
    """An example's loss times its own positive number changes no score."""
    store = make_store(tmp_path)
    recipe = variant(name, metric="any")
    sizes = np.logspace(-3, 3, store.train.num_rows).astype(np.float32)
    columns = {**store.train.columns, "slope": store.train.columns["slope"] * sizes}
    found = matrix(store.with_train(columns=columns), recipe)
    assert naive.relative_error(found, matrix(store, recipe)) < 1e-5


@pytest.mark.parametrize("name", ["d_trak", "datainf", "relatif", "influence", "arnoldi"])
def test_all_gradients_times_c_is_a_known_power_of_c(name, tmp_path):
    """Relative damping has no unit: F(H) ∝ 1/c², so ⟨Fq, t⟩ ∝ 1, and ⟨Fq, t⟩/‖Ft‖ ∝ c."""
    store = make_store(tmp_path)
    expected = matrix(store, RECIPES[name]) * (8.0 if name == "relatif" else 1.0)
    for table in store.tables.values():
        table.values[:] *= np.float32(8)
    assert naive.relative_error(matrix(store, RECIPES[name]), expected) < 1e-5
