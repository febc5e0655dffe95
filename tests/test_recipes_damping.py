"""λ: what "auto" takes it for, who may see it, and that nothing jumps as it moves."""

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
from tda.scorer import damping_used, prepare, scores, self_influence

GRID = np.logspace(-8, 8, 65)


def variant(name: str, **changes: Any) -> Recipe:
    return replace(RECIPES[name], **changes)


def matrix(store: MemoryStore, recipe: Recipe) -> np.ndarray:
    return scores(prepare(store, recipe, store.queries)).compute(scheduler="synchronous")


def deficient(tmp_path: Any, dim: int, n: int = 40) -> MemoryStore:
    """Training rows in a subspace that the queries leave: outside of it F is 1/λ."""
    store = make_store(tmp_path, num_checkpoints=1, num_train=n, dim=dim)
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(dim, dim)))
    inside = rotation[:, : dim // 2] @ rotation[:, : dim // 2].T
    values = (store.train.values @ inside).astype(np.float32)
    return store.with_train(values=values)


# The path of dampings.


@pytest.mark.parametrize("dim", [12, 90], ids=["primal", "dual"])
@pytest.mark.parametrize("function", ["inverse", "mean_of_inverses"])
def test_the_whole_path_of_dampings_is_the_formula(function, dim, tmp_path):
    """From 1e-8 to 1e8 of the mean eigenvalue, with a curvature that has no inverse."""
    store = deficient(tmp_path, dim)
    (q,), (t,) = exact_rows(store, "queries/q"), exact_rows(store)
    for damping in GRID[::4]:
        recipe = variant("influence", curvature_rows="loss", function=function, damping=damping)
        if function == "inverse":
            wanted = naive.with_curvature([q], [t], [t.dl.T @ t.dl / len(t.dl)], damping)
        else:
            wanted = naive.datainf([q], [t], [slice(0, dim)], damping)
        assert naive.relative_error(matrix(store, recipe), wanted) < 2e-5, damping


@pytest.mark.parametrize("dim", [12, 90], ids=["primal", "dual"])
@pytest.mark.parametrize("function", ["inverse", "mean_of_inverses"])
def test_there_is_no_cliff_between_neighbouring_dampings(function, dim, tmp_path):
    """F falls with λ and λF rises, so λ₁/λ₂·gᵀFg(λ₁) ≤ gᵀFg(λ₂) ≤ gᵀFg(λ₁), and by Cauchy and
    Schwarz no score moves farther than (1 − λ₁/λ₂)·√(gᵀFg · qᵀFq)(λ₁)."""
    store = deficient(tmp_path, dim)
    itself = replace(store, tables={**store.tables, "queries/q": store.train})
    before = None
    for damping in GRID:
        recipe = variant("influence", function=function, damping=damping)
        own, table = self_influence(store, recipe).astype(float), matrix(itself, recipe)
        if before is not None:
            last, last_table = before
            step = GRID[0] / GRID[1]
            assert (own <= last * (1 + 1e-5)).all()
            assert (own >= last * step * (1 - 1e-5)).all()
            bound = (1 - step) * np.sqrt(np.outer(last, last))
            assert (np.abs(table - last_table) <= bound + 1e-5 * np.abs(last_table).max()).all()
        before = own, table


def test_one_decomposition_serves_every_damping_and_every_function(tmp_path, monkeypatch):
    """C checkpoints, C decompositions, whatever is asked of the same curvature afterwards."""
    store = make_store(tmp_path, num_checkpoints=3).mark()
    counted, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a: counted.append(1) or eigh(*a))
    asked = [variant("influence", damping=damping) for damping in (1e-3, 0.1, 1.0, "auto")]
    asked += [RECIPES[name] for name in ("relatif", "relatif_l", "arnoldi", "source")]
    asked += [
        variant("influence", layer_weights=(("last", 2.0),), checkpoint_weight="learning_rate")
    ]
    for recipe in asked:
        matrix(store, recipe)
        self_influence(store, recipe)
        damping_used(store, recipe)
    assert len(counted) == 3
    matrix(store, RECIPES["trak"])  # other rows: another curvature
    assert len(counted) == 6


def test_without_a_place_to_keep_it_a_segment_is_decomposed_once(tmp_path, monkeypatch):
    store = make_store(tmp_path, num_checkpoints=4)
    counted, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a: counted.append(1) or eigh(*a))
    matrix(store, variant("source", segments=2))
    assert len(counted) == 2


# "auto".

SGD = {"momentum": 0.9, "weight_decay": 1e-3, "learning_rate_sum": 4.0}
IMPLIED = 1e-3 + 0.1 / 4.0
ADAM = {"optimizer": "adam", "weight_decay": 0.01, "learning_rate_sum": 5.0}


def scheduled(tmp_path: Any, known: dict[str, Any], metric: str | None = None) -> MemoryStore:
    store = make_store(tmp_path, num_checkpoints=1).with_checkpoints(known)
    return store if metric is None else store.with_manifest(metric=metric)


def by_trace(store: MemoryStore, name: str = "influence") -> float:
    (t,) = exact_rows(store)
    squares = t.curvature if name == "influence" else t.slope**2
    return float((squares * (t.df**2).sum(1)).mean() / len(t.df))


@pytest.mark.parametrize("blocks", ["whole", "layer"])
def test_the_schedule_implies_the_damping_of_a_gauss_newton_curvature(blocks, tmp_path):
    """λ = weight decay + (1−β)/Σ_t η_t, one for all layers."""
    store = scheduled(tmp_path, SGD)
    recipe = variant("influence", blocks=blocks)
    assert damping_used(store, recipe) == pytest.approx([IMPLIED])
    (q,), (t,) = exact_rows(store, "queries/q"), exact_rows(store)
    H = naive.link_hessian(t)
    if blocks == "layer":
        layer = np.repeat([0, 1, 2], [3, 4, 5])
        H = H * (layer[:, None] == layer)
    wanted = q.dl @ np.linalg.solve(H + IMPLIED * np.eye(12), t.dl.T) / len(t.dl)
    assert naive.relative_error(matrix(store, recipe), wanted) < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_is_diagonal_of_a_curvature_has_a_damping_of_its_own(share, tmp_path):
    """λ = (1−s)·λ_schedule + s·0.1·tr(H)/k; all of it for a curvature that is diagonal."""
    store = scheduled(tmp_path, SGD)
    mean = by_trace(store) * store.train.num_rows / store.train.dim
    wanted = (1 - share) * IMPLIED + share * 0.1 * mean
    recipe = variant("influence", shrinkage=share)
    assert damping_used(store, recipe) == pytest.approx([wanted], rel=1e-6)
    if share == 1:
        recipe = variant("influence", curvature="diagonal")
        assert damping_used(store, recipe) == pytest.approx([wanted], rel=1e-6)


def test_in_an_eigenbasis_the_mean_is_over_all_parameters(tmp_path):
    """The coordinates that were left out have next to no curvature, but they count."""
    store = make_store(tmp_path, num_checkpoints=1)
    spec = {**store.manifest["projection"], "kind": "eigenbasis"}
    shapes = {"first": [3, 10], "middle": [4], "last": [50]}
    sparse = store.with_manifest(projection=spec, model={"parameters": shapes})
    recipe = variant("influence", damping=0.5, basis="eigen")
    whole = 0.5 * by_trace(store) * store.train.num_rows
    assert damping_used(sparse, recipe) == pytest.approx([whole / 84], rel=1e-6)
    by_layer = replace(recipe, blocks="layer")
    (t,) = exact_rows(store)
    squares = (t.curvature[:, None] * t.df**2).mean(0)
    each = [0.5 * squares[a:b].sum() / n for a, b, n in ((0, 3, 30), (3, 7, 4), (7, 12, 50))]
    mean = np.average(each, weights=[3, 4, 5])
    assert damping_used(sparse, by_layer) == pytest.approx([mean], rel=1e-6)


@pytest.mark.parametrize(
    ("known", "metric"),
    [
        ({"learning_rate": 0.1, "step": 40}, None),  # the momentum is not known
        ({**SGD, "learning_rate_sum": None, "step": None}, None),
        (ADAM, None),  # the curvature is not in Adam's metric
        (SGD, "adam"),
        (ADAM, "second_moment"),
    ],
)
def test_an_unknown_schedule_or_another_metric_leaves_the_trace(known, metric, tmp_path):
    store = scheduled(tmp_path, known, metric)
    assert damping_used(store, RECIPES["influence"]) == pytest.approx([by_trace(store)], rel=1e-6)


def test_in_adams_own_metric_adams_schedule_counts(tmp_path):
    store = scheduled(tmp_path, ADAM, "adam")
    assert damping_used(store, RECIPES["influence"]) == pytest.approx([0.01 + 1 / 5])


@pytest.mark.parametrize(
    "recipe",
    [
        variant("influence", curvature_rows="loss"),
        variant("influence", curvature_rows="margin", query="margin"),
    ],
)
def test_an_empirical_fisher_has_no_unit_a_schedule_could_tell(recipe, tmp_path):
    """Its scale falls with the loss: λ stays relative to its trace."""
    store = scheduled(tmp_path, SGD)
    (t,) = exact_rows(store)
    rows = t.dl if recipe.curvature_rows == "loss" else t.df
    wanted = (rows**2).sum(1).mean() / len(rows)
    assert damping_used(store, recipe) == pytest.approx([wanted], rel=1e-6)


@pytest.mark.parametrize("name", ["mean_squared_error", "causal_lm", "my_loss"])
def test_the_link_of_a_loss_alone_is_an_empirical_fisher(name, tmp_path):
    """ℓ''(f) is not known, the column has ℓ'(f)², and its scale falls with the loss, too."""
    measurement = {"name": name, "digest": "0", "has_margin": False}
    store = scheduled(tmp_path, SGD).with_manifest(measurement=measurement)
    for share in (0.0, 0.5):
        recipe, trace = variant("influence", shrinkage=share), by_trace(store)
        wanted = ((1 - share) + share * 0.1 * store.train.num_rows / store.train.dim) * trace
        assert damping_used(store, recipe) == pytest.approx([wanted], rel=1e-6)


def test_a_number_is_taken_as_it_is(tmp_path):
    store = scheduled(tmp_path, SGD)
    wanted = 0.1 * by_trace(store) * store.train.num_rows / store.train.dim
    found = damping_used(store, variant("influence", damping=0.1))
    assert found == pytest.approx([wanted], rel=1e-6)


@pytest.mark.parametrize("name", ["influence", "datainf", "trackstar", "source", "grad_dot"])
def test_a_prepared_query_set_tells_the_damping_it_was_made_with(name, tmp_path):
    store = make_store(tmp_path, num_checkpoints=3)
    recipe = variant(name, metric="any")
    told = prepare(store, recipe, store.queries).damping
    assert list(told) == damping_used(store, recipe, store.queries)
    assert len(told) == (0 if name == "grad_dot" else 3)


def test_of_several_dampings_the_mean_over_dimensions_is_told(tmp_path):
    store = make_store(tmp_path, num_checkpoints=1, dim=12)
    (t,) = exact_rows(store)
    traces = [(t.dl[:, x] ** 2).sum() / len(t.dl) for x in (slice(0, 3), slice(3, 7), slice(7, 12))]
    each = [0.1 * trace / size for trace, size in zip(traces, (3, 4, 5), strict=True)]
    wanted = (3 * each[0] + 4 * each[1] + 5 * each[2]) / 12
    assert damping_used(store, RECIPES["datainf"]) == pytest.approx([wanted], rel=1e-6)


@pytest.mark.parametrize(("known", "wanted"), [({}, 0.0), ({"weight_decay": 0.02}, 0.02)])
def test_unrolled_training_is_damped_by_its_weight_decay_alone(known, wanted, tmp_path):
    store = scheduled(tmp_path, {"learning_rate_sum": 1.0, **known})
    assert damping_used(store, RECIPES["source"]) == [wanted]
