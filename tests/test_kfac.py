"""K-FAC and EK-FAC against Fisher matrices formed in full, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import naive
import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tda
from tda.curvature.kfac import Block, Corrections, EkFac, Moments, fit_ekfac, sums, targets
from tda.curvature.kfac.targets import Rows, weighted
from tda.errors import GradientError
from tda.gradients import Dense, Gradients, Lookup, Outer, shapes_of

# Linear, tied embedding and head, attention, convolutions in groups, norms, a recurrence (Dense).
NAMES = ["digits_mlp", "cnn", "norms", "tiny_lm", "several_inputs", "lstm", "integers"]


def undrawn(task: tda.Task) -> tda.Task:
    """The task with a likelihood that is not known: F = mean ℓ''(f) ∇f∇fᵀ on the data's targets."""
    task.measurement = replace(task.measurement, draw=None)
    return task


@pytest.fixture(scope="module")
def fitted(task_of) -> Callable[[str], EkFac]:
    found: dict[str, EkFac] = {}

    def get(name: str) -> EkFac:
        problem = problems.problem(name)
        if name not in found:
            task = undrawn(task_of(problem))
            found[name] = fit_ekfac(task, problem.train, 0, batch_size=4, progress=False)
        return found[name]

    return get


def by_parameter(model: nn.Module, rows: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """Rows of whole gradients [n, p] as (parameter, [n, O, I]) float64."""
    first = 0
    for name, (height, width) in shapes_of(model).items():
        part = rows[:, first : first + height * width]
        first += height * width
        yield name, torch.from_numpy(part.reshape(-1, height, width)).double()


@cache
def naive_gradients(name: str) -> list[tuple[str, Tensor]]:
    """√ℓ''·∇f of every parameter, but for those that a later layer cancels to rounding."""
    problem = problems.problem(name)
    weights = problem.checkpoints[0].state
    rows = naive.rows(problem.make(), weights, problem.train, problem.outcome)
    grads = np.sqrt(rows.curvature)[:, None] * rows.df
    whole = float(np.linalg.norm(grads))
    found = by_parameter(problem.make(), grads)
    return [(parameter, grads) for parameter, grads in found if float(grads.norm()) > 1e-5 * whole]


NEAR = {"rtol": 1e-5, "atol": 1e-5}


def kronecker_basis(block: Block) -> Tensor:
    """U ⊗ V [O·I, O·I], a coordinate a row."""
    rows, width = block.eigenvalues.shape
    left = torch.eye(rows).double() if block.left is None else block.left.double()
    right = torch.eye(width).double() if block.right is None else block.right.double()
    return torch.kron(left, right)


def matrix(block: Block) -> Tensor:
    basis = kronecker_basis(block)
    return basis.T @ (block.eigenvalues.flatten()[:, None] * basis)


Sums = Moments | Corrections


def summed(into: Sums, task: tda.Task, data: Any, batch_size: int) -> Any:
    """The sums over a data set, at the first checkpoint."""
    gradients = Gradients(task.model, weighted(task.measurement))
    gradients.load(task.checkpoints[0].load())
    rows = Rows.of(task, gradients, data, len(data), 0, batch_size)
    for batch, size in rows.batches(batch_size):
        gradients(batch, size, into.add)
        into.add_examples(size)
    return into


@pytest.mark.parametrize("name", NAMES)
def test_eigenvalues_are_the_diagonal_of_the_fisher_matrix_in_the_kronecker_basis(name, fitted):
    """Λ = diag((U ⊗ V) F (U ⊗ V)ᵀ), and U, V are orthogonal."""
    for parameter, grads in naive_gradients(name):
        block = fitted(name).blocks[parameter]
        basis = kronecker_basis(block)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)).double(), **NEAR)
        wanted = (grads.flatten(1) @ basis.T).square().mean(0)
        found = block.eigenvalues.flatten()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))


@pytest.mark.parametrize("name", NAMES)
def test_ekfac_is_closer_to_the_fisher_matrix_than_kfac(name, fitted, task_of):
    """George et al. 2018: ‖F − EK-FAC‖ ≤ ‖F − K-FAC‖ in Frobenius norm, for every parameter."""
    problem = problems.problem(name)
    kfac = summed(Moments(), undrawn(task_of(problem)), problem.train, 4).kfac(False)
    closer = 0
    for parameter, grads in naive_gradients(name):
        flat = grads.flatten(1)
        fisher = flat.T @ flat / len(flat)
        errors = [
            float((fisher - matrix(curvature.blocks[parameter])).norm() / fisher.norm())
            for curvature in (fitted(name), kfac)
        ]
        assert errors[0] <= errors[1] + 1e-5
        closer += errors[0] < errors[1] - 1e-3
    assert closer > 0


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose likelihood the engine does not know."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_kfac_is_the_fisher_matrix_where_inputs_and_output_gradients_are_independent():
    """Every input with every label, at a head of zeros: p does not depend on the input.

    There the curvature is not zero (uniform softmax), with a bias and without.
    """
    inputs = torch.randn(7, 5)
    data = (inputs.repeat_interleave(3, 0), torch.arange(3).repeat(7))
    for bias in (True, False):
        model = nn.Linear(5, 3, bias=bias)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        listed = problems.Listed(list(zip(*data, strict=True)))
        task = tda.Task(model, measurement=cross_entropy)
        kfac = summed(Moments(), task, listed, 4).kfac(False)
        p = torch.full((3,), 1 / 3).double()
        softmax = torch.diag(p) - torch.outer(p, p)
        second = inputs.double().T @ inputs.double() / 7
        torch.testing.assert_close(
            matrix(kfac.blocks["weight"]), torch.kron(softmax, second), **NEAR
        )
        assert set(kfac.blocks) == ({"weight", "bias"} if bias else {"weight"})
        if bias:
            torch.testing.assert_close(matrix(kfac.blocks["bias"]), softmax, **NEAR)
        ekfac = fit_ekfac(task, data, progress=False)
        assert ekfac.trace == pytest.approx(kfac.trace, rel=1e-5)


def test_kfac_of_positions_is_the_expand_setting():
    """F ≈ E Σ_t δδᵀ ⊗ mean_t aaᵀ; with δ, a independent of each other at every position: exact."""
    positions, examples = 3, 4000
    delta, a = torch.randn(examples, positions, 1, 4), torch.randn(examples, positions, 1, 3)
    delta, a = delta @ torch.randn(4, 4), a @ torch.randn(3, 3)
    moments = Moments()
    moments.add("w", [Outer(delta, a)])
    moments.add_examples(examples)
    d, x = delta.double().flatten(0, 2), a.double().flatten(0, 2)
    wanted = torch.kron(d.T @ d / examples, x.T @ x / len(x))
    found = matrix(moments.kfac(True).blocks["w"])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.max()))
    grads = torch.einsum("btgo,btgi->boi", delta, a).double().flatten(1)
    fisher = grads.T @ grads / examples
    assert float((found - fisher).norm() / fisher.norm()) < 0.1  # 4,000 draws


def test_what_carries_no_gradient_does_not_count():
    """Padding, whatever its activations, changes neither K-FAC nor EK-FAC."""
    delta, a = torch.randn(5, 3, 1, 4), torch.randn(5, 3, 1, 6)
    padded = torch.cat([delta, torch.zeros(5, 2, 1, 4)], 1)
    noise = torch.cat([a, 9 * torch.randn(5, 2, 1, 6)], 1)
    found = []
    for factor in (Outer(delta, a), Outer(padded, noise)):
        moments = Moments()
        moments.add("w", [factor])
        moments.add_examples(5)
        kfac = moments.kfac(True)
        corrections = Corrections(kfac)
        corrections.add("w", [factor])
        corrections.add_examples(5)
        found.append([kfac.blocks["w"].eigenvalues, corrections.ekfac().blocks["w"].eigenvalues])
    for bare, with_padding in zip(*found, strict=True):
        torch.testing.assert_close(with_padding, bare, **NEAR)


def test_an_embedding_has_the_frequencies_of_its_tokens_for_eigenvalues():
    """Λ_ij = (count of token i) · E(δδᵀ eigenvalue j): diagonal on the side of the table."""
    index = torch.tensor([[0, 1, 1], [2, 1, 0]])
    value = torch.randn(2, 3, 4)
    moments = Moments()
    moments.add("w", [Lookup(index, value, 5)])
    moments.add_examples(2)
    block = moments.kfac(True).blocks["w"]
    second = value.flatten(0, 1).double().T @ value.flatten(0, 1).double()
    assert block.left is None
    wanted = torch.outer(
        torch.tensor([2.0, 3, 1, 0, 0]).double(), torch.linalg.eigvalsh(second).flip(0) / 6 / 2
    )
    torch.testing.assert_close(block.eigenvalues, wanted, **NEAR)


@pytest.mark.parametrize("name", ["cnn", "tiny_lm"])
def test_batches_and_the_order_of_merging_do_not_matter(name, task_of, fitted):
    problem = problems.problem(name)
    task = undrawn(task_of(problem))
    examples = problem.train.examples
    whole = summed(Moments(), task, problem.train, 10).kfac(False)
    parts = [
        summed(Moments(), task, problems.Listed(examples[i : i + 3]), 2) for i in range(0, 10, 3)
    ]
    merged = parts[2].merge(parts[0]).merge(Moments()).merge(parts[3].merge(parts[1])).kfac(False)
    assert merged.count == whole.count == 10
    for parameter, block in whole.blocks.items():
        torch.testing.assert_close(matrix(merged.blocks[parameter]), matrix(block), **NEAR)
    halves = [
        summed(Corrections(fitted(name)), task, problems.Listed(half), 8)
        for half in (examples[4:], examples[:4])
    ]
    again = halves[0].merge(halves[1]).ekfac()
    for parameter, block in fitted(name).blocks.items():
        torch.testing.assert_close(again.blocks[parameter].eigenvalues, block.eigenvalues, **NEAR)


@pytest.mark.parametrize("name", ["digits_mlp", "multi_label", "several_outputs"])
def test_drawn_targets_do_not_depend_on_batches(name, task_of):
    """Classes, labels and numbers: a function of the seed and the example."""
    problem = problems.problem(name)
    first, second, other = (
        fit_ekfac(task_of(problem), problem.train, seed=s, batch_size=b, progress=False)
        for s, b in ((0, 3), (0, 10), (1, 10))
    )
    assert first.gauss_newton
    assert first.trace == pytest.approx(second.trace, rel=1e-5)
    assert first.trace != pytest.approx(other.trace, rel=1e-5)
    for parameter, block in first.blocks.items():
        torch.testing.assert_close(matrix(second.blocks[parameter]), matrix(block), **NEAR)


def softmax_fisher(p: Tensor, x: Tensor) -> Tensor:
    """E_x (diag p − ppᵀ) ⊗ xxᵀ of a linear model without a bias."""
    softmax = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    size = p.shape[1] * x.shape[1]
    return torch.einsum("nab,ni,nj->aibj", softmax, x, x).reshape(size, size) / len(x)


@pytest.mark.parametrize(("pairs", "most", "error"), [(3, 128, 1e-5), (1, 128, 0.1), (1, 2, 0.15)])
def test_it_is_the_gauss_newton_matrix(monkeypatch, pairs, most, error):
    """All pairs of example and class: exactly; some: nearly; one class each, drawn: roughly.

    Not the empirical Fisher matrix of labels that the model does not believe in.
    """
    monkeypatch.setattr(targets, "_PAIRS", pairs)
    monkeypatch.setattr(targets, "MOST_CLASSES", most)
    x = torch.randn(800, 3)
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        p = model(x).softmax(1).double()
    data = (x, p.argmin(1))
    found = fit_ekfac(tda.Task(model), data, batch_size=400, progress=False)
    block = found.blocks["weight"]
    basis = kronecker_basis(block)
    wanted = (basis @ softmax_fisher(p, x.double()) @ basis.T).diagonal()
    assert found.gauss_newton
    assert float((block.eigenvalues.flatten() - wanted).norm() / wanted.norm()) < error
    empirical = fit_ekfac(tda.Task(model, measurement=cross_entropy), data, progress=False)
    assert not empirical.gauss_newton
    assert empirical.trace > 1.5 * found.trace


@pytest.mark.parametrize("name", ["integers", "logistic", "ridge"])
def test_with_one_output_nothing_is_drawn(name, task_of):
    """ℓ''(f) ∇f∇fᵀ is the Gauss–Newton matrix, whatever the target."""
    problem = problems.problem(name)
    found = fit_ekfac(task_of(problem), problem.train, 0, progress=False)
    trace = sum(float(grads.square().sum()) for _, grads in naive_gradients(name)) / 10
    assert found.gauss_newton and found.trace == pytest.approx(trace, rel=1e-4)


def test_a_mean_over_tokens_has_the_curvature_of_its_likelihood():
    """Draws of T tokens are weighted by T: G = (1/T) Σ_t G_t, not (1/T²) Σ_t G_t."""
    tokens = torch.randint(0, 5, (300, 9))
    model = nn.Embedding(5, 5)
    task = tda.Task(model, measurement="causal_lm")
    found = fit_ekfac(task, (tokens, tokens), batch_size=100, progress=False)
    with torch.no_grad():
        p = model.weight.softmax(1).double()
    traces = (1 - p.square().sum(1))[tokens[:, :-1]].mean()  # tr(diag p − ppᵀ) at each position
    assert found.trace == pytest.approx(float(traces), rel=0.1)


def test_wide_sides_keep_their_axes(monkeypatch, task_of):
    """Λ is then the diagonal of F in the basis of the other side alone."""
    monkeypatch.setattr(sums, "MAX_EIGEN", 9)
    problem = problems.problem("digits_mlp")
    found = fit_ekfac(undrawn(task_of(problem)), problem.train, 0, progress=False)
    block = found.blocks["0.weight"]
    assert block.right is None and block.left is not None
    grads = dict(naive_gradients("digits_mlp"))["0.weight"]
    wanted = (block.left.double() @ grads).square().mean(0)
    torch.testing.assert_close(block.eigenvalues, wanted, rtol=1e-4, atol=1e-9)


def test_a_spectral_function_is_that_of_the_matrix():
    """Block.apply is (U ⊗ V) F(Λ) (U ⊗ V)ᵀ."""
    grads = torch.randn(20, 4, 3)
    moments = Moments()
    moments.add("w", [Dense(grads)])
    moments.add_examples(20)
    block = moments.kfac(True).blocks["w"]
    x = torch.randn(5, 4, 3)
    found = block.apply(1 / (block.eigenvalues + 0.1), x).flatten(1)
    wanted = torch.linalg.solve(
        matrix(block) + 0.1 * torch.eye(12).double(), x.double().flatten(1).T
    ).T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_some_examples_are_spread_over_the_data():
    data = (torch.arange(100.0)[:, None], torch.zeros(100))
    seen: list[float] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.extend(batch[0][:, 0].tolist())
        return F.mse_loss(model(batch[0])[:, 0], batch[1], reduction="none")

    found = fit_ekfac(tda.Task(nn.Linear(1, 1), measurement=loss), data, num_examples=5,
                      progress=False)  # fmt: skip
    assert found.count == 5 and not found.gauss_newton
    assert set(seen) == {0.0, 25.0, 50.0, 74.0, 99.0}


def test_a_gradient_that_is_not_finite_is_named():
    data = (torch.tensor([[1.0], [float("inf")]]), torch.zeros(2))
    task = tda.Task(nn.Linear(1, 1), measurement="squared_error")
    with pytest.raises(GradientError, match="finite"):
        fit_ekfac(task, data, progress=False)


def test_a_parameter_without_a_gradient_has_no_curvature():
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_parameter("idle", nn.Parameter(torch.randn(4)))
    found = fit_ekfac(tda.Task(model), (torch.randn(6, 3), torch.arange(6) % 2), progress=False)
    assert list(found.blocks) == list(shapes_of(model))
    assert not found.blocks["idle"].eigenvalues.any()
