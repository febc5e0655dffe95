"""Every recipe on every problem is its paper's formula, and the papers' identities hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import naive
import numpy as np
import problems
import pytest
import torch
from torch import Tensor, nn

import tda
from tda.errors import RecipeError
from tda.run import Run
from tda.task import Task

TOLERANCE = 1e-5
RECIPES = (
    "grad_dot", "grad_cos", "tracin", "trak", "influence", "d_trak", "relatif", "relatif_l"
)  # fmt: skip


@pytest.fixture
def score_once(index_exactly: Callable) -> Callable[..., np.ndarray]:
    """Scores of a task that is indexed for this question only."""

    def score(task: Task, train: Any, queries: Any, recipe: Any, **options: Any) -> np.ndarray:
        return scores(index_exactly(task, train, **options), queries, recipe)

    return score


def scores(run: Run, queries: Any, recipe: Any) -> np.ndarray:
    return run.scores(queries, recipe=recipe).compute()


# The formulas.


@pytest.mark.parametrize("name", problems.NAMES)
def test_every_recipe_is_its_formula(name: str, indexed: Callable) -> None:
    case = indexed(name)
    wanted = naive.all_recipes(case.queries, case.train, case.problem.learning_rates)
    assert set(wanted) == set(RECIPES) <= set(tda.RECIPES)
    for recipe, formula in wanted.items():
        found = case.run.scores(case.problem.queries, recipe=recipe)
        assert found.dtype == np.float32
        assert naive.relative_error(found.compute(), formula) < TOLERANCE, recipe


@pytest.mark.parametrize("damping", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("name", ["ridge", "digits_mlp", "tiny_lm"])
def test_damping_is_relative_to_the_mean_eigenvalue(
    name: str, damping: float, indexed: Callable
) -> None:
    """For n < p (the dual) and n > p alike."""
    case = indexed(name)
    for recipe, formula in {"trak": naive.trak, "influence": naive.influence}.items():
        damped = replace(tda.RECIPES[recipe], damping=damping)
        wanted = formula(case.queries, case.train, damping=damping)
        found = scores(case.run, case.problem.queries, damped)
        # σ_max/λ ≤ tr(H)/λ = k/damping, by which the rounding of float32 rows is multiplied.
        rounding = 1e-8 * case.train[0].df.shape[1] / damping
        assert naive.relative_error(found, wanted) < TOLERANCE + rounding


@pytest.mark.parametrize("recipe", ["trak", "influence"])
def test_an_inverse_that_does_not_exist_is_refused(recipe: str, indexed: Callable) -> None:
    """Fewer examples than parameters and no damping."""
    case, undamped = indexed("digits_mlp"), replace(tda.RECIPES[recipe], damping=0.0)
    with pytest.raises(RecipeError, match="damping"):
        scores(case.run, case.problem.queries, undamped)


def test_tracin_needs_learning_rates(score_once: Callable) -> None:
    """Σ_c η_c has no default: a checkpoint without one is named."""
    model = nn.Linear(5, 4)
    first, second = (nn.Linear(5, 4).state_dict() for _ in range(2))
    saved = [tda.Checkpoint(first, learning_rate=0.1), second]
    data = (torch.randn(6, 5), torch.arange(6) % 4)
    with pytest.raises(RecipeError, match="checkpoint-1"):
        score_once(tda.Task(model, checkpoints=saved), data, data, "tracin")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["logistic", "digits_mlp", "tiny_lm", "integers"])
def test_self_influence_is_the_diagonal(name: str, recipe: str, indexed: Callable) -> None:
    case = indexed(name)
    wanted = naive.all_recipes(case.train, case.train, case.problem.learning_rates)[recipe]
    found = case.run.self_influence(recipe=recipe)
    assert naive.relative_error(found, np.diag(wanted)) < TOLERANCE


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["logistic", "digits_mlp", "tiny_lm"])
def test_top_k_is_the_sorted_score_matrix(name: str, recipe: str, indexed: Callable) -> None:
    case = indexed(name)
    wanted = naive.all_recipes(case.queries, case.train, case.problem.learning_rates)[recipe]
    ids = case.run.store.table("train").column("id")
    top = case.run.top_k(case.problem.queries, k=4, recipe=recipe)
    for ranking, order in (
        (top.proponents, np.argsort(-wanted)),
        (top.opponents, np.argsort(wanted)),
    ):
        np.testing.assert_array_equal(ranking.indices, order[:, :4])
        np.testing.assert_array_equal(ranking.ids, ids[order[:, :4]])
        best = np.take_along_axis(wanted, order[:, :4], 1)
        assert np.abs(ranking.scores - best).max() < TOLERANCE * np.abs(wanted).max()


def independent_trak(g_query: Tensor, g_train: Tensor, one_minus_p: Tensor) -> Tensor:
    """TRAK of one checkpoint through the n × n kernel: ΦᵀΦ + cI and ΦΦᵀ + cI agree on rows of Φ.

    c = n·λ with λ = tr(ΦᵀΦ/n)/n, so c is the mean squared row norm.
    """
    kernel = g_train @ g_train.T
    c = kernel.diagonal().mean()
    cross = torch.linalg.solve(kernel + c * torch.eye(len(kernel), dtype=kernel.dtype), g_train)
    return (g_query @ cross.T) * one_minus_p


@pytest.mark.parametrize("name", ["digits_mlp", "cnn", "bert"])
def test_trak_by_its_kernel(name: str, indexed: Callable, score_once: Callable) -> None:
    """A second float64 TRAK, in the dual, with margins and 1 − p from logits by other routes."""
    if name not in problems.NAMES:
        pytest.skip("needs transformers")
    case = indexed(name)
    problem, model = case.problem, case.problem.make().double().eval()
    model.load_state_dict(problem.checkpoints[0].state)

    def margins(dataset: Any) -> tuple[Tensor, Tensor]:
        """∇(z_y − log Σ_{j≠y} e^{z_j}) and 1 − p = Σ_{j≠y} e^{z_j}/Σ_j e^{z_j}."""
        gradients, others = [], []
        for example in dataset:
            batch = naive.as_double(torch.utils.data.default_collate([example]))
            logits, label = problems.predict(model, batch)
            rest = torch.cat([logits[0, : label[0]], logits[0, label[0] + 1 :]]).logsumexp(0)
            gradients.append(
                torch.from_numpy(naive.flat_gradient(logits[0, label[0]] - rest, model))
            )
            others.append((rest - logits[0].logsumexp(0)).exp().detach())
        return torch.stack(gradients), torch.stack(others)

    (g_query, _), (g_train, one_minus_p) = margins(problem.queries), margins(problem.train)
    wanted = independent_trak(g_query, g_train, one_minus_p).numpy()
    assert naive.relative_error(naive.trak(case.queries[:1], case.train[:1]), wanted) < 1e-9
    task = tda.Task(
        problem.make(), checkpoints=[problem.checkpoints[0].state], measurement="cross_entropy"
    )
    found = score_once(task, problem.train, problem.queries, "trak")
    assert naive.relative_error(found, wanted) < TOLERANCE


# Projections.


def explicit_matrix(problem: problems.Problem, index: Callable, **options: Any) -> np.ndarray:
    """P [k, p] of a model: its columns are the rows of p examples with f_j = θ_j, ∇f_j = e_j."""
    model = problem.make()
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def coordinate(model: nn.Module, batch: Any) -> Tensor:
        return batch[0] @ torch.cat([model.get_parameter(name).reshape(-1) for name in names])

    size = sum(model.get_parameter(name).numel() for name in names)
    task = tda.Task(model, checkpoints=[model.state_dict()], measurement=coordinate)
    run = index(task, torch.eye(size), **options)
    return run.store.table("train").rows(0, 0, size).double().numpy().T


@pytest.mark.parametrize("kind", ["rademacher", "count_sketch"])
@pytest.mark.parametrize(
    "name", ["ridge", "digits_mlp", "frozen", "cnn", "norms", "tiny_lm", "reused", "direct", "lstm"]
)
def test_a_projection_is_one_matrix(
    name: str, kind: str, indexed: Callable, index_exactly: Callable, task_of: Callable
) -> None:
    """Rows are P∇f for one P that depends on the seed and the parameters alone: not on the
    layers' implementation, the batch or the checkpoint. Scores are those of the projected rows."""
    case, options = indexed(name), {"projection": kind, "proj_dim": 64, "seed": 5}
    matrix = explicit_matrix(case.problem, index_exactly, **options)
    run = index_exactly(task_of(case.problem), case.problem.train, batch_size=4, **options)
    for c, rows in enumerate(case.train):
        found = run.store.table("train").rows(c, 0, len(rows.df)).numpy()
        assert naive.row_error(found, rows.df @ matrix.T) < TOLERANCE
    wanted = naive.all_recipes(
        [rows.project(matrix) for rows in case.queries],
        [rows.project(matrix) for rows in case.train],
        case.problem.learning_rates,
    )
    for recipe, formula in wanted.items():
        found = scores(run, case.problem.queries, recipe)
        assert naive.relative_error(found, formula) < TOLERANCE, recipe
    norms = np.stack([np.linalg.norm(rows.df, axis=1) for rows in case.train])
    assert naive.relative_error(run.store.table("train").column("grad_norm"), norms) < TOLERANCE


NUM_SEEDS, NUM_BUCKETS = 12, 64


@pytest.mark.parametrize("kind", ["rademacher", "count_sketch"])
@pytest.mark.parametrize("name", ["digits_mlp", "cnn", "tiny_lm"])
def test_projected_products_are_unbiased_with_johnson_lindenstrauss_variance(
    name: str, kind: str, indexed: Callable, index_exactly: Callable
) -> None:
    """E⟨Px, Py⟩ = ⟨x, y⟩, that is E[PᵀP] = I, and k·Var⟨Px, Py⟩ ≤ 2.5 ‖x‖²‖y‖², over seeds."""
    case = indexed(name)
    problem, exact = case.problem, case.train[0].df @ case.train[0].df.T
    saved = [problem.checkpoints[0].state]
    task = tda.Task(problem.make(), checkpoints=saved, measurement=problem.measurement)
    products = []
    for seed in range(NUM_SEEDS):
        options = {"projection": kind, "proj_dim": NUM_BUCKETS, "seed": seed}
        run = index_exactly(task, problem.train, **options)
        rows = run.store.table("train").rows(0, 0, len(exact)).double().numpy()
        products.append(rows @ rows.T)
    size = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    error = (np.stack(products) - exact) / size
    variance = NUM_BUCKETS * error.var(axis=0, ddof=1)
    standard_error = np.sqrt(2 / NUM_BUCKETS / NUM_SEEDS)  # of a mean with the variance 2/k
    assert np.abs(error.mean(axis=0)).max() < 4.5 * standard_error
    assert variance.mean() < 2.5
    upper = np.triu_indices(len(exact), 1)
    assert variance[upper].mean() > 0.3  # seeds do differ


def test_rademacher_is_a_matrix_of_signs(index_exactly: Callable) -> None:
    """Entries ±1/√k, so that every column has length one."""
    problem = problems.problem("cnn")
    matrix = explicit_matrix(problem, index_exactly, projection="rademacher", proj_dim=32)
    np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(32), rtol=1e-6)


# Exact leave-one-out.


def linear_task(weight: np.ndarray, measurement: Any) -> Task:
    """A linear model without bias at this weight [class, d]."""
    weight = np.atleast_2d(weight)
    model = nn.Linear(weight.shape[1], len(weight), bias=False)
    state = {"weight": torch.tensor(weight, dtype=torch.float32)}
    return tda.Task(model, checkpoints=[state], measurement=measurement)


def pairs(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def drawn(num: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, d)).astype(np.float32).astype(float)
    return x, rng.normal(size=d), rng


def slope(wanted: np.ndarray, found: np.ndarray) -> float:
    """Least-squares slope of the truth on the prediction."""
    return float((wanted * found).sum() / (found * found).sum())


def test_ridge_influence_is_leave_one_out_to_first_order(score_once: Callable) -> None:
    """Sign agreement 100 %, slope 1 ± .02; H + λI = XᵀX/n + αI when α is the damping."""
    n, d, alpha = 1000, 4, 0.1
    x, w, rng = drawn(n + 400, d)
    y = x @ w + rng.normal(size=len(x))
    fitted = naive.ridge_fit(x[:n], y[:n], alpha, np.ones(n))
    poor = n + np.flatnonzero(np.abs(x[n:] @ fitted - y[n:]) > 0.5)[:40]  # a loss with a slope
    train, queries = (x[:n], y[:n]), (x[poor], y[poor])

    def loss(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 0.5 * (x @ w - y) ** 2

    truth = naive.leave_one_out(naive.ridge_fit, loss, train, queries, alpha)
    damping = alpha / (np.trace(x[:n].T @ x[:n] / n) / d)
    recipe = replace(tda.RECIPES["influence"], damping=damping)
    found = score_once(linear_task(fitted, "squared_error"), pairs(*train), pairs(*queries), recipe)
    assert (np.sign(found) == np.sign(truth)).all()
    assert slope(truth, found) == pytest.approx(1, abs=0.02)
    assert np.corrcoef(truth.ravel(), found.ravel())[0, 1] > 0.999


def test_logistic_influence_is_leave_one_out_to_first_order(score_once: Callable) -> None:
    """The Hessian of the logistic loss is mean p(1−p)xxᵀ + αI."""
    n, d, alpha = 1000, 4, 0.05
    x, w, rng = drawn(n + 40, d, seed=1)
    y = (rng.random(len(x)) < 1 / (1 + np.exp(-x @ w))).astype(float)
    train, queries = (x[:n], y[:n]), (x[n:], y[n:])
    fitted = naive.logistic_fit(*train, alpha, np.ones(n))

    def loss(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, -(2 * y - 1) * (x @ w))

    truth = naive.leave_one_out(naive.logistic_fit, loss, train, queries, alpha)
    p = 1 / (1 + np.exp(-train[0] @ fitted))
    trace = ((p * (1 - p))[:, None] * train[0] ** 2).sum() / n
    recipe = replace(tda.RECIPES["influence"], damping=alpha / (trace / d))
    task = linear_task(fitted, "binary_cross_entropy")
    found = score_once(task, pairs(*train), pairs(*queries), recipe)
    assert (np.sign(found) == np.sign(truth)).mean() > 0.995
    assert slope(truth, found) == pytest.approx(1, abs=0.02)
    assert np.corrcoef(truth.ravel(), found.ravel())[0, 1] > 0.999


# Signs.


@pytest.mark.parametrize("name", ["ridge", "logistic", "digits_mlp", "callable_loss"])
def test_a_positive_score_is_a_loss_that_falls(name: str, indexed: Callable) -> None:
    """One small step of descent on a training example lowers the query's loss by lr · grad_dot."""
    case, step = indexed(name), 1e-5
    problem = case.problem
    task_scores = np.zeros((problems.NUM_QUERIES, problems.NUM_TRAIN))
    for weights, train, queries in zip(problem.checkpoints, case.train, case.queries, strict=True):
        model = problem.make()
        model.load_state_dict(weights.state)
        start = torch.nn.utils.parameters_to_vector(model.double().parameters()).detach()
        for i, gradient in enumerate(train.dl):
            moved = start - step * torch.from_numpy(gradient)
            torch.nn.utils.vector_to_parameters(moved, model.parameters())
            state = model.state_dict()
            after = naive.rows(model, state, problem.queries, problem.outcome).loss
            task_scores[:, i] += (queries.loss - after) / step / len(problem.checkpoints)
    found = scores(case.run, problem.queries, "grad_dot")
    assert naive.relative_error(found, task_scores) < 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_copy_of_the_query_is_its_proponent_and_with_another_label_its_opponent(
    num_classes: int, recipe: str, index_exactly: Callable
) -> None:
    """Among near-orthogonal inputs of equal length."""
    generator = torch.Generator().manual_seed(2)
    x = torch.nn.functional.normalize(torch.randn(13, 64, generator=generator), dim=1)
    y = torch.arange(13) % max(num_classes, 2)
    x[3], y[3] = x[12], y[12]
    x[7], y[7] = x[12], (y[12] + 1) % max(num_classes, 2)
    model = nn.Linear(64, num_classes)
    saved = tda.Checkpoint(model.state_dict(), learning_rate=0.1)
    measurement = "binary_cross_entropy" if num_classes == 1 else "cross_entropy"
    task = tda.Task(model, checkpoints=[saved], measurement=measurement)
    top = index_exactly(task, (x[:12], y[:12])).top_k((x[12:], y[12:]), k=1, recipe=recipe)
    assert top.proponents.indices.tolist() == [[3]]
    assert top.opponents.indices.tolist() == [[7]]
    assert top.proponents.scores.item() > 0 > top.opponents.scores.item()


# Invariances.


def test_grad_cos_ignores_the_scale_of_a_loss(score_once: Callable) -> None:
    """cos is unchanged when each example's loss is multiplied by its own positive number."""

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        return batch["weight"] * (model(batch["x"])[:, 0] - batch["y"]).square()

    def data(scale: Tensor) -> list[dict[str, Tensor]]:
        return [{"x": a, "y": b, "weight": c} for a, b, c in zip(x, y, scale, strict=True)]

    x, y = torch.randn(14, 5), torch.randn(14)
    scales = [torch.ones(14), torch.logspace(-2, 3, 14)]
    one, other = (
        score_once(linear_task(np.ones(5), weighted), data(s)[:11], data(s)[11:], "grad_cos")
        for s in scales
    )
    assert naive.relative_error(other, one) < TOLERANCE


def test_trak_ignores_a_rotation_of_the_parameters(score_once: Callable) -> None:
    """x → xQ, W → WQ leaves the function as it is and rotates every gradient."""
    x, _, rng = drawn(14, 5)
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    y, weight = torch.arange(14) % 3, rng.normal(size=(3, 5))

    def trak(turn: np.ndarray) -> np.ndarray:
        inputs = torch.tensor(x @ turn, dtype=torch.float32)
        task = linear_task(weight @ turn, "cross_entropy")
        return score_once(task, (inputs[:11], y[:11]), (inputs[11:], y[11:]), "trak")

    assert naive.relative_error(trak(rotation), trak(np.eye(5))) < TOLERANCE


def test_undamped_influence_ignores_any_invertible_reparametrisation(score_once: Callable) -> None:
    """x → xA, w → A⁻¹w leaves the function as it is: gᵀH⁻¹g' = (Aᵀg)ᵀ(AᵀHA)⁻¹(Aᵀg')."""
    x, w, rng = drawn(23, 5)
    y = x @ w + rng.normal(size=len(x))
    stretch = np.eye(5) + 0.4 * rng.normal(size=(5, 5))
    recipe = replace(tda.RECIPES["influence"], damping=0.0)

    def influence(a: np.ndarray) -> np.ndarray:
        task = linear_task(np.linalg.solve(a, w), "squared_error")
        return score_once(task, pairs(x[:20] @ a, y[:20]), pairs(x[20:] @ a, y[20:]), recipe)

    assert naive.relative_error(influence(stretch), influence(np.eye(5))) < 1e-4
