"""Learned layer weights maximise what they say, and find the layer that carries a signal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from memory_store import MemoryStore, make_store
from scipy.optimize import minimize
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import tda
from tda.cli import app
from tda.errors import RecipeError
from tda.recipe import Recipe
from tda.recipes import RECIPES
from tda.scorer import layer_weights, prepare, scores, top_k
from tda.scorer.layer_weights import learn_layer_weights

LAYERS = {"first": slice(0, 3), "middle": slice(3, 7), "last": slice(7, 12)}
NAMES = ["grad_dot", "influence", "trak", "source"]


def matrix(store: MemoryStore, recipe: Recipe) -> np.ndarray:
    found = scores(prepare(store, recipe, store.queries)).compute(scheduler="synchronous")
    return found.astype(np.float64)


def objective(by_layer: np.ndarray, alpha: np.ndarray) -> float:
    """The docstring's formula, from whole score matrices of each layer alone [L, m, n]."""
    share = max(1, round(layer_weights.SHARE * by_layer.shape[2]))
    best = np.argsort(-by_layer.sum(0), axis=1)[:, :share]
    mixed = np.einsum("l,lqi->qi", alpha, by_layer)
    gap = np.take_along_axis(mixed, best, 1).mean(1) - mixed.mean(1)
    return float((gap / mixed.std(1)).mean() - layer_weights.PULL * ((alpha - 1) ** 2).mean())


def of_layers(store: MemoryStore, recipe: Recipe) -> np.ndarray:
    """s_qil [L, m, n]: scores with the weights of all other layers at 0."""
    found = []
    for kept in LAYERS:
        others = tuple((name, 0.0) for name in LAYERS if name != kept)
        found.append(matrix(store, replace(recipe, layer_weights=others)))
    return np.stack(found)


@pytest.mark.parametrize("name", NAMES)
def test_no_other_weights_of_mean_one_are_better(name, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_weights, "SHARE", 0.1)
    store, recipe = make_store(tmp_path), RECIPES[name]
    learned = learn_layer_weights(store, recipe, store.queries)
    alpha = np.array([weight for _, weight in learned.layer_weights])
    assert [layer for layer, _ in learned.layer_weights] == list(LAYERS)
    assert replace(learned, name=name, layer_weights=()) == recipe
    assert alpha.mean() == pytest.approx(1) and (alpha >= 0).all()
    by_layer = of_layers(store, recipe)

    def worth(logits: np.ndarray) -> float:
        weights = np.exp(logits - logits.max())
        return -objective(by_layer, weights / weights.mean())

    best = minimize(worth, np.zeros(3), method="Nelder-Mead", options={"maxiter": 2000})
    assert objective(by_layer, alpha) == pytest.approx(-best.fun, abs=1e-4)
    assert objective(by_layer, alpha) > objective(by_layer, np.ones(3)) + 1e-3


def test_the_layer_in_which_few_examples_agree_with_a_query_outweighs_noise(tmp_path):
    """Queries share a direction of the last layer with two examples each; the rest is noise."""
    store = make_store(tmp_path, num_checkpoints=1, num_train=100, num_queries=8, dim=12)
    rng = np.random.default_rng(0)
    for table in (store.train, store.queries):
        table.values[:] = rng.normal(size=table.values.shape)
        table.columns["slope"][:] = -1
    units = np.eye(5)[np.arange(8) % 5] * 4
    store.queries.values[0, :, 7:] = units
    store.train.values[0, :16, 7:] = np.repeat(units, 2, 0)
    store.train.values[0, 16:, 7:] *= 0.1
    learned = dict(learn_layer_weights(store, RECIPES["grad_dot"], store.queries).layer_weights)
    assert learned["last"] > 1.5 > 0.75 > max(learned["first"], learned["middle"])


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that anything makes."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.numel = max(self.numel, found.numel())
        return found


def test_queries_come_in_tiles_that_change_nothing(tmp_path, monkeypatch):
    """Of 40 queries and 300 rows nothing is made that is larger than a tile of 1,000 scores."""
    store, recipe = make_store(tmp_path, num_train=300, num_queries=40), RECIPES["influence"]
    prepared = prepare(store, recipe, store.queries)
    best = top_k(prepared, 6).proponents.indices
    whole = layer_weights._spread(prepared, list(LAYERS.values()), best)
    monkeypatch.setattr("tda.scorer.blocks.TILE_SCORES", 1000)
    monkeypatch.setattr("tda.scorer.blocks.DECODED_BYTES", 4000)
    with Largest() as largest:
        tiles = layer_weights._spread(prepared, list(LAYERS.values()), best)
    assert largest.numel <= 1000
    torch.testing.assert_close(tiles.gap, whole.gap)
    torch.testing.assert_close(tiles.covariance, whole.covariance)


def test_the_size_of_the_scores_does_not_matter(tmp_path):
    store = make_store(tmp_path)
    found = learn_layer_weights(store, RECIPES["grad_dot"], store.queries).layer_weights
    tiny = store.with_train(values=store.train.values * np.float32(1e-12))
    again = learn_layer_weights(tiny, RECIPES["grad_dot"], tiny.queries).layer_weights
    for (_, one), (_, other) in zip(found, again, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_queries_that_nothing_speaks_for_leave_every_layer_as_it_is(tmp_path):
    store = make_store(tmp_path)
    store.queries.values[:] = 0
    learned = learn_layer_weights(store, RECIPES["grad_dot"], store.queries)
    assert all(weight == 1 for _, weight in learned.layer_weights)


def test_weights_that_are_there_are_learned_anew(tmp_path):
    store, recipe = make_store(tmp_path), RECIPES["influence"]
    before = replace(recipe, layer_weights=(("last", 9.0),))
    assert learn_layer_weights(store, before, store.queries) == learn_layer_weights(
        store, recipe, store.queries
    )


@pytest.mark.parametrize(
    ("name", "layers", "words"),
    [("grad_cos", True, "normalize='none'"), ("grad_dot", False, "projection='kronecker'")],
)
def test_what_has_no_sum_over_layers_is_refused(name, layers, words, tmp_path):
    store = make_store(tmp_path)
    if not layers:
        store = store.with_manifest(layers=None)
    with pytest.raises(RecipeError) as caught:
        learn_layer_weights(store, RECIPES[name], store.queries)
    assert words in str(caught.value)


def test_of_a_run_they_serve_every_question(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    data: Any = torch.randn(12, 5), torch.arange(12) % 3
    task = tda.Task(model, checkpoints=[model.state_dict()])
    run = tda.index(task, data, tmp_path, projection=tda.Projection("kronecker", 64))
    run.add_queries(data, "q")
    recipe = run.learn_layer_weights("q", "influence")
    assert "products of layers weighted" in recipe.explain()
    plain, weighted = (run.scores("q", asked).compute() for asked in ("influence", recipe))
    assert plain.shape == weighted.shape and not np.allclose(plain, weighted)
    top = run.top_k("q", 3, recipe).proponents
    asked = ("query", tmp_path, "--recipe", "influence", "-k", 3, "--learn-layer-weights")
    found = CliRunner().invoke(app, [*map(str, asked), "--out", str(tmp_path / "top.json")])
    assert found.exit_code == 0 and found.stderr.startswith("layer weights: 0.weight ")
    answer = json.loads((tmp_path / "top.json").read_text())
    assert answer["recipe"] == "influence+layers"
    assert str(top.ids[0][0]) in (tmp_path / "top.json").read_text()
