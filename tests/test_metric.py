"""The metric of gradients: scaled by Adam's moments, number by number, before projection."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import naive
import numpy as np
import problems
import pytest
import torch
from torch import Tensor, nn

import tda
from tda.errors import ConfigError, MismatchError, TaskError
from tda.gradients import Dense, Lookup, shapes_of
from tda.gradients.factors import materialise
from tda.projection import Projection
from tda.run import Run
from tda.training.metric import Scaling

BETAS, EPS, RATE = (0.8, 0.95), 1e-4, 0.01
SCALED = {"adam": -0.5, "second_moment": -1.0}


class Trained:
    """A model trained with a real torch optimizer, by a loss of its own; and its data."""

    def __init__(
        self, make: Callable[[], nn.Module], data: list[Any], decay: bool = False, **settings: Any
    ) -> None:
        torch.manual_seed(3)
        self.data = data
        self.model = make()
        kept = {"lr": RATE, "betas": BETAS, "eps": EPS, **settings}
        kind = torch.optim.AdamW if decay else torch.optim.Adam
        self.optimizer = kind(self.model.parameters(), **kept)
        self.checkpoints = []
        for _ in range(2):
            for _ in range(3):
                self.step(self.model, self.optimizer, data)
            weights = copy.deepcopy(self.model.state_dict())
            state = copy.deepcopy(self.optimizer.state_dict())
            self.checkpoints.append(tda.Checkpoint(weights, optimizer=state))

    @staticmethod
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Any]) -> None:
        optimizer.zero_grad()
        inputs, targets = (torch.stack([pair[i] for pair in data]) for i in (0, 1))
        inputs = inputs.to(next(model.parameters()).dtype) if inputs.is_floating_point() else inputs
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    def task(self, metric: str, **options: Any) -> tda.Task:
        return tda.Task(self.model, self.checkpoints, metric=metric, **options)

    def rows(self, checkpoint: int) -> naive.Rows:
        """∇f and ∇ℓ by the oracle."""
        weights = self.checkpoints[checkpoint].weights
        assert isinstance(weights, dict)
        return naive.rows(self.model, weights, self.data, problems.classified)

    def deviation(self, checkpoint: int) -> np.ndarray:
        """√v̂ + ε of all parameters in the model's order, [p], float64."""
        state: Any = self.checkpoints[checkpoint].optimizer
        moments = [state["state"][i] for i in range(len(state["state"]))]
        second = [m.get("max_exp_avg_sq", m["exp_avg_sq"]).double().flatten() for m in moments]
        corrected = torch.cat(second) / (1 - BETAS[1] ** moments[0]["step"].item())
        return (corrected.sqrt() + EPS).numpy()

    def steps(self, checkpoint: int) -> np.ndarray:
        """What one real step of the optimizer on each example alone adds to the weights [n, p]."""
        kept, moved = self.checkpoints[checkpoint], []
        for pair in self.data:
            model = copy.deepcopy(self.model).double()
            model.load_state_dict(dict(kept.weights))
            optimizer = type(self.optimizer)(model.parameters())
            state: Any = copy.deepcopy(kept.optimizer)
            for entry in state["state"].values():
                entry.update({n: t.double() for n, t in entry.items() if n != "step"})
            optimizer.load_state_dict(state)
            before = nn.utils.parameters_to_vector(model.parameters()).detach()
            self.step(model, optimizer, [pair])
            after = nn.utils.parameters_to_vector(model.parameters()).detach()
            moved.append((after - before).numpy())
        return np.stack(moved)


def pictures(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 6, 6, generator=generator), torch.tensor(i % 3)) for i in range(count)]


def texts(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Eight tokens of twenty each: most rows of an embedding are not looked up."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(20, (8,), generator=generator), torch.tensor(i % 3)) for i in range(count)
    ]


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 3))


def bag() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(torch.tanh(net.token(x)).mean(1))

    return models.Net(run, token=nn.Embedding(20, 4), head=nn.Linear(4, 3))


MAKES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "cnn": (cnn, pictures),
    "mlp": (mlp, pictures),
    "bag": (bag, texts),
}


@pytest.fixture(scope="module", params=list(MAKES))
def trained(request: pytest.FixtureRequest) -> Trained:
    make, data = MAKES[request.param]
    return Trained(make, data())


@pytest.fixture(scope="module")
def small() -> Trained:
    return Trained(mlp, pictures())


def stored(run: Run, checkpoint: int, table: str = "train") -> np.ndarray:
    """Rows of a table in float64."""
    found = run.store.table(table)
    return found.rows(checkpoint, 0, found.num_rows).double().numpy()


def column(run: Run, name: str, table: str = "train") -> np.ndarray:
    return run.store.table(table).column(name)


# The rows are what the definitions say.


@pytest.mark.parametrize("metric", list(SCALED))
def test_rows_are_gradients_over_a_power_of_adams_deviation(
    trained: Trained, index_exactly: Callable[..., Run], metric: str
):
    """∇f ⊙ (√v̂ + ε)^power, for training examples and queries alike; the columns are ∇f's own."""
    run = index_exactly(trained.task(metric), trained.data, batch_size=4)
    run.add_queries(trained.data[:3], "q", batch_size=2)
    for checkpoint in range(2):
        plain = trained.rows(checkpoint)
        wanted = plain.df * trained.deviation(checkpoint) ** SCALED[metric]
        assert naive.row_error(stored(run, checkpoint), wanted) < 1e-4
        assert naive.row_error(stored(run, checkpoint, "queries/q"), wanted[:3]) < 1e-4
        norms = np.linalg.norm(plain.df, axis=1)
        np.testing.assert_allclose(column(run, "grad_norm")[checkpoint], norms, rtol=1e-4)
        np.testing.assert_allclose(column(run, "slope")[checkpoint], plain.slope, rtol=1e-4)


def test_with_the_second_moment_of_its_own_rows_every_coordinate_counts_alike(
    small: Trained, index_exactly: Callable[..., Run]
):
    """V = mean_i ∇ℓ_i², ε = 0: the mean of (V^{−½}∇ℓ_i)² is 1 in every coordinate."""
    square = torch.from_numpy((small.rows(0).dl ** 2).mean(0)).float()
    alive = (square > 1e-12).numpy()
    state: Any = copy.deepcopy(small.checkpoints[0].optimizer)
    state["param_groups"][0]["eps"] = 0.0
    parameters = list(small.model.parameters())
    parts = square.clamp(min=1e-12).split([p.numel() for p in parameters])
    for entry, parameter, part in zip(state["state"].values(), parameters, parts, strict=True):
        entry.update(exp_avg_sq=part.reshape(parameter.shape), step=10**6)
    checkpoint = dataclasses.replace(small.checkpoints[0], optimizer=state)
    run = index_exactly(tda.Task(small.model, checkpoint, metric="second_moment"), small.data)
    found = stored(run, 0) * column(run, "slope")[0][:, None]
    assert alive.sum() > 100
    np.testing.assert_allclose((found**2).mean(0)[alive], 1.0, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}], ids=["adam", "amsgrad"])
def test_an_update_is_what_one_step_of_torchs_adam_does(
    trained: Trained, index_exactly: Callable[..., Run], settings: dict[str, Any]
):
    """row·η = the move of the weights in one real step, from the saved state, on that example."""
    if settings:
        trained = Trained(lambda: copy.deepcopy(trained.model), trained.data, **settings)
    run = index_exactly(trained.task("adam_update"), trained.data, batch_size=4)
    for checkpoint in range(2):
        wanted = trained.steps(checkpoint)
        assert naive.row_error(RATE * stored(run, checkpoint), wanted) < 1e-4


def test_decoupled_weight_decay_is_no_part_of_an_update(index_exactly: Callable[..., Run]):
    """AdamW moves the weights by −η(Γ + weight_decay·θ): the example is answerable for Γ."""
    trained = Trained(mlp, pictures(), decay=True, weight_decay=0.3)
    run = index_exactly(trained.task("adam_update"), trained.data)
    weights = nn.utils.parameters_to_vector(trained.model.parameters()).detach().double().numpy()
    wanted = trained.steps(1) + RATE * 0.3 * weights
    assert naive.row_error(RATE * stored(run, 1), wanted) < 1e-4


def test_query_rows_of_updates_are_plain_gradients(
    trained: Trained, index_exactly: Callable[..., Run]
):
    run = index_exactly(trained.task("adam_update"), trained.data)
    run.add_queries(trained.data[:3], "q")
    plain = trained.rows(1)
    assert naive.row_error(stored(run, 1, "queries/q"), plain.df[:3]) < 1e-4
    np.testing.assert_allclose(column(run, "slope", "queries/q")[1], plain.slope[:3], rtol=1e-4)


def test_a_positive_product_means_that_the_step_lowers_the_querys_loss(
    small: Trained, index_exactly: Callable[..., Run]
):
    """grad_dot over updates is −∇ℓ_q·Δθ_i/η, Δθ_i being the real optimizer's step."""
    run = index_exactly(small.task("adam_update"), small.data)
    run.add_queries(small.data, "q")
    for slope, curvature in zip(column(run, "slope")[1], column(run, "curvature")[1], strict=True):
        assert (slope, curvature) == (-1.0, 1.0)
    steps = [small.steps(c) / RATE for c in range(2)]
    wanted = np.mean([-small.rows(c).dl @ steps[c].T for c in range(2)], axis=0)
    assert naive.relative_error(run.scores("q", "grad_dot").compute(), wanted) < 1e-4


def test_columns_of_updates_are_those_of_the_gradient(
    small: Trained, index_exactly: Callable[..., Run]
):
    run = index_exactly(small.task("adam_update"), small.data)
    plain = small.rows(0)
    np.testing.assert_allclose(column(run, "loss")[0], plain.loss, rtol=1e-4)
    np.testing.assert_allclose(column(run, "p")[0], plain.p, rtol=1e-4)
    norms = np.linalg.norm(plain.df, axis=1)
    np.testing.assert_allclose(column(run, "grad_norm")[0], norms, rtol=1e-4)


# Projected.


def matrix_of(projection: Projection, shapes: dict[str, tuple[int, int]]) -> np.ndarray:
    """P [dim, p] of a projection, column by column: the rows of unit gradients."""
    columns = []
    projector = projection.bind(shapes)
    for name, (rows, width) in shapes.items():
        units = torch.eye(rows * width).reshape(-1, rows, width)
        buffer = projector.zeros(len(units))
        projector.add(buffer, name, [Dense(units)])
        columns.append(projector.rows(buffer).T)
    return torch.cat(columns, dim=1).double().numpy()


@pytest.mark.parametrize("kind", ["count_sketch", "rademacher"])
@pytest.mark.parametrize("metric", ["adam", "second_moment", "adam_update"])
def test_scaling_comes_before_projection(
    trained: Trained, index_exactly: Callable[..., Run], kind: str, metric: str
):
    projection = Projection(kind, dim=24, seed=5)
    run = index_exactly(trained.task(metric), trained.data, projection=projection, batch_size=4)
    if metric == "adam_update":
        whole = trained.steps(1) / RATE
    else:
        whole = trained.rows(1).df * trained.deviation(1) ** SCALED[metric]
    wanted = whole @ matrix_of(projection, shapes_of(trained.model)).T
    assert naive.row_error(stored(run, 1), wanted) < 1e-4
    assert "rank_one" not in run.store.manifest["projection"]


@pytest.mark.parametrize("basis", ["random", "eigen"])
@pytest.mark.parametrize("kind", ["kronecker", "two_stage"])
def test_bases_are_those_of_scaled_gradients(
    trained: Trained, index_exactly: Callable[..., Run], kind: str, basis: str
):
    """With bases of full rank a Kronecker projection only turns rows: inner products stay."""
    projection = Projection(kind, dim=10**6, rank=10**3, basis=basis)
    run = index_exactly(trained.task("adam"), trained.data, projection=projection)
    scaled = trained.rows(1).df * trained.deviation(1) ** -0.5
    found = stored(run, 1)
    assert naive.relative_error(found @ found.T, scaled @ scaled.T) < 1e-4


def test_a_basis_of_other_gradients_is_refused(small: Trained, tmp_path: Path):
    projection = Projection("kronecker", dim=50)
    with pytest.raises(ConfigError, match="adam_update"):
        tda.index(
            small.task("adam_update"), small.data, tmp_path / "run", projection=projection,
            progress=False,
        )  # fmt: skip
    assert not (tmp_path / "run" / "projection.npz").exists()


def test_looked_up_rows_are_scaled_as_such():
    """An embedding's gradient stays a lookup: only rows that were used are formed."""
    index, value = torch.tensor([[3, 1, 3]]), torch.randn(1, 3, 2)
    scale = torch.rand(5, 2)
    factor = Lookup(index, value, 5)
    (scaled,) = Scaling({"w": scale})("w", [factor])
    assert isinstance(scaled, Lookup)
    torch.testing.assert_close(materialise([scaled]), materialise([factor]) * scale)


# A run in a metric is a run of its own.


@pytest.mark.parametrize("metric", ["adam", "adam_update"])
def test_rows_do_not_depend_on_the_batch(
    trained: Trained, index_exactly: Callable[..., Run], metric: str
):
    whole, single = (
        index_exactly(trained.task(metric), trained.data, batch_size=size) for size in (6, 1)
    )
    for checkpoint in range(2):
        assert naive.row_error(stored(single, checkpoint), stored(whole, checkpoint)) < 1e-5


def test_an_update_of_what_an_example_does_not_use_is_adams_own_move(
    index_exactly: Callable[..., Run],
):
    """A parameter that a whole batch leaves alone moves by its mean, as with a zero gradient."""

    def run_net(net: Any, x: Tensor) -> Tensor:
        h = net.always(x.flatten(1))
        return net.sometimes(h) if x.mean() > 0 else h

    def make() -> nn.Module:
        return models.Net(run_net, always=nn.Linear(72, 3), sometimes=nn.Linear(3, 3))

    torch.manual_seed(0)
    high = [(torch.rand(2, 6, 6) + 1, torch.tensor(i % 3)) for i in range(4)]
    trained = Trained(make, high)
    low = [(-image, label) for image, label in high]
    run = index_exactly(trained.task("adam_update"), low)
    state: Any = trained.checkpoints[1].optimizer
    grown = state["state"][2]["step"].item() + 1
    mean, square = (
        torch.cat([state["state"][i][name].double().flatten() for i in (2, 3)])
        for name in ("exp_avg", "exp_avg_sq")
    )
    mean = mean * BETAS[0] / (1 - BETAS[0] ** grown)
    gamma = mean / ((square * BETAS[1] / (1 - BETAS[1] ** grown)).sqrt() + EPS)
    found = stored(run, 1)[:, -len(gamma) :]
    np.testing.assert_allclose(found, np.tile(-gamma.numpy(), (4, 1)), rtol=1e-4, atol=1e-6)


def test_another_metric_is_refused_by_name(small: Trained, tmp_path: Path):
    def index(metric: str) -> Run:
        return tda.index(small.task(metric), small.data, tmp_path / "run", progress=False)

    run = index("adam")
    assert run.store.manifest["metric"] == "adam"
    assert index("adam").store.manifest == run.store.manifest
    for metric in ("euclidean", "second_moment"):
        with pytest.raises(MismatchError, match=f"another metric\n.*\n.*metric = '{metric}'"):
            index(metric)
        with pytest.raises(MismatchError, match="another metric"):
            tda.open(tmp_path / "run", small.task(metric))
    assert tda.open(tmp_path / "run", small.task("adam")).queries == []


def test_a_euclidean_run_says_nothing_of_a_metric(
    small: Trained, index_exactly: Callable[..., Run]
):
    run = index_exactly(small.task("euclidean"), small.data)
    assert "metric" not in run.store.manifest
    with pytest.raises(MismatchError, match="another metric"):
        tda.open(run.path, small.task("adam"))


def test_other_moments_are_another_run(small: Trained, tmp_path: Path):
    tda.index(small.task("adam"), small.data, tmp_path / "run", progress=False)
    first, second = small.checkpoints
    swapped = [dataclasses.replace(first, optimizer=second.optimizer), second]
    task = tda.Task(small.model, swapped, metric="adam")
    with pytest.raises(MismatchError, match=r"checkpoints\[0\]"):
        tda.open(tmp_path / "run", task)


def test_moments_of_a_parameter_that_was_not_trained_are_not_needed_when_it_is_frozen(
    index_exactly: Callable[..., Run],
):
    model = mlp()
    model[1].requires_grad_(False)
    trained = Trained(lambda: model, pictures())
    run = index_exactly(trained.task("adam"), trained.data)
    assert run.store.manifest["projection"]["dim"] == 18
    model[1].requires_grad_(True)
    with pytest.raises(TaskError, match=r"no moments of parameter '1\.weight'"):
        index_exactly(trained.task("adam"), trained.data)
