"""The projection to the coordinates of largest curvature in the Kronecker eigenbasis."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import naive
import numpy as np
import problems
import pytest
import torch
from torch import Tensor

import tda
from tda.curvature import kfac
from tda.curvature.kfac import Block, EkFac, fit_ekfac
from tda.errors import ConfigError, StoreError
from tda.gradients import Dense, Lookup, Outer, shapes_of
from tda.projection import Projection, bases_from_bytes, bases_to_bytes
from tda.projection.eigenbasis import Eigenbasis, largest, rotated

NAMES = ["digits_mlp", "cnn", "tiny_lm", "norms"]


def index(task: tda.Task, data: Any, path: Path, dim: int, **options: Any) -> tda.Run:
    return tda.index(
        task, data, path, projection="eigenbasis", proj_dim=dim, dtype="float32", progress=False,
        **options,
    )  # fmt: skip


def last(problem: problems.Problem) -> tda.Task:
    """The task at the last checkpoint alone, where the basis is fitted."""
    return tda.Task(problem.make(), [problem.checkpoints[-1].state], problem.measurement)


@cache
def naive_rows(name: str) -> np.ndarray:
    problem = problems.problem(name)
    weights = problem.checkpoints[-1].state
    return naive.rows(problem.make(), weights, problem.train, problem.outcome).df


def coordinates(ekfac: EkFac, rows: np.ndarray) -> dict[str, Tensor]:
    """U G Vᵀ of every parameter [n, O·I], float64."""
    found, first = {}, 0
    for name, block in ekfac.blocks.items():
        height, width = block.eigenvalues.shape
        grads = torch.from_numpy(rows[:, first : first + height * width]).double()
        grads = grads.reshape(-1, height, width)
        first += height * width
        left = torch.eye(height).double() if block.left is None else block.left.double()
        right = torch.eye(width).double() if block.right is None else block.right.double()
        found[name] = (left @ grads @ right.T).flatten(1)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_with_every_coordinate_it_is_a_rotation(name, tmp_path):
    """Inner products of gradients stay what they are."""
    problem = problems.problem(name)
    run = index(last(problem), problem.train, tmp_path / "run", 10**6)
    rows = run.store.table("train").rows(0, 0, 10).double().numpy()
    wanted = naive_rows(name)
    assert rows.shape == wanted.shape
    assert naive.relative_error(rows @ rows.T, wanted @ wanted.T) < 1e-5
    norms = run.store.table("train").column("grad_norm")[0]
    np.testing.assert_allclose(norms, np.linalg.norm(wanted, axis=1), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_coordinates_of_largest_curvature_of_all_layers_are_kept(name, tmp_path):
    """Rows are ⟨u_i, ∇f v_j⟩ at the top Λ, layer by layer in the model's order, best first."""
    problem, dim = problems.problem(name), 40
    task = last(problem)
    run = index(task, problem.train, tmp_path / "run", dim)
    ekfac = fit_ekfac(task, problem.train, progress=False)
    values = {name: block.eigenvalues.flatten() for name, block in ekfac.blocks.items()}
    least = torch.cat(list(values.values())).sort(descending=True).values[dim - 1]
    exact = coordinates(ekfac, naive_rows(name))
    rows = run.store.table("train").rows(0, 0, 10).double()
    layers = {layer["name"]: layer for layer in run.store.manifest["layers"]}
    assert sum(layer["size"] for layer in layers.values()) == dim == run.store.table("train").dim
    assert list(layers) == [n for n in shapes_of(task.model) if (values[n] >= least).any()]
    for parameter, layer in layers.items():
        best = values[parameter].argsort(descending=True, stable=True)[: layer["size"]]
        assert float(values[parameter][best].min()) >= float(least)
        span = slice(layer["offset"], layer["offset"] + layer["size"])
        wanted = exact[parameter][:, best]
        scale = float(wanted.abs().max())
        torch.testing.assert_close(rows[:, span], wanted, rtol=1e-3, atol=1e-4 * scale)


def test_the_diagonal_of_the_stored_curvature_is_that_of_ekfac(tmp_path):
    """mean_i ℓ''(f_i) row_ij² = Λ_j where ℓ'' is exact: EK-FAC from the store is EK-FAC."""
    problem = problems.problem("integers")
    task = last(problem)
    ekfac = fit_ekfac(task, problem.train, progress=False)
    run = index(task, problem.train, tmp_path / "run", 30)
    table = run.store.table("train")
    found = table.rows(0, 0, 10).double().square().mean(0)
    values = torch.cat([block.eigenvalues.flatten() for block in ekfac.blocks.values()])
    wanted = values.sort(descending=True).values[:30]
    torch.testing.assert_close(found.sort(descending=True).values, wanted, rtol=1e-4, atol=1e-9)


def test_every_form_of_gradient_is_rotated_alike():
    """Outer products, in groups too, and lookups, on bases, on some axes and on all axes."""
    left, right = torch.linalg.qr(torch.randn(6, 6)).Q[:4], torch.randn(3, 5)
    lookup = Lookup(torch.randint(0, 6, (4, 7)), torch.randn(4, 7, 5), 6)
    grouped = Outer(torch.randn(4, 3, 2, 3), torch.randn(4, 3, 2, 5))
    plain = Outer(torch.randn(4, 3, 1, 6), torch.randn(4, 3, 1, 5))
    axes, more = torch.tensor([1, 2, 5]), torch.tensor([0, 3])
    for factors in ([lookup], [grouped], [plain], [lookup, plain], [Dense(torch.randn(4, 6, 5))]):
        grad = sum(factor.rows(0, 6) for factor in factors)
        for side, whole in ((left, left), (axes, torch.eye(6)[axes]), (None, torch.eye(6))):
            for other, wide in ((right, right), (more, torch.eye(5)[more]), (None, torch.eye(5))):
                wanted = whole @ grad @ wide.T
                torch.testing.assert_close(
                    rotated(factors, side, other), wanted, rtol=1e-4, atol=1e-5
                )


def test_only_vectors_in_use_are_kept():
    """A table with a wide side keeps the axes of its largest coordinates, not the table's size."""
    eigenvalues = torch.zeros(100, 3, dtype=torch.float64)
    eigenvalues[70, 1], eigenvalues[7, 1], eigenvalues[7, 0] = 3, 2, 1
    block = Block(None, torch.linalg.qr(torch.randn(3, 3)).Q, eigenvalues)
    other = Block(None, None, torch.full((2, 1), 0.5, dtype=torch.float64))
    bases = largest({"table": block, "bias": other}, 3)
    assert list(bases) == ["table"]
    left, right, row, column = bases["table"]
    assert left.tolist() == [7, 70] and right.shape == (2, 3)
    assert (left[row].tolist(), column.tolist()) == ([70, 7, 7], [1, 1, 0])
    projector = Eigenbasis(bases)
    lookup = Lookup(torch.tensor([[7, 8], [70, 7]]), torch.randn(2, 2, 3), 100)
    buffer = projector.zeros(2)
    square = projector.add(buffer, "table", [lookup])
    grad = lookup.rows(0, 100)
    wanted = torch.stack([grad[:, 70] @ right[1], grad[:, 7] @ right[1], grad[:, 7] @ right[0]], 1)
    torch.testing.assert_close(projector.rows(buffer), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(square, grad.square().sum((1, 2)))
    dense = Dense(torch.randn(2, 2, 1))
    torch.testing.assert_close(projector.add(buffer, "bias", [dense]), dense.square_norm())
    again = bases_from_bytes(bases_to_bytes(bases), {"table": (100, 3), "bias": (2, 1)})
    assert list(again) == ["table"]
    assert all(torch.equal(a, b) for a, b in zip(again["table"], bases["table"], strict=True))


def test_a_run_in_the_eigenbasis_resumes_and_answers(tmp_path):
    """The basis is fitted once and stored; queries added later use the same one."""
    problem = problems.problem("digits_mlp")
    task = tda.Task(problem.make(), [w.state for w in problem.checkpoints], problem.measurement)
    run = index(task, problem.train, tmp_path / "run", 25, batch_size=3)
    spec = run.store.manifest["projection"]
    assert spec["kind"] == "eigenbasis" and spec["dim"] == 25 and "bases_digest" in spec
    assert not {"rank", "basis"} & set(spec)
    before = (tmp_path / "run" / "projection.npz").read_bytes()
    again = index(task, problem.train, tmp_path / "run", 25, batch_size=10)
    assert (tmp_path / "run" / "projection.npz").read_bytes() == before
    name = tda.open(tmp_path / "run", task=task).add_queries(problem.train, "same")
    rows = again.store.table("train").rows(2, 0, 10)
    queries = again.store.table(f"queries/{name}").rows(2, 0, 10)
    torch.testing.assert_close(queries, rows, rtol=1e-4, atol=1e-5)
    (tmp_path / "run" / "projection.npz").write_bytes(before[:-1])
    with pytest.raises(StoreError, match="bases"):
        tda.open(tmp_path / "run", task=task).add_queries(problem.queries)


def test_the_basis_is_fitted_on_no_more_examples_than_asked_for(tmp_path, monkeypatch):
    counts: list[int] = []
    fit = kfac.fit

    def counted(task: tda.Task, data: Any, checkpoint: int, count: int, *rest: Any) -> EkFac:
        counts.append(count)
        return fit(task, data, checkpoint, count, *rest)

    monkeypatch.setattr(kfac, "fit", counted)
    problem = problems.problem("digits_mlp")
    for number in (4, 4096):
        chosen = Projection("eigenbasis", 4, num_fit=number)
        path = tmp_path / str(number)
        tda.index(last(problem), problem.train, path, projection=chosen, progress=False)
    assert counts == [4, 10]
    with pytest.raises(ConfigError, match="positive"):
        Projection("eigenbasis", num_fit=0)
    assert "num_fit" not in Projection("two_stage").spec()
