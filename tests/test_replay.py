"""Replay is the derivative of a training run by the weights of its examples.

The runs it is held against are torch.optim's own, with weights in the loss, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tda
from tda.errors import ConfigError, DataError, TaskError
from tda.replay import Training

NUM_TRAIN, NUM_QUERIES, WIDTH = 8, 3, 3
BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7, 0], [2, 2, 1], [7], [4, 3, 6], [0, 5]]  # ragged, one twice
RATES = [0.2, 0.1, 0.05, 0.2, 0.1, 0.3, 0.1]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "adam": {"optimizer": "adam", "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1},
}
KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=random, dtype=torch.float64)
    return inputs, torch.randint(3, (count,), generator=random)


QUERIES = examples(NUM_QUERIES, 1)


def training(**options: Any) -> Training:
    inputs, targets = examples(NUM_TRAIN, 0)
    given = {"model": classifier(), "learning_rate": RATES.__getitem__, "batches": BATCHES}
    return Training(**{**given, "inputs": inputs, "targets": targets, **options})


def test_a_model_that_keeps_an_activation_is_refused_by_its_name():
    model = classifier()
    model.hidden = model[0](examples(2, 0)[0])
    with pytest.raises(TaskError, match=r"cannot be copied[^§]*hidden[^§]*torch\.no_grad"):
        training(model=model).run()


def by_torch(run: Training, weights: Tensor) -> nn.Module:
    """The run by torch.optim, the loss of a batch being Σ w_i ℓ_i / |B|."""
    import copy

    model = copy.deepcopy(run.model)
    own = {"lr": 1.0, "weight_decay": run.weight_decay}
    if run.optimizer == "sgd":
        own["momentum"] = run.momentum
    else:
        own |= {"betas": run.betas, "eps": run.eps}
    optimizer = KINDS[run.optimizer](model.parameters(), **own)  # type: ignore[operator]
    for step, rows in enumerate(run.batches):
        optimizer.param_groups[0]["lr"] = run.rate(step)
        optimizer.zero_grad()
        rows = torch.as_tensor(rows)
        singles = [run.loss(model(run.inputs[i : i + 1]), run.targets[i : i + 1]) for i in rows]
        (weights[rows] @ torch.stack(singles) / len(rows)).backward()
        optimizer.step()
    return model


def log_odds(model: nn.Module, queries: tuple[Tensor, Tensor] = QUERIES) -> Tensor:
    with torch.no_grad():
        p = torch.softmax(model(queries[0]), 1).gather(1, queries[1][:, None])[:, 0]
    return torch.log(p / (1 - p))


def differences(run: Training, measure: Callable[[nn.Module], Tensor], h: float = 1e-5) -> Tensor:
    """Central differences of a measure of torch's run, by the weight of each example."""
    columns = []
    for i in range(len(run.inputs)):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(len(run.inputs), dtype=torch.float64)
            weights[i] += sign * h
            ends.append(measure(by_torch(run, weights)))
        columns.append((ends[0] - ends[1]) / (2 * h))
    return torch.stack(columns, dim=1)


def influence(run: Training, queries: Any = QUERIES, *given: Any, **options: Any) -> np.ndarray:
    return run.influence(queries, *given, progress=False, **options)


# ---- the derivative


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_influence_is_the_derivative_of_torchs_own_run(name):
    """∂f(z_q; θ_T(w))/∂w_i by central differences, for ragged batches and a schedule."""
    run = training(**OPTIMIZERS[name])
    expected = differences(run, log_odds)
    assert expected.abs().max() > 1e-3
    np.testing.assert_allclose(influence(run), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_is_torchs_run_and_repeats_to_the_bit(name):
    run = training(**OPTIMIZERS[name])
    weights = torch.linspace(0, 2, NUM_TRAIN, dtype=torch.float64)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    for given, counted in ((None, torch.ones_like(weights)), (weights, weights)):
        found, again, expected = run.run(given), run.run(given), by_torch(run, counted)
        for a, b, c in zip(*(m.parameters() for m in (found, again, expected)), strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-14)
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, before[key])


def test_units_without_a_gradient_have_no_part_in_adam():
    """√v has no derivative at 0, the second moment of a dead unit; differences are finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].bias[:2] = -100
    run = training(model=model, **{**OPTIMIZERS["adamw"], "weight_decay": 0.0})
    np.testing.assert_allclose(influence(run), differences(run, log_odds), rtol=1e-5, atol=1e-8)


class Attends(nn.Module):
    """Embedding, fused attention, layer norm, a frozen and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)[:, None]
        mixed = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(self.norm(x + mixed)[:, 0, -1])


def test_influence_on_an_attention_model_is_the_derivative():
    tokens = torch.randint(5, (NUM_TRAIN + NUM_QUERIES, 4))
    labels = torch.randint(5, (len(tokens),))
    run = training(model=Attends().double(), inputs=tokens[:NUM_TRAIN], targets=labels[:NUM_TRAIN])
    queries = (tokens[NUM_TRAIN:], labels[NUM_TRAIN:])
    expected = differences(run, lambda model: log_odds(model, queries))
    np.testing.assert_allclose(influence(run, queries), expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(run.run().norm.bias, run.model.norm.bias)


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return (output[:, 0] - target).square().mean() / 2


def test_ridge_by_gradient_descent_has_a_closed_form():
    """θ_t = θ* + (I−ηA)^t(θ_0−θ*) ; dθ_T/dw_i = Σ_t (I−ηA)^(T−1−t) η e_i(θ_t) x_i/n.

    A = XᵀX/n + ρI, e_i(θ) = y_i − x_iθ. The score is −∂ℓ_q = e_q(θ_T)·x_q dθ_T/dw_i.
    """
    rng = np.random.default_rng(0)
    n, steps, rate, ridge = 12, 23, 0.2, 0.3
    X, Q = rng.normal(size=(n, WIDTH)), rng.normal(size=(2, WIDTH))
    y, z = rng.normal(size=n), rng.normal(size=2)
    model = nn.Linear(WIDTH, 1, bias=False).double()
    start = model.weight.detach().numpy()[0]
    A = X.T @ X / n + ridge * np.eye(WIDTH)
    best, shrink = np.linalg.solve(A, X.T @ y / n), np.eye(WIDTH) - rate * A
    power = [np.linalg.matrix_power(shrink, t) for t in range(steps + 1)]
    theta = [best + P @ (start - best) for P in power]
    moved = sum(power[steps - 1 - t] @ X.T * (rate * (y - X @ theta[t]) / n) for t in range(steps))
    expected = (z - Q @ theta[-1])[:, None] * (Q @ moved)
    run = Training(
        model=model,
        inputs=torch.from_numpy(X),
        targets=torch.from_numpy(y),
        batches=np.tile(np.arange(n), (steps, 1)),
        loss=half_square,
        learning_rate=rate,
        weight_decay=ridge,
    )
    np.testing.assert_allclose(run.run().weight.detach().numpy()[0], theta[-1], rtol=1e-12)
    found = influence(run, (torch.from_numpy(Q), torch.from_numpy(z)), "mean_squared_error")
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize(("momentum", "rate"), [(0.0, 0.8), (0.5, 0.5)])
def test_at_the_minimum_of_a_convex_loss_it_is_the_influence_function(momentum, rate):
    """score = (1/n)·(−∇f_q)ᵀ H⁻¹ ∇ℓ_i with the exact Hessian of the regularised loss."""
    inputs, targets = examples(NUM_TRAIN, 0)
    decay = 0.3
    run = training(
        model=nn.Linear(WIDTH, 3).double(),
        batches=np.tile(np.arange(NUM_TRAIN), (80, 1)),
        learning_rate=rate,
        momentum=momentum,
        weight_decay=decay,
    )
    model = run.run()
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def logits(theta: Tensor, x: Tensor) -> Tensor:
        return x @ theta[: 3 * WIDTH].reshape(3, WIDTH).T + theta[3 * WIDTH :]

    def loss(theta: Tensor) -> Tensor:
        return F.cross_entropy(logits(theta, inputs), targets) + decay / 2 * theta @ theta

    def margins(theta: Tensor) -> Tensor:
        p = torch.softmax(logits(theta, QUERIES[0]), 1).gather(1, QUERIES[1][:, None])[:, 0]
        return torch.log(p / (1 - p))

    def losses(theta: Tensor) -> Tensor:
        return F.cross_entropy(logits(theta, inputs), targets, reduction="none")

    slopes = torch.autograd.functional.jacobian
    hessian = torch.autograd.functional.hessian(loss, theta)
    expected = -slopes(margins, theta) @ torch.linalg.solve(hessian, slopes(losses, theta).T)
    np.testing.assert_allclose(influence(run), expected / NUM_TRAIN, rtol=1e-6, atol=1e-9)


# ---- what it does not depend on


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("stride", [1, 3, 99])
def test_states_computed_again_are_states_kept(name, stride, monkeypatch):
    run = training(**OPTIMIZERS[name])
    expected = influence(run)
    monkeypatch.setattr(Training, "_stride", stride)
    np.testing.assert_array_equal(influence(run), expected)


def test_queries_do_not_meet(monkeypatch):
    """Their order permutes rows, their company changes nothing, and their sum is the sum."""
    run = training(**OPTIMIZERS["adam"])
    found, order = influence(run), [2, 0, 1]
    permuted = influence(run, tuple(array[order] for array in QUERIES))
    np.testing.assert_allclose(permuted, found[order], rtol=1e-12)
    for size in (1, 2):
        np.testing.assert_allclose(influence(run, batch_size=size), found, rtol=1e-10, atol=1e-16)
    monkeypatch.setattr("tda.replay.training._BUDGET", 1)  # one at a time
    np.testing.assert_allclose(influence(run), found, rtol=1e-10, atol=1e-16)
    summed = influence(run, aggregate=True)
    np.testing.assert_allclose(summed, found.sum(0, keepdims=True), rtol=1e-10, atol=1e-16)


def test_the_order_of_training_examples_permutes_columns():
    run, order = training(**OPTIMIZERS["momentum"]), torch.randperm(NUM_TRAIN)
    place = torch.argsort(order)
    moved = replace(
        run,
        inputs=run.inputs[order],
        targets=run.targets[order],
        batches=[place[torch.tensor(rows)] for rows in BATCHES],
    )
    np.testing.assert_allclose(influence(moved), influence(run)[:, order], rtol=1e-12)


def test_gradients_may_be_off_where_it_is_called():
    run = training()
    expected = influence(run)
    with torch.no_grad():
        np.testing.assert_array_equal(influence(run), expected)


def test_an_example_that_was_never_seen_has_no_influence():
    found = influence(training(batches=[[0, 1], [2, 3]]))
    assert (found[:, 4:] == 0).all()
    assert (found[:, :4] != 0).all()


def test_the_loss_of_a_query_falls_by_its_share_of_the_margin():
    """−∂ℓ = (1−p)·∂f for cross-entropy."""
    run = training()
    p = torch.sigmoid(log_odds(run.run())).numpy()
    expected = (1 - p)[:, None] * influence(run)
    np.testing.assert_allclose(influence(run, gradient="loss"), expected, rtol=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_goes_on_from_a_checkpoint_to_the_end_of_the_run(name):
    run = training(**OPTIMIZERS[name])
    middle, last = run.checkpoints([7, 4])
    assert (middle.step, last.step) == (4, 7)
    assert (middle.learning_rate, last.learning_rate) == (RATES[3], RATES[6])
    assert middle.learning_rate_sum == pytest.approx(sum(RATES[:4]))
    model = classifier()
    model.load_state_dict(middle.load())
    optimizer = KINDS[run.optimizer](model.parameters(), lr=1.0)
    optimizer.load_state_dict(middle.load_optimizer())
    for step in (4, 5, 6):
        optimizer.param_groups[0]["lr"] = RATES[step]
        optimizer.zero_grad()
        F.cross_entropy(model(run.inputs[BATCHES[step]]), run.targets[BATCHES[step]]).backward()
        optimizer.step()
    for key, value in run.run().state_dict().items():
        assert torch.equal(value, last.load()[key])
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-12, atol=1e-14)
    with pytest.raises(ConfigError):
        run.checkpoints([8])


def test_the_engine_reads_the_optimizer_of_a_checkpoint():
    run = training(**OPTIMIZERS["momentum"])
    task = tda.Task(run.model, checkpoints=run.checkpoints([3, 7]))
    record = task.manifest()["checkpoints"][1]
    wanted = {"momentum": 0.9, "weight_decay": 0.1, "step": 7, "optimizer": "sgd"}
    assert {name: record[name] for name in wanted} == wanted


# ---- what is refused


def test_a_run_that_ended_elsewhere_is_refused():
    run = training()
    final = run.run().state_dict()
    rounded = {name: value.float() for name, value in final.items()}
    influence(replace(run, final=rounded))
    for other in (
        replace(run, final=final, momentum=0.1),
        replace(run, final=final, batches=BATCHES[:-1]),
    ):
        with pytest.raises(TaskError, match="not how the final weights were made"):
            influence(other)
    with pytest.raises(TaskError, match="not weights of this model"):
        replace(run, final={"0.weight": final["0.weight"]}).run()


class Drifts(nn.Module):
    """Another function after a number of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(WIDTH, 3).double(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * (2 if self.calls > 14 else 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": nn.Sequential(nn.Dropout(), classifier())}, "another loss each time"),
        ({"model": Drifts()}, "other weights the second time"),
        ({"model": nn.Sequential(nn.BatchNorm1d(WIDTH), classifier()).double()}, "batch norm"),
        ({"model": classifier().requires_grad_(False)}, "no parameter"),
        ({"loss": lambda out, y: F.cross_entropy(out, y, reduction="sum")}, "not the mean"),
        ({"learning_rate": 1e200, "weight_decay": 1.0}, "diverges"),
    ],
)
def test_a_run_that_cannot_be_replayed_is_refused(options, match):
    with pytest.raises(TaskError, match=match):
        influence(training(**options))


def test_dropout_and_batch_norm_that_were_off_are_constants():
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(), classifier()).double().eval()
    run = training(model=model)
    np.testing.assert_allclose(influence(run), differences(run, log_odds), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ConfigError, {"optimizer": "lion"}),
        (ConfigError, {"optimizer": "adam", "momentum": 0.9}),
        (DataError, {"targets": torch.zeros(3)}),
        (DataError, {"batches": []}),
        (DataError, {"batches": [[0], []]}),
        (DataError, {"batches": [[NUM_TRAIN]]}),
    ],
)
def test_what_is_no_training_is_refused(error, options):
    with pytest.raises(error):
        training(**options)


def test_weights_are_one_number_an_example():
    with pytest.raises(DataError):
        training().run(torch.ones(3))
