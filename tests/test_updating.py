"""A curvature follows its table: what is added is added, what is gone is subtracted, to rounding.

The oracle is H = mean h·x xᵀ of the rows that are left, written out. What is read is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tda
from tda.growing import relabel
from tda.recipe import Recipe
from tda.recipes import RECIPES
from tda.scorer.operators import Operators
from tda.store import Table

CHUNK, WIDTH = 8, 15
INFLUENCE, TRAK = RECIPES["influence"], RECIPES["trak"]
KINDS = {
    "gram": INFLUENCE,
    "labels": TRAK,
    "diagonal": dataclasses.replace(INFLUENCE, curvature="diagonal"),
    "core": dataclasses.replace(INFLUENCE, shrinkage=0.5, core=9),
    "gauss_newton": RECIPES["influence_gn"],
}


def data(count: int, relabelled: tuple[int, ...] = (), giant: int | None = None) -> list[dict]:
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))[:count].clone()
    y = [(i + (i in relabelled)) % 3 for i in range(count)]
    if giant is not None:
        x[giant] *= 1e4
    return [{"input": x[i], "target": y[i], "id": f"e{i}"} for i in range(count)]


def make_task() -> tda.Task:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    first = {name: value.clone() * 0.1 for name, value in model.state_dict().items()}
    second = {name: value * 1.5 for name, value in first.items()}
    return tda.Task(model, checkpoints=[first, second])


def index(path: Path, examples: list[dict], gauss_newton: bool = False) -> tda.Run:
    options: dict[str, Any] = {"projection": "identity", "dtype": "float32", "progress": False}
    run = tda.index(make_task(), examples, path, chunk_rows=CHUNK, **options)
    if gauss_newton:
        run.add_curvature(examples, num_rows=3 * len(examples))
    return run


@pytest.fixture
def read(monkeypatch) -> Iterator[list[int]]:
    """Rows read."""
    sizes: list[int] = []
    rows, gather = Table.rows, Table.gather

    def ranged(self: Table, checkpoint: int, start: int, stop: int) -> torch.Tensor:
        sizes.append(stop - start)
        return rows(self, checkpoint, start, stop)

    def picked(self: Table, checkpoint: int, indices: Any) -> torch.Tensor:
        sizes.append(len(indices))
        return gather(self, checkpoint, indices)

    monkeypatch.setattr(Table, "rows", ranged)
    monkeypatch.setattr(Table, "gather", picked)
    return sizes


def curvature(run: tda.Run, recipe: Recipe) -> list[np.ndarray]:
    """H [k, k] of every checkpoint, as the scorer has it."""
    operators, eye, found = Operators.of(run.store, recipe), torch.eye(WIDTH).double(), []
    for group in operators.groups:
        spectrum = operators.at(group).blocks[0].spectrum
        found.append(spectrum.apply(lambda eigenvalues: eigenvalues, eye).numpy())
    return found


def written_out(run: tda.Run, recipe: Recipe) -> list[np.ndarray]:
    table, found = run.store.table("train"), []
    if recipe.curvature_rows == "gauss_newton":
        table = run.store.table("curvature")
    for checkpoint in range(2):
        x = table.rows(checkpoint, 0, table.num_rows).double().numpy()
        slope = table.column("slope")[checkpoint].astype(float)
        h = table.column("curvature")[checkpoint].astype(float)
        h = {"margin": np.ones_like(h), "loss": slope**2}.get(recipe.curvature_rows, h)
        H = (x.T * h) @ x / len(x)
        if recipe.curvature == "diagonal":
            H = np.diag(np.diag(H))
        if recipe.core is not None:
            inside = np.sort(np.argsort(-np.diag(H))[: recipe.core])
            mixed = np.zeros_like(H)
            mixed[np.ix_(inside, inside)] = 0.5 * H[np.ix_(inside, inside)]
            H = mixed + np.diag(np.diag(H) - np.diag(mixed))
        found.append(H)
    return found


def is_right(run: tda.Run, recipe: Recipe) -> None:
    for found, wanted in zip(curvature(run, recipe), written_out(run, recipe), strict=True):
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        # The share of curvature rows that are left is a float32.
        assert error < (1e-6 if recipe.curvature_rows == "gauss_newton" else 1e-12)


def cost(read: list[int], run: tda.Run, recipe: Recipe) -> int:
    """Rows read of each checkpoint to bring a curvature up to date."""
    read.clear()
    curvature(run, recipe)
    return sum(read) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_all_changes_in_a_row(kind, tmp_path, read):
    recipe = KINDS[kind]
    gauss_newton = kind == "gauss_newton"
    run = index(tmp_path / "run", data(60), gauss_newton)
    is_right(run, recipe)
    run = index(run.path, data(90), gauss_newton)
    is_right(run, recipe)
    run.delete(["e0", "e8", "e9", "e33", "e88"])
    is_right(run, recipe)
    relabel(run, data(90, (3, 8, 70)))
    is_right(run, recipe)
    run.restore(["e8", "e33"])
    is_right(run, recipe)
    relabel(run, data(90, (70, 71)))
    is_right(run, recipe)
    run.delete([f"e{i}" for i in range(2, 60)])  # more than half
    is_right(run, recipe)
    run.restore([f"e{i}" for i in range(2, 60)])
    is_right(run, recipe)


@pytest.mark.parametrize("kind", ["gram", "labels", "diagonal"])
def test_only_rows_that_changed_are_read(kind, tmp_path, read):
    recipe = KINDS[kind]
    run = index(tmp_path / "run", data(80))
    assert cost(read, run, recipe) == 80
    assert cost(read, run, recipe) == 0
    run = index(run.path, data(96))
    assert cost(read, run, recipe) == 16
    run.delete(["e0", "e50", "e95"])
    assert cost(read, run, recipe) == 3
    run.restore(["e0"])
    assert cost(read, run, recipe) == 2
    read.clear()
    relabel(run, data(96, (5, 6, 60)))
    assert sum(read) == 2 * 2 * 3  # old and new, at both checkpoints
    assert cost(read, run, recipe) == 2  # the deleted ones
    run = index(run.path, data(101, (5, 6, 60)))
    assert cost(read, run, recipe) == 2 + 5
    run = index(run.path, data(102, (5, 6, 60)))
    assert cost(read, run, recipe) == 2 + 6  # of a chunk that is not full
    is_right(run, recipe)


def test_what_dwarfs_the_rest_is_not_subtracted(tmp_path, read):
    """Its share times the precision of a number would drown what is left."""
    run = index(tmp_path / "run", data(80, giant=7))
    curvature(run, TRAK)
    run.delete(["e7"])
    assert cost(read, run, TRAK) == 1 + 80  # then whole stretches
    is_right(run, TRAK)
    run.restore(["e7"])
    is_right(run, TRAK)
    relabel(run, data(80))
    assert not list((run.path / "cache").glob("sums-*"))
    is_right(run, TRAK)


def test_an_interrupted_relabelling_leaves_no_wrong_sum(tmp_path, monkeypatch):
    run = index(tmp_path / "run", data(80))
    curvature(run, INFLUENCE)

    def killed(*about: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Table, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            relabel(run, data(80, (3,)))
    relabel(run, data(80, (3,)))
    is_right(run, INFLUENCE)


@pytest.mark.parametrize("way", ["cut", "flipped", "another's", "gone"])
def test_a_kept_sum_is_never_trusted(way, tmp_path):
    run = index(tmp_path / "run", data(80))
    curvature(run, INFLUENCE)
    other = index(tmp_path / "other", data(80, (4,)))
    curvature(other, INFLUENCE)
    for path in (run.path / "cache").glob("*.npz"):
        content = bytearray(path.read_bytes())
        if way == "cut":
            path.write_bytes(content[:-30])
        elif way == "flipped":
            content[len(content) // 2] ^= 8
            path.write_bytes(content)
        elif way == "gone" or not path.name.startswith("sums"):
            path.unlink()
        else:
            path.write_bytes((other.path / "cache" / path.name).read_bytes())
    is_right(run, INFLUENCE)
    run = index(run.path, data(96))
    is_right(run, INFLUENCE)


@pytest.mark.slow
def test_workers_update_it_too(tmp_path):
    run = index(tmp_path / "run", data(80))
    curvature(run, INFLUENCE)
    run = index(run.path, data(120))
    run.delete(["e3"])
    with tda.Cluster(workers=2).open():
        is_right(run, INFLUENCE)
