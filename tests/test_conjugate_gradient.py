"""Conjugate gradients equal a dense solve, column by column, and stay finite in all cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import problems
import pytest
import torch
from torch import Tensor

from tda.curvature.gauss_newton import GaussNewton
from tda.errors import GradientError
from tda.gradients import Gradients
from tda.measurements import as_measurement
from tda.unprojected.conjugate_gradient import solve

Array = np.ndarray
WIDTHS = {"a": (2, 3), "b": (), "c": (5,)}  # 12 numbers
P = 12


def vectors(rows: Array, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """[m, 12] as parameters."""
    out, start = {}, 0
    for name, shape in WIDTHS.items():
        size = int(np.prod(shape))
        part = torch.tensor(rows[:, start : start + size], dtype=dtype)
        out[name], start = part.reshape(len(rows), *shape), start + size
    return out


def rows(v: Mapping[str, Tensor]) -> Array:
    return torch.cat([x.reshape(len(x), -1) for x in v.values()], 1).numpy()


def times(matrix: Array, dtype: torch.dtype = torch.float64) -> Callable:
    return lambda v: vectors(rows(v) @ matrix, dtype)


def spd(eigenvalues: Any, seed: int = 0) -> Array:
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(P, P)))[0]
    return (basis * np.asarray(eigenvalues)) @ basis.T


def right(m: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(m, P))


SPECTRUM = np.geomspace(1e-3, 10, P)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_solution_is_that_of_the_dense_system(damping):
    h, b = spd(SPECTRUM), right(4)
    found = solve(times(h), vectors(b), damping=damping, tolerance=1e-10)
    np.testing.assert_allclose(
        rows(found.x), np.linalg.solve(h + damping * np.eye(P), b.T).T, rtol=1e-6, atol=1e-8
    )
    assert found.converged.all() and (found.residuals <= 1e-9).all()


def test_a_column_does_not_depend_on_its_company():
    """Easy and hard right-hand sides, and scales 1e−8 and 1e8, solved together as alone."""
    h, b = spd(SPECTRUM), right(4)
    b[1] = h[0] * 1e-8
    b[2] *= 1e8
    options = {"damping": 0.01, "tolerance": 1e-6}
    together = solve(times(h), vectors(b), **options)
    for i in range(len(b)):
        alone = solve(times(h), vectors(b[i : i + 1]), **options)
        wanted = rows(alone.x)[0]
        np.testing.assert_allclose(
            rows(together.x)[i], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max()
        )
        assert abs(together.iterations[i] - alone.iterations[0]) <= 1  # rounding
    assert len(set(together.iterations.tolist())) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterating_long_after_the_solution_is_reached_leaves_it(dtype):
    """Two hundred iterations in 12 dimensions: α = 0/0 must not reach x."""
    h, b = spd(SPECTRUM), right(3)
    b[1] = 0
    found = solve(times(h, dtype), vectors(b, dtype), damping=0.1, tolerance=0, max_iterations=200)
    wanted = np.linalg.solve(h + 0.1 * np.eye(P), b.T).T
    assert np.isfinite(rows(found.x)).all()
    np.testing.assert_allclose(rows(found.x), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_zero_is_solved_by_zero_without_a_product():
    found = solve(times(spd(SPECTRUM)), vectors(np.zeros((2, P))), damping=0.1)
    assert not rows(found.x).any() and found.converged.all()
    assert not found.iterations.any() and not found.residuals.any()


def test_as_many_iterations_as_there_are_distinct_eigenvalues():
    found = solve(times(spd([1.0] * 5 + [3.0] * 4 + [10.0] * 3)), vectors(right(3)), damping=0.5)
    assert (found.iterations == 3).all()


def test_the_exact_inverse_as_preconditioner_needs_one_iteration():
    h, b = spd(SPECTRUM), right(3)
    inverse = np.linalg.inv(h + 0.01 * np.eye(P))
    found = solve(times(h), vectors(b), damping=0.01, precondition=times(inverse))
    assert (found.iterations == 1).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_preconditioner_does_not_change_the_solution(seed):
    h, b = spd(SPECTRUM), right(3)
    other = spd(np.geomspace(1, 30, P), seed=seed + 5)
    found = solve(times(h), vectors(b), damping=0.1, precondition=times(other), tolerance=1e-10)
    wanted = np.linalg.solve(h + 0.1 * np.eye(P), b.T).T
    np.testing.assert_allclose(rows(found.x), wanted, rtol=1e-6, atol=1e-8)


def test_a_limit_on_iterations_gives_the_best_of_the_krylov_space():
    """After j iterations x minimises the H+λI norm of its error over span{b, Ab, …, A^(j−1) b}."""
    h, b = spd(SPECTRUM), right(1)
    a = h + 0.05 * np.eye(P)
    found = solve(times(h), vectors(b), damping=0.05, tolerance=0, max_iterations=4)
    krylov = np.stack([np.linalg.matrix_power(a, j) @ b[0] for j in range(4)], 1)
    best = krylov @ np.linalg.solve(krylov.T @ a @ krylov, krylov.T @ b[0])
    np.testing.assert_allclose(rows(found.x)[0], best, rtol=1e-5, atol=1e-7)
    rest = np.linalg.norm(b[0] - a @ best) / np.linalg.norm(b[0])
    assert float(found.residuals[0]) == pytest.approx(rest, rel=1e-4)
    assert found.iterations.tolist() == [4] and not found.converged.any()


def test_a_singular_system_without_damping_stays_finite_and_tells_its_residual():
    """b outside the range of H: nothing solves it."""
    h = spd([0.0] * 6 + [1.0] * 6)
    b = right(2)
    b[1] = b[1] @ h  # this one is inside
    found = solve(times(h), vectors(b), damping=0.0, tolerance=1e-8, max_iterations=50)
    assert np.isfinite(rows(found.x)).all()
    assert found.converged.tolist() == [False, True]
    assert float(found.residuals[0]) > 0.1 and float(found.residuals[1]) < 1e-7


def test_a_right_hand_side_that_is_not_finite_is_refused_by_its_place():
    b = right(3)
    b[1, 4] = np.nan
    with pytest.raises(GradientError, match="column 1"):
        solve(times(spd(SPECTRUM)), vectors(b), damping=0.1)


def test_ekfac_as_preconditioner_saves_iterations():
    """(G+λ)⁻¹ of a small trained network on digits, with and without EK-FAC's (Λ+λ)⁻¹."""
    import tda
    from tda.curvature.kfac import fit_ekfac

    problem = problems.problem("digits_mlp")
    images, labels = problems.load_digits(return_X_y=True)
    x = torch.tensor(images[:100] / 16, dtype=torch.float32)
    data = (x, torch.tensor(labels[:100]))
    model = problem.make()
    model.load_state_dict(problem.checkpoints[0].state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), data[1]).backward()
        optimizer.step()
    task = tda.Task(model)
    ekfac = fit_ekfac(task, data, progress=False)
    gradients = Gradients(task.model, as_measurement("cross_entropy"))
    matrix = GaussNewton.of(gradients, tda.data.as_dataset(data))
    generator = torch.Generator().manual_seed(3)
    b = {
        name: torch.randn(2, *p.shape, generator=generator)
        for name, p in gradients.parameters.items()
    }
    b = matrix.product(b)  # in the range of G, as gradients are
    damping = 0.05 * matrix.mean_diagonal()

    def near(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, value in v.items():
            block = ekfac.blocks[name]
            applied = block.apply(
                1 / (block.eigenvalues + damping),
                value.reshape(len(value), *block.eigenvalues.shape),
            )
            out[name] = applied.reshape(value.shape).to(value.dtype)
        return out

    options = {"damping": damping, "tolerance": 1e-2, "max_iterations": 200}
    plain = solve(matrix.product, b, **options)
    helped = solve(matrix.product, b, precondition=near, **options)
    assert plain.converged.all() and helped.converged.all()
    assert (helped.iterations < plain.iterations).all()
    assert (helped.residuals < 0.02).all() and (plain.residuals < 0.02).all()
