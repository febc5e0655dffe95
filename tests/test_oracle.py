"""The oracle that the other tests trust is itself right: finite differences and closed forms."""

from __future__ import annotations

import naive
import numpy as np
import problems
import torch


def test_the_oracle_gradient_is_a_finite_difference() -> None:
    problem = problems.problem("tiny_lm")
    model, weights = problem.make(), problem.checkpoints[0].state
    model.load_state_dict(weights)
    start = torch.nn.utils.parameters_to_vector(model.double().parameters()).detach()
    direction = torch.randn(len(start), dtype=torch.float64)

    def loss_at(step: float) -> np.ndarray:
        torch.nn.utils.vector_to_parameters(start + step * direction, model.parameters())
        return naive.rows(model, model.state_dict(), problem.train, problem.outcome).loss

    wanted = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    found = naive.rows(model, weights, problem.train, problem.outcome).dl @ direction.numpy()
    assert naive.relative_error(found, wanted) < 1e-7


def test_the_oracle_refit_is_the_closed_form() -> None:
    """w₋ᵢ − w = H⁻¹xᵢrᵢ/n / (1 − xᵢᵀH⁻¹xᵢ/n) for ridge regression (Sherman–Morrison)."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(30, 4)), rng.normal(size=4)
    y, alpha = x @ w + rng.normal(size=30), 0.3
    full = naive.ridge_fit(x, y, alpha, np.ones(30))
    solved = x @ np.linalg.inv(x.T @ x / 30 + alpha * np.eye(4)) / 30
    leverage = (solved * x).sum(1)
    wanted = solved * ((x @ full - y) / (1 - leverage))[:, None]
    found = [naive.ridge_fit(x, y, alpha, 1 - np.eye(30)[i]) - full for i in range(30)]
    assert naive.relative_error(np.stack(found), wanted) < 1e-10


def test_the_oracle_fit_is_a_minimum() -> None:
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(40, 3)), rng.normal(size=3)
    y = (x @ w > 0).astype(float)
    fit = torch.tensor(naive.logistic_fit(x, y, 0.1, np.ones(40)), requires_grad=True)
    margin = torch.tensor(2 * y - 1) * (torch.tensor(x) @ fit)
    loss = torch.nn.functional.softplus(-margin).mean() + 0.05 * fit.square().sum()
    assert torch.autograd.grad(loss, fit)[0].abs().max() < 1e-12
