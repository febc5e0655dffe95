"""Stored rows are per-example gradients, and whatever cannot be one is refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from models import Net, free
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import tda
from tda.errors import GradientError, TaskError, TdaError
from tda.gradients import Gradients
from tda.gradients.factors import materialise
from tda.measurements import MEASUREMENTS, as_measurement
from tda.run import Run
from tda.task import Task

TOLERANCE = 1e-5
X, Y = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4
X = X[X[:, 0, 0].argsort()]


def classify(model: nn.Module) -> Task:
    """A task of one checkpoint: the model as it is."""
    return tda.Task(model, checkpoints=[model.state_dict()], measurement="cross_entropy")


def sequences() -> problems.Listed:
    """Inputs [3, 5] in four classes."""
    return problems.Listed([(x, int(y)) for x, y in zip(X, Y, strict=True)])


@pytest.mark.parametrize("name", problems.NAMES)
def test_rows_are_the_gradients_of_single_examples(name: str, indexed: Callable) -> None:
    case = indexed(name)
    for c, wanted in enumerate(case.train):
        assert naive.row_error(case.stored(c), wanted.df) < TOLERANCE


@pytest.mark.parametrize("name", problems.NAMES)
def test_columns_are_the_link_between_output_and_loss(name: str, indexed: Callable) -> None:
    case = indexed(name)
    table = case.run.store.table("train")
    for column, of in {
        "loss": lambda rows: rows.loss,
        "slope": lambda rows: rows.slope,
        "curvature": lambda rows: rows.curvature,
        "grad_norm": lambda rows: np.linalg.norm(rows.df, axis=1),
    }.items():
        wanted = np.stack([of(rows) for rows in case.train])
        assert naive.relative_error(table.column(column), wanted) < TOLERANCE, column
    p = np.stack([rows.p for rows in case.train])
    np.testing.assert_allclose(table.column("p"), p, rtol=TOLERANCE)  # NaN where undefined


# Models that a tap may not see through: right, or refused.


def routed(net: Any, x: Tensor) -> Tensor:
    """Each example goes through one of two layers: they see part of the batch."""
    first, h = x[:, 0, 0] > 0, x.new_zeros(len(x), 4)
    h[first] = net.one(x.mean(1)[first])
    h[~first] = net.two(x.mean(1)[~first])
    return h


def late(net: Any, x: Tensor) -> Tensor:
    """A parameter that no example of the first batches uses."""
    chosen, h = x[:, 0, 0] > 0, net.one(x.mean(1))
    return h + chosen[:, None] * (x.mean(1) @ net.w**2) if chosen.any() else h


def sorted_batch(net: Any, x: Tensor) -> Tensor:
    """The layer sees the examples in another order."""
    order = x.sum((1, 2)).argsort()
    return net.one(x.mean(1)[order])[order.argsort()]


class Cubed(torch.autograd.Function):
    """x³ with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grads[0]


class Scaled(torch.autograd.Function):
    """x·w² with a backward of its own, also to w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] * w * w, (grads[0] * x * 2 * w).sum(0)


def linear(out: int = 4, inner: int = 5) -> nn.Module:
    return nn.Linear(inner, out)


STRANGE: dict[str, Callable[[], nn.Module]] = {
    "routed": lambda: Net(routed, one=linear(), two=linear()),
    "late": lambda: Net(late, one=linear(), w=free(5, 4)),
    "sorted_batch": lambda: Net(sorted_batch, one=linear()),
    "stacked_batches": lambda: Net(
        lambda net, x: net.one(torch.cat([x, -x])).reshape(2, len(x), 3, 4).prod(0).sum(1),
        one=linear(),
    ),
    "interleaved": lambda: Net(
        lambda net, x: net.one(x.repeat_interleave(2, 0)).unflatten(0, (-1, 2))[:, 1].sum(1),
        one=linear(),
    ),
    "one_call_an_example": lambda: Net(
        lambda net, x: torch.stack([net.one(row).sum(0) for row in x]), one=linear()
    ),
    "unused_parameter": lambda: Net(lambda net, x: net.one(x.sum(1)), one=linear(), two=linear()),
    "reentrant_checkpoint": lambda: Net(
        lambda net, x: checkpoint(net.one, x.sum(1), use_reentrant=x.dtype == torch.float32),
        one=linear(),
    ),
    "checkpoint": lambda: Net(
        lambda net, x: net.two(checkpoint(net.one, x.sum(1), use_reentrant=False).tanh()),
        one=linear(5),
        two=linear(),
    ),
    "sliced_weight": lambda: Net(lambda net, x: F.linear(x.sum(1), net.w[:4, 1:]), w=free(6, 6)),
    "concatenated_weight": lambda: Net(
        lambda net, x: x.sum(1) @ torch.cat([net.w, net.v], 1), w=free(5, 3), v=free(5, 1)
    ),
    "product_of_parameters": lambda: Net(
        lambda net, x: F.linear(x.sum(1), net.u @ net.v), u=free(4, 2), v=free(2, 5)
    ),
    "expanded_weight": lambda: Net(
        lambda net, x: torch.bmm(x, net.w.expand(len(x), 5, 4)).sum(1), w=free(5, 4)
    ),
    "own_backward": lambda: Net(lambda net, x: Cubed.apply(net.one(x.sum(1))), one=linear()),
    "penalty_inside": lambda: Net(
        lambda net, x: net.one(x.sum(1)) * (1 + net.one.weight.square().sum()), one=linear()
    ),
    "gru_cell": lambda: Net(
        lambda net, x: net.cell(x[:, 1], net.cell(x[:, 0])), cell=nn.GRUCell(5, 4)
    ),
    "attention_position_first": lambda: Net(
        lambda net, x: net.one(net.mix(*[x.transpose(0, 1)] * 3)[0][0]),
        mix=nn.MultiheadAttention(5, 1),
        one=linear(),
    ),
    "position_first": lambda: Net(
        lambda net, x: net.two(net.one(x.transpose(0, 1)).tanh().mean(0)),
        one=linear(6),
        two=linear(4, 6),
    ),
    "embedding_bag": lambda: Net(
        lambda net, x: net.bag(x.abs().mul(2).long().clamp(max=6).flatten(1)),
        bag=nn.EmbeddingBag(7, 4, mode="mean"),
    ),
    "shared_over_batch": lambda: Net(  # positions of batch 1, as in many language models
        lambda net, x: net.one((x + net.place(torch.arange(3)[None])).tanh().sum(1)),
        place=nn.Embedding(3, 5),
        one=linear(),
    ),
    "table_through_a_layer": lambda: Net(  # the layer never sees the batch
        lambda net, x: x.sum(1) @ net.one(net.w).tanh(), one=linear(4), w=free(5, 5)
    ),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant
@pytest.mark.parametrize("batch_size", [1, 3, 5], ids=["one", "as_positions", "as_features"])
@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_model_is_right_or_refused(
    name: str, batch_size: int, index_exactly: Callable
) -> None:
    """Also where the batch is as long as another axis."""
    torch.manual_seed(3)
    model, data = STRANGE[name](), sequences()
    wanted = naive.rows(model, model.state_dict(), data, problems.classified).df
    try:
        run = index_exactly(classify(model), data, batch_size=batch_size)
    except GradientError:
        return
    assert naive.row_error(run.store.table("train").rows(0, 0, 12).numpy(), wanted) < TOLERANCE


def test_a_lone_example_does_not_stand_for_a_batch(index_exactly: Callable) -> None:
    """Of one example the tap separates what it cannot of several: these are audited for it."""
    model, data = STRANGE["position_first"](), sequences()
    wanted = naive.rows(model, model.state_dict(), data, problems.classified).df
    path = index_exactly(classify(model), data).path
    run = tda.open(path, classify(model))
    run.add_queries(problems.Listed(data.examples[:1]), "one")
    assert run.featurizer().audit.path == "tap"
    run.add_queries(problems.Listed(data.examples[1:6]), "five", batch_size=5)
    assert run.featurizer().audit.path == "vmap"
    for name, span in {"one": slice(0, 1), "five": slice(1, 6)}.items():
        found = run.store.table(f"queries/{name}").rows(0, 0, span.stop - span.start).numpy()
        assert naive.row_error(found, wanted[span]) < TOLERANCE, name


def test_an_example_without_a_gradient_is_audited_as_others_are() -> None:
    """∇f = 0 exactly, where the tap takes it for that of another example."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.one(x.transpose(0, 1)).relu().sum(0)

    model, measurement = Net(run, one=nn.Linear(5, 4)), as_measurement(lambda m, b: m(b[0]).sum(1))
    nn.init.zeros_(model.one.bias)
    nn.init.ones_(model.one.weight)
    x = torch.stack([-torch.ones(2, 5), torch.ones(2, 5)])
    gradients, found = Gradients(model, measurement), {}
    gradients((x,), 2, lambda name, factors: found.update({name: materialise(factors)}))
    assert gradients.audited.path == "vmap"
    assert not found["one.weight"][0].any() and (found["one.weight"][1] == 2).all()


COUPLED: dict[str, Callable[[], nn.Module]] = {
    "batch_norm_without_statistics": lambda: nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(15, track_running_stats=False), nn.Linear(15, 4)
    ),
    "centred_on_the_batch": lambda: Net(
        lambda net, x: net.two(net.one((x - x.mean(0)).sum(1)).tanh()),
        one=linear(),
        two=linear(4, 4),
    ),
    "attends_over_the_batch": lambda: Net(
        lambda net, x: net.one(torch.softmax(x.sum(1) @ x.sum(1).T, 1) @ x.sum(1)), one=linear()
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_model_that_mixes_examples_is_refused(name: str, index_exactly: Callable) -> None:
    with pytest.raises(GradientError):
        index_exactly(classify(COUPLED[name]()), sequences())


@pytest.mark.parametrize("name", sorted(COUPLED.keys() - {"batch_norm_without_statistics"}))
def test_a_model_that_mixes_examples_is_refused_after_a_lone_one(name: str) -> None:
    gradients, (x, y) = Gradients(COUPLED[name](), as_measurement("cross_entropy")), (X[:4], Y[:4])
    gradients((x[:1], y[:1]), 1, lambda name, factors: None)
    for _ in range(2):  # no more the second time
        with pytest.raises(GradientError, match="mixes the examples"):
            gradients((x, y), 4, lambda name, factors: None)


def test_bfloat16_autocast_loses_only_bfloat16(index_exactly: Callable) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=net.one.weight.dtype == torch.float32):
            return net.two(torch.tanh(net.one(x.sum(1))))

    model = Net(run, one=linear(6), two=linear(4, 6))
    wanted = naive.rows(model, model.state_dict(), sequences(), problems.classified).df
    found: Run = index_exactly(classify(model), sequences())
    assert naive.row_error(found.store.table("train").rows(0, 0, 12).numpy(), wanted) < 0.03


# What a failed or finished run leaves behind.


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that indexing might disturb in a model, by name."""
    flags: dict[str, Any] = {f"training {n}": m.training for n, m in model.named_modules()}
    flags |= {f"hooks {n}": len(m._forward_hooks) for n, m in model.named_modules()}
    for name, parameter in model.named_parameters():
        flags |= {f"needs grad {name}": parameter.requires_grad, f"grad {name}": parameter.grad}
    return flags | {name: value.tolist() for name, value in model.state_dict().items()}


def batch_normed() -> nn.Module:
    """In training mode but for one part, one parameter frozen."""
    model: Any = problems.problem("norms").make().train()
    model[1].eval()
    model[9].bias.requires_grad_(False)
    return model


class Fails(nn.Module):
    """A model whose forward pass raises from the third call on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("out of order")
        return self.model(x)


def test_indexing_leaves_the_model_as_it_was(index_exactly: Callable, task_of: Callable) -> None:
    problem, model = problems.problem("norms"), batch_normed()
    before = state_of(model)
    saved = [tda.Checkpoint(w.state) for w in problem.checkpoints]
    task = tda.Task(model, checkpoints=saved, measurement="cross_entropy")
    run = index_exactly(task, problem.train)
    run.scores(problem.queries, recipe="grad_dot").compute()
    assert state_of(model) == before


def test_batch_norm_and_dropout_are_evaluated_even_in_training_mode(
    index_exactly: Callable,
) -> None:
    problem, model = problems.problem("norms"), batch_normed()
    weights = problem.checkpoints[1].state
    task = tda.Task(model, checkpoints=[weights], measurement="cross_entropy")
    wanted = naive.rows(model, weights, problem.train, problem.outcome).df
    run = index_exactly(task, problem.train)
    assert naive.row_error(run.store.table("train").rows(0, 0, 10).numpy(), wanted) < TOLERANCE


def test_a_failure_leaves_the_model_as_it_was(index_exactly: Callable) -> None:
    model = Fails(batch_normed())
    before = state_of(model)
    task = classify(model)
    with pytest.raises((RuntimeError, TdaError), match="out of order"):
        index_exactly(task, problems.problem("norms").train, batch_size=2)
    assert state_of(model) == before


def test_a_function_with_a_backward_of_its_own_gives_its_parameter_a_gradient(
    index_exactly: Callable,
) -> None:
    """Though no gradient is recorded inside its forward."""
    model = Net(lambda net, x: net.one(Scaled.apply(x.sum(1), net.w)), one=linear(), w=free(5))
    wanted = naive.rows(model, model.state_dict(), sequences(), problems.classified).df
    run = index_exactly(classify(model), sequences(), batch_size=4)
    assert naive.row_error(run.store.table("train").rows(0, 0, 12).numpy(), wanted) < TOLERANCE
    assert "w is used where gradients are switched off" in str(run.featurizer().audit)


def test_a_parameter_used_without_gradients_is_refused_by_name(index_exactly: Callable) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = net.two(x.sum(1))
        return net.one(hidden)

    with pytest.raises(GradientError, match=r"switched off[^§]*two\.(weight|bias)"):
        index_exactly(classify(Net(run, one=linear(), two=linear(5))), sequences())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0], ids=["nan", "inf", "gradient"])
def test_a_gradient_that_is_not_finite_names_the_example(
    bad: float, index_exactly: Callable
) -> None:
    """√|x·w| at x = 0 has a finite value and no finite gradient."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.one(x).abs().sqrt()

    rows = [{"input": x[0], "target": i % 4, "id": f"row-{i}"} for i, x in enumerate(X)]
    rows[7]["input"] = torch.full((5,), bad)
    model = Net(run, one=nn.Linear(5, 4, bias=False))
    before = state_of(model)
    with pytest.raises(GradientError, match="row-7"):
        index_exactly(classify(model), problems.Listed(rows))
    assert state_of(model) == before


def test_a_label_out_of_range_is_explained_of_pictures_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    measurement = as_measurement(lambda net, batch: net(batch[0])[torch.arange(3), batch[1]])
    batch = torch.randn(3, 1, 3, 3), torch.tensor([0, 1, 4])
    with pytest.raises(GradientError, match=r"fails on a batch[^§]*IndexError[^§]*int64 \[3\]"):
        Gradients(model, measurement)(batch, 3, lambda name, factors: None)


OUTPUTS: dict[str, Callable] = {
    "tuple": lambda z: (z, z),
    "dict": lambda z: {"logits": z},
}


@pytest.mark.parametrize("measurement", sorted(MEASUREMENTS))
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_is_no_tensor_is_refused(name: str, measurement: str) -> None:
    model = Net(lambda net, x: OUTPUTS[name](net.one(x.sum(1))), one=linear())
    targets = torch.zeros(3, 4) if measurement == "multi_label" else torch.zeros(3).long()
    with pytest.raises(TaskError, match=rf"no tensor[^§]*{name}[^§]*logits"):
        Gradients(model, as_measurement(measurement))((X[:3], targets), 3, lambda *_: None)


def test_an_output_that_no_parameter_has_made_is_refused() -> None:
    model = Net(lambda net, x: torch.tensor(net.one(x.sum(1)).tolist()), one=linear())
    with pytest.raises(GradientError, match=r"does not depend on any parameter[^§]*detach"):
        Gradients(model, as_measurement("cross_entropy"))((X[:3], Y[:3]), 3, lambda *_: None)


@pytest.mark.parametrize("fault", [KeyError("y"), AttributeError("y"), AssertionError("y")])
def test_a_fault_of_the_users_code_is_explained(fault: Exception) -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        raise fault

    with pytest.raises(GradientError, match=rf"fails on a batch[^§]*{type(fault).__name__}"):
        Gradients(linear(), as_measurement(loss))((X[:3], Y[:3]), 3, lambda *_: None)


def test_a_model_that_takes_one_example_only_is_explained(index_exactly: Callable) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        (row,) = x
        return net.one(row.sum(0))[None]

    with pytest.raises(GradientError, match=r"fails on a batch of \d+ examples[^§]*ValueError"):
        index_exactly(classify(Net(run, one=linear())), sequences(), batch_size=4)


class Keeps(nn.Module):
    """Keeps an activation of its last pass."""

    def __init__(self) -> None:
        super().__init__()
        self.one = linear()

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.one(x.sum(1))
        return self.hidden


def test_a_model_that_keeps_an_activation_is_refused_by_its_name(index_exactly: Callable) -> None:
    model = nn.Sequential(Keeps())
    model(X)
    with pytest.raises(TaskError, match=r"cannot be copied[^§]*0\.hidden[^§]*torch\.no_grad"):
        index_exactly(classify(model), sequences())
    with torch.no_grad():
        model(X)
    index_exactly(classify(model), sequences())


def test_a_model_without_trainable_parameters_is_refused(index_exactly: Callable) -> None:
    model = linear().requires_grad_(False)
    with pytest.raises(TdaError):
        index_exactly(classify(model), sequences())


def test_it_is_said_how_gradients_are_taken(
    index_exactly: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """Quietly for one backward pass, as a warning for an exact and slower way."""
    tapped, recurrent = (
        Net(lambda net, x: net.one(x.sum(1)), one=linear()),
        problems.problem("lstm"),
    )
    with caplog.at_level("INFO", logger="tda"):
        index_exactly(classify(tapped), sequences())
        task = tda.Task(
            recurrent.make(), [w.state for w in recurrent.checkpoints], recurrent.measurement
        )
        index_exactly(task, recurrent.train)
    (quiet, loud) = caplog.records
    assert (quiet.levelname, loud.levelname) == ("INFO", "WARNING")
    assert "one backward; 100% of parameters" in quiet.getMessage()
    assert "exact vmap (lstm" in loud.getMessage()


def test_parameters_that_others_are_computed_from_load_no_compiler():
    """torch.func.vjp imports torch's when called: a second and 70 MB."""
    code = """
import sys, torch, tda
from tda.gradients import Gradients
from tda.measurements import as_measurement

class Scaled(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.prelu(x @ (self.weight / self.weight.norm()).T, self.bias[:1])

batch = torch.randn(4, 3), torch.arange(4) % 2
found = Gradients(Scaled(3, 2), as_measurement("cross_entropy"))
found(batch, 4, lambda name, factors: None)
print(found.audited.path, "torch._dynamo" in sys.modules)
"""
    made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert made.stdout.split() == ["tap", "False"]


def test_what_a_layer_was_given_is_free_once_it_was_used():
    """But for the last hidden layer, which is kept."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    found = Gradients(model, as_measurement("cross_entropy"))
    given: dict[str, StorageWeakRef] = {}
    free: list[bool] = []

    def consume(name: str, factors: list[Any]) -> None:
        if name == "2.weight":
            given[name] = StorageWeakRef(factors[0].right.untyped_storage())
        if name == "0.weight":
            free.append(given["2.weight"].expired())

    batch = torch.randn(6, 5), torch.arange(6) % 3
    found(batch, 6, lambda name, factors: None)  # audited
    found(batch, 6, consume)
    assert free == [True]
