"""Eigenbases of several trainings: each has its own, in one layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import naive
import numpy as np
import problems
import pytest
import torch
from test_eigenbasis import coordinates

import tda
from tda import growing
from tda.curvature.kfac import fit_ekfac
from tda.featurizer import Featurizer
from tda.repair import repair
from tda.upkeep import verify

DIM = 40
PROBLEM = problems.problem("digits_mlp")
FILE = "projection.npz"


def trained(seed: int) -> dict[str, torch.Tensor]:
    """Weights that have nothing in common with those of another seed."""
    torch.manual_seed(seed)
    return PROBLEM.make().state_dict()


def task(*seeds: int, step: int = 100) -> tda.Task:
    """A training of one checkpoint each."""
    given = [tda.Checkpoint(trained(s), step=step, name=f"seed-{s}") for s in seeds]
    return tda.Task(PROBLEM.make(), given, PROBLEM.measurement)


def index(task: tda.Task, path: Path, dim: int = DIM) -> tda.Run:
    return tda.index(
        task, PROBLEM.train, path, projection="eigenbasis", proj_dim=dim, dtype="float32",
        progress=False,
    )  # fmt: skip


def rows_of(run: tda.Run, checkpoint: int, name: str = "train") -> np.ndarray:
    table = run.store.table(name)
    return table.rows(checkpoint, 0, table.num_rows).double().numpy()


def bases_of(run: tda.Run) -> list[str]:
    return sorted(file.name for file in Path(str(run.path)).glob("projection*"))


@pytest.fixture
def fits(monkeypatch) -> list[int]:
    """The checkpoints at which a basis was fitted."""
    found: list[int] = []
    whole = Featurizer.fit

    def fit(self: Featurizer, *given: Any) -> Any:
        found.append(given[4])
        return whole(self, *given)

    monkeypatch.setattr(Featurizer, "fit", fit)
    return found


def test_each_training_has_the_coordinates_of_its_own_curvature(tmp_path):
    """Of each parameter as many as in the last training, whose largest of all they are."""
    both = task(1, 2)
    run = index(both, tmp_path / "run")
    counts = {layer["name"]: layer["size"] for layer in run.store.manifest["layers"]}
    assert sum(counts.values()) == DIM
    for checkpoint, seed in enumerate((1, 2)):
        ekfac = fit_ekfac(both, PROBLEM.train, checkpoint, progress=False)
        grads = naive.rows(PROBLEM.make(), trained(seed), PROBLEM.train, PROBLEM.outcome).df
        turned, wanted = coordinates(ekfac, grads), []
        for name, block in ekfac.blocks.items():
            largest = block.eigenvalues.flatten().argsort(descending=True, stable=True)
            wanted.append(turned[name][:, largest[: counts.get(name, 0)]])
        expected = torch.cat(wanted, 1).numpy()
        assert naive.relative_error(rows_of(run, checkpoint), expected) < 1e-4


def test_with_every_coordinate_inner_products_are_kept_at_every_checkpoint(tmp_path):
    run = index(task(1, 2), tmp_path / "run", 10**6)
    for checkpoint, seed in enumerate((1, 2)):
        rows = rows_of(run, checkpoint)
        grads = naive.rows(PROBLEM.make(), trained(seed), PROBLEM.train, PROBLEM.outcome).df
        assert naive.relative_error(rows @ rows.T, grads @ grads.T) < 1e-5


def test_checkpoints_of_one_training_share_a_basis(tmp_path, fits):
    """So do copies of one checkpoint, which are of one training: there is one file, and nothing of
    it in the manifest beside its digest."""
    path = [
        tda.Checkpoint(trained(seed), step=step, name=f"step-{step}")
        for seed, step in ((1, 10), (2, 20))
    ]
    for name, given in (("path", path), ("copies", tda.smoothed(path[0], 2))):
        run = index(tda.Task(PROBLEM.make(), given, PROBLEM.measurement), tmp_path / name)
        assert bases_of(run) == [FILE] and "bases" not in run.store.manifest
    assert fits == [1, 1]


def test_a_run_is_the_same_when_it_is_opened_again(tmp_path, fits):
    both = task(1, 2)
    run = index(both, tmp_path / "run")
    run.add_queries(PROBLEM.queries, "first")
    assert fits == [1, 0]
    again = tda.open(tmp_path / "run", both)
    again.add_queries(PROBLEM.queries, "second")
    for checkpoint in (0, 1):
        first, second = (rows_of(again, checkpoint, f"queries/{n}") for n in ("first", "second"))
        np.testing.assert_array_equal(first, second)
    index(both, tmp_path / "run")
    assert fits == [1, 0]


def test_another_training_is_added_with_a_basis_of_its_own(tmp_path, fits):
    """No row that is there changes; what came last has the basis it would have had alone."""
    run = index(task(1), tmp_path / "run")
    before = rows_of(run, 0)
    run = index(task(1, 2), tmp_path / "run")
    assert fits == [0, 1] and len(bases_of(run)) == 2
    np.testing.assert_array_equal(rows_of(run, 0), before)
    swapped = index(task(2, 1), tmp_path / "swapped")  # the layout is that of seed 1 here too
    np.testing.assert_allclose(rows_of(run, 1), rows_of(swapped, 0), atol=1e-6)
    assert verify(run.path) == []
    run = index(task(1, 2, 3), tmp_path / "run")
    assert fits[-1] == 2 and len(bases_of(run)) == 3 and verify(run.path) == []


def test_a_checkpoint_that_goes_on_shares_the_basis_of_its_training(tmp_path, fits):
    first, second = (tda.Checkpoint(trained(s), step=10, name=f"seed-{s}") for s in (1, 2))
    later = tda.Checkpoint(trained(3), step=20, name="later")
    index(tda.Task(PROBLEM.make(), [first, second], PROBLEM.measurement), tmp_path / "run")
    grown = tda.Task(PROBLEM.make(), [first, second, later], PROBLEM.measurement)
    run = index(grown, tmp_path / "run")
    assert fits == [1, 0]
    digests = run.store.manifest["bases"]
    assert digests[1] == digests[2] != digests[0]


def test_damaged_bases_are_found_and_fitted_again(tmp_path):
    run = index(task(1, 2), tmp_path / "run")
    own = next(name for name in bases_of(run) if name != FILE)
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in (FILE, own)}
    (tmp_path / "run" / FILE).unlink()
    (tmp_path / "run" / own).write_bytes(kept[own][:-1])
    found = {fault.path: fault.kind for fault in verify(run.path)}
    assert found == {FILE: "missing", own: "altered"}
    done = repair(tda.open(tmp_path / "run", task(1, 2)), PROBLEM.train)
    assert done.written == [FILE, own] and done.computed == [] and done.after == []
    assert {name: (tmp_path / "run" / name).read_bytes() for name in kept} == kept


def test_a_compacted_run_has_them_all(tmp_path):
    run = index(task(1, 2), tmp_path / "run")
    names = bases_of(run)
    run.delete(run.ids[:1])
    growing.compact(tmp_path / "run", tmp_path / "small")
    shutil.rmtree(tmp_path / "run")
    small = tda.open(tmp_path / "small", task(1, 2))
    assert bases_of(small) == names and len(names) == 2 and verify(small.path) == []
    found = small.top_k(PROBLEM.queries, k=2, recipe="influence_ekfac")
    assert found.proponents.ids.shape == (len(PROBLEM.queries), 2)
