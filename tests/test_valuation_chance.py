"""A pair is a near-duplicate only where chance does not explain how near it is."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from models import saturated
from sklearn.datasets import make_moons

import tda
from tda import valuation
from tda.valuation import Space
from tda.valuation.chance import RESOLUTION, distance, expected, rare


def uniform(seed: int, count: int = 2000, dim: int = 4) -> np.ndarray:
    """Directions, uniform on a sphere of ``dim`` dimensions."""
    return np.random.default_rng(seed).normal(size=(count, dim + 1))


def nearest_expected(rows: np.ndarray) -> np.ndarray:
    """λ of every row's distance to its nearest ``[row]``."""
    space = Space(rows)
    every = np.arange(len(rows))
    return expected(space, space.around, space.around.similarity[:, 0], every)


def found(rows: np.ndarray) -> set[tuple[int, int]]:
    """What is rare among all pairs of a row and one of its nearest."""
    space = Space(rows)
    a = np.repeat(np.arange(len(rows)), space.around.indices.shape[1])
    b = space.around.indices.ravel().astype(np.int64)
    chance = expected(space, space.around, space.around.similarity.ravel(), a, b)
    keep = rare(len(rows), chance, a, b)
    return {(min(p), max(p)) for p in zip(a[keep].tolist(), b[keep].tolist(), strict=True)}


@pytest.mark.parametrize("dim", [1, 2, 4, 8])
def test_chance_brings_the_nearest_no_nearer_than_expected(dim):
    """λ of the nearest is exponential: P(λ ≤ t) = 1 − e^−t, or less where distances are too small
    to be told apart."""
    nearest = nearest_expected(uniform(0, 5000, dim))
    for t in (1, 0.1, 0.01):
        assert (nearest <= t).mean() <= -1.3 * np.expm1(-t)
    if dim > 1:
        assert (nearest <= 1).mean() == pytest.approx(-np.expm1(-1), rel=0.1)


def test_a_density_that_varies_is_followed():
    """Blobs a hundred times as narrow as others: still nothing is nearer than chance."""
    rows = np.concatenate([
        np.eye(5)[c] + 0.3 / 10**c * uniform(c, 1000) for c in range(3)
    ])  # fmt: skip
    assert np.mean(nearest_expected(rows) <= 0.1) == pytest.approx(0.1, abs=0.05)
    assert not found(rows)


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_found_and_what_chance_brings_is_not(seed):
    rows = uniform(seed)
    assert not found(rows)
    copies = rows[:40] + 0.003 * uniform(seed + 9, 40)
    pairs = found(np.concatenate([rows, copies]))
    planted = {(i, 2000 + i) for i in range(40)}
    assert len(pairs & planted) >= 38 and len(pairs - planted) <= 2  # 1 in 20


def test_half_of_the_examples_doubled_are_found():
    rows = uniform(0)
    pairs = found(np.concatenate([rows, rows[:1000] + 0.003 * uniform(9, 1000)]))
    planted = {(i, 2000 + i) for i in range(1000)}
    assert len(pairs & planted) > 950 and len(pairs - planted) < 50


def test_a_group_of_more_copies_than_neighbours_is_found():
    """Among each other they are as near as any 30 are: others' distances are the measure."""
    rows = uniform(0)
    group = rows[0] + 0.003 * uniform(9, 30)
    members = {i for pair in found(np.concatenate([rows, group])) for i in pair}
    assert members == {0, *range(2000, 2030)}


@pytest.mark.parametrize(
    "rows",
    [np.ones((50, 4)), np.eye(4)[np.arange(60) % 4], np.ones((1, 3)), uniform(0, 2), uniform(1, 5)],
    ids=["one point", "four points", "one example", "two", "five"],
)
def test_nothing_is_told_where_nothing_can_be(rows):
    assert not found(rows)


def test_no_distance_is_below_what_is_stored():
    """Rounding to bfloat16 moves a direction by less than what is told apart."""
    rows = torch.from_numpy(uniform(0, 500, 63))
    unit = torch.nn.functional.normalize
    moved = (unit(rows.bfloat16().double(), dim=1) - unit(rows, dim=1)).norm(dim=1)
    assert moved.max() < RESOLUTION
    np.testing.assert_allclose(distance(np.array([1, 1 - 1e-7, 0.5])), [RESOLUTION] * 2 + [1])


@pytest.fixture(scope="module", params=["float32", "int4", "ternary"])
def moons(request, tmp_path_factory) -> tda.Run:
    """Two moons read by a small network, hardly with an error: it brings most to few directions."""
    x, y = make_moons(500, noise=0.1, random_state=0)
    inputs, labels = torch.tensor(x).float(), torch.tensor(y)
    inputs[299], labels[299] = inputs[0], labels[0]
    inputs[300], labels[300] = inputs[1], labels[1]
    model = saturated(inputs[:300], labels[:300])
    assert (model(inputs).argmax(1) == labels).float().mean() > 0.99
    task = tda.Task(model, checkpoints=[model.state_dict()], measurement="cross_entropy")
    path = tmp_path_factory.mktemp("moons") / "run"
    train = (inputs[:300], labels[:300])
    run = tda.index(task, train, path, proj_dim=256, dtype=request.param, progress=False)
    run.add_queries((inputs[300:], labels[300:]), "test")
    return run


def test_examples_that_a_small_network_maps_to_one_direction_are_no_copies(moons, monkeypatch):
    """By the cosines alone most were; what is of equal content is, and nothing else."""
    copies, leaks = valuation.duplicates(moons), valuation.leakage(moons, "test")
    assert list(zip(copies.pairs.left, copies.pairs.right, strict=True)) == [(0, 299)]
    assert list(zip(leaks.pairs.left, leaks.pairs.right, strict=True)) == [(0, 1)]
    assert copies.pairs.exact.all() and leaks.pairs.exact.all() and not copies.conflicting.any()
    module = importlib.import_module("tda.valuation.duplicates")
    monkeypatch.setattr(module, "rare", lambda count, expected, *sides: expected >= 0)
    assert len(valuation.duplicates(moons).member) > 150
