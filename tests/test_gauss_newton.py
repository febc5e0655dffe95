"""Gauss–Newton products equal explicit Jacobians; draws have the Gauss–Newton matrix as mean."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import models
import naive
import numpy as np
import problems
import pytest
import torch
from torch import Tensor, nn

import tda
from tda.curvature.gauss_newton import GaussNewton
from tda.errors import MismatchError, TaskError
from tda.gradients import Gradients
from tda.measurements import MEASUREMENTS, as_measurement, identity

EVERY = [
    name for name in problems.NAMES if name != "gpt2"
]  # 30,000 backward passes; tiny_lm is one


class Doubles:
    """A data set in float64."""

    def __init__(self, dataset: Any, count: int | None = None) -> None:
        self.dataset = dataset
        self.count = len(dataset) if count is None else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return naive.as_double(self.dataset[i])


def prepared(problem: problems.Problem) -> Gradients:
    model = problem.make()
    model.load_state_dict(problem.checkpoints[0].state)
    return Gradients(model.double(), as_measurement(problem.measurement))


def jacobian(z: Tensor, parameters: list[Tensor]) -> np.ndarray:
    """∂z/∂θ [outputs, p], one backward an output."""
    rows = [
        torch.autograd.grad(
            one, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for one in z.flatten()
    ]
    return np.stack([torch.cat([g.flatten() for g in row]).numpy() for row in rows])


def loss_hessian(problem: problems.Problem, z: Tensor, batch: Any) -> np.ndarray:
    """∇²ℓ [outputs, outputs] by autograd of the loss, written apart, of a model that says z."""

    def loss(flat: Tensor) -> Tensor:
        outputs = flat.reshape(z.shape)

        def says(*args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(logits=outputs) if kwargs else outputs

        return problem.outcome(says, batch).loss

    hessian = torch.autograd.functional.hessian(loss, z.detach().flatten())
    assert isinstance(hessian, Tensor)
    return hessian.numpy()


def dense(problem: problems.Problem, count: int) -> np.ndarray:
    """G [p, p] = mean_i J_iᵀ ∇²ℓ_i J_i; J of f and ∇²ℓ = ℓ''(f) where the likelihood is unknown."""
    model = problem.make()
    model.load_state_dict(problem.checkpoints[0].state)
    model = model.double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    known = isinstance(problem.measurement, str)
    total = 0.0
    for i in range(count):
        batch = naive.as_double(torch.utils.data.default_collate([problem.train[i]]))
        if known:
            z = problems.predict(model, batch)[0]
            middle = loss_hessian(problem, z, batch)
        else:
            one = problem.outcome(model, batch)
            z, middle = one.f, np.array([[one.curvature]])
        j = jacobian(z, parameters)
        total = total + j.T @ middle @ j
    return total / count


def flat(v: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([value.reshape(len(value), -1) for value in v.values()], 1).numpy()


def random_vectors(parameters: Any, m: int) -> dict[str, Tensor]:
    return {n: torch.randn(m, *p.shape, dtype=p.dtype) for n, p in parameters.items()}


@pytest.mark.parametrize("name", EVERY)
def test_products_are_those_of_explicit_jacobians(name):
    """G v = mean_i J_iᵀ ∇²ℓ_i J_i v in float64, for every architecture and loss."""
    problem = problems.problem(name)
    gradients = prepared(problem)
    matrix = GaussNewton.of(gradients, Doubles(problem.train, 2), batch_size=1)
    v = random_vectors(gradients.parameters, 2)
    wanted = flat(v) @ dense(problem, 2)
    found = flat(matrix.product(v))
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


def test_a_product_depends_neither_on_batches_nor_on_other_vectors():
    problem = problems.problem("attention")
    gradients, data = prepared(problem), Doubles(problem.train)
    v = random_vectors(gradients.parameters, 19)
    whole = GaussNewton.of(gradients, data, batch_size=10).product(v)
    small = GaussNewton.of(gradients, data, batch_size=3).product(v)
    alone = GaussNewton.of(gradients, data).product({n: x[17:18] for n, x in v.items()})
    for name in v:
        torch.testing.assert_close(small[name], whole[name])
        torch.testing.assert_close(alone[name], whole[name][17:18])


def test_vectors_may_be_matrices_of_the_parameters_size():
    problem = problems.problem("cnn")
    gradients = prepared(problem)
    matrix = GaussNewton.of(gradients, Doubles(problem.train))
    v = random_vectors(gradients.parameters, 2)
    as_matrices = {name: x.reshape(2, len(x[0]), -1) for name, x in v.items()}
    for name, value in matrix.product(as_matrices).items():
        assert value.shape == as_matrices[name].shape
        torch.testing.assert_close(value.reshape(v[name].shape), matrix.product(v)[name])


def test_a_subsample_is_spread_evenly_and_its_mean_is_over_itself():
    problem = problems.problem("digits_mlp")
    gradients, data = prepared(problem), Doubles(problem.train)
    v = random_vectors(gradients.parameters, 2)
    some = GaussNewton.of(gradients, data, num_examples=3, batch_size=2)
    ends = [data[0], data[4], data[9]]
    same = GaussNewton.of(gradients, ends).product(v)
    assert some.num_examples == 3
    for name, value in some.product(v).items():
        torch.testing.assert_close(value, same[name])


def test_the_mean_diagonal_is_estimated_without_bias():
    """E vᵀGv = tr G over random signs v: of ridge regression, G = mean x xᵀ."""
    problem = problems.problem("ridge")
    matrix = GaussNewton.of(prepared(problem), Doubles(problem.train))
    inputs = torch.stack([x for x, _ in problem.train.examples]).double()
    exact = float(inputs.square().mean())
    assert matrix.mean_diagonal(num_probes=2000) == pytest.approx(exact, rel=0.1)


def test_the_model_is_left_as_it_was():
    problem = problems.problem("encoder_layer")
    gradients = prepared(problem)
    before = {n: p.clone() for n, p in gradients.model.state_dict().items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    GaussNewton.of(gradients, Doubles(problem.train)).product(
        random_vectors(gradients.parameters, 1)
    )
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert not any(p.requires_grad for p in gradients.model.parameters())
    for name, value in gradients.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("count", [0, 11])
def test_a_mean_over_more_examples_than_there_are_is_refused(count):
    problem = problems.problem("ridge")
    with pytest.raises(TaskError, match="so many examples"):
        GaussNewton.of(prepared(problem), Doubles(problem.train), num_examples=count)


def test_a_vector_of_another_model_is_refused_by_the_parameters_name():
    problem = problems.problem("cnn")
    gradients = prepared(problem)
    matrix = GaussNewton.of(gradients, Doubles(problem.train))
    v = random_vectors(gradients.parameters, 1)
    with pytest.raises(TaskError, match=r"7\.weight"):
        matrix.product({**v, "7.weight": torch.zeros(1, 3)})
    with pytest.raises(TaskError, match=r"7\.weight"):
        matrix.product({n: x for n, x in v.items() if n != "7.weight"})


# ---- draws: (measurement, outputs z of one example, a batch of n copies of it)


def copies(z: Tensor, labels: Any, n: int) -> tuple[Tensor, Tensor]:
    rows = torch.as_tensor(labels)
    return z.expand(n, *z.shape), rows.expand(n, *rows.shape)


Z = torch.tensor([0.3, -1.0, 1.5])
TOKENS = torch.tensor([[0.3, -1.0, 1.5], [0.0, 2.0, 0.5], [1.0, -0.5, 0.0], [9.0, 9.0, 0.0]])
DRAWN = {
    "cross_entropy": (Z, 1),
    "binary_cross_entropy": (torch.tensor(0.7), 1),
    "squared_error": (torch.tensor(0.7), 3.0),
    "mean_squared_error": (Z, [0.0, 1.0, 5.0]),
    "multi_label": (Z, [0.0, 1.0, 1.0]),
    "causal_lm": (TOKENS, [2, 1, -100, 0]),
}


@pytest.mark.parametrize("name", list(DRAWN))
def test_the_weighted_second_moment_of_the_loss_of_draws_is_its_hessian(name):
    """E ∇ℓ = 0 and E w ∇ℓ∇ℓᵀ = ∇²ℓ over draws from the model (the Fisher identity), within 5 σ."""
    measurement, n = MEASUREMENTS[name], 40_000
    z, label = DRAWN[name]
    batch = copies(z, label, n)
    drawn = measurement.draw(nn.Identity(), batch, torch.Generator().manual_seed(0))
    outputs = drawn[0].clone().double().requires_grad_(True)
    loss = measurement.link(measurement.output(lambda x: outputs, drawn), drawn).loss
    (slopes,) = torch.autograd.grad(loss.sum(), outputs)
    slopes = slopes.reshape(n, -1)
    weight = 1 if measurement.draw_weight is None else measurement.draw_weight(drawn)[0]
    squares = weight * slopes[:, :, None] * slopes[:, None, :]
    basis = torch.eye(z.numel()).reshape(-1, 1, *z.shape)
    one = tuple(part[:1] for part in batch)
    hessian = torch.cat([measurement.hessian(one[0], one, u).reshape(1, -1) for u in basis])
    for found, wanted in ((slopes, torch.zeros(z.numel())), (squares, hessian)):
        error = (found.mean(0) - wanted).abs()
        assert (error <= 5 * found.std(0) / n**0.5 + 1e-6).all()


def test_tokens_that_do_not_count_stay_as_they_are():
    """The first token is given, and −100 is left out; unlabelled text becomes labelled."""
    draw = MEASUREMENTS["causal_lm"].draw
    labels = torch.tensor([[5, 1, -100, 2], [5, -100, 2, -100]])
    logits = torch.randn(2, 4, 7)
    generator = torch.Generator().manual_seed(0)
    drawn = draw(nn.Identity(), (logits, labels), generator)[1]
    assert torch.equal(drawn == -100, labels == -100)
    assert torch.equal(drawn[:, 0], labels[:, 0])
    text = {"input_ids": torch.tensor([[3, 1, 2, 0]]), "attention_mask": torch.ones(1, 4)}
    text["attention_mask"][0, 3] = 0
    model = models.Net(lambda net, **given: logits[:1])
    model.forward = lambda **given: logits[:1]
    drawn = draw(model, text, generator)
    assert torch.equal(drawn["input_ids"], text["input_ids"])
    assert drawn["labels"][0, 3] == -100 and drawn["labels"][0, 0] == 3


@pytest.mark.parametrize("name", list(DRAWN))
def test_a_draw_repeats_with_its_seed_and_keeps_the_type_of_labels(name):
    measurement = MEASUREMENTS[name]
    batch = copies(*DRAWN[name], 30)
    first, again, other = (
        measurement.draw(nn.Identity(), batch, torch.Generator().manual_seed(seed))[-1]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == batch[-1].dtype and first.shape == batch[-1].shape


@pytest.mark.parametrize("name", list(MEASUREMENTS))
def test_draws_and_hessians_are_no_part_of_a_measurements_digest(name):
    """What is stored depends on the output and the link alone, so older stores stay valid."""
    measurement = MEASUREMENTS[name]
    bare = replace(measurement, draw=None, draw_weight=None, hessian=None)
    assert bare.digest == measurement.digest


def _losses(model, batch):
    return model(batch[0])[:, 0]


def _tempered(model, batch, temperature):
    return _losses(model, batch) / temperature


def _closed_over(value):
    return lambda model, batch: _losses(model, batch) / value


def _with_default(value, *, scale=None):
    def losses(model, batch, temperature=value, *, scale=scale):
        return _losses(model, batch)

    return losses


class _Called:
    def __init__(self, **settings):
        self.__dict__.update(settings)

    def __call__(self, model, batch):
        return _losses(model, batch)

    def method(self, model, batch):
        return _losses(model, batch)


class _CalledModule(nn.Module):
    def __init__(self, smoothing):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def forward(self, model, batch):
        return self.loss(model(batch[0]), batch[1])


@dataclass(slots=True)
class _Settings:
    temperature: float


MADE_WITH = {
    "partial": lambda v: partial(_tempered, temperature=v),
    "partial of a closure": lambda v: partial(_closed_over(v)),
    "closure": _closed_over,
    "closure of a closure": lambda v: _closed_over(_closed_over(v)),
    "closure of a tensor": lambda v: _closed_over(torch.full((3,), v)),
    "closure of an array": lambda v: _closed_over(np.full(3, v)),
    "closure of a dict": lambda v: _closed_over({"a": [None, (v, "b")]}),
    "closure of a data class": lambda v: _closed_over(_Settings(v)),
    "closure of a namespace": lambda v: _closed_over(SimpleNamespace(temperature=v)),
    "closure of a module": lambda v: _closed_over(_filled(v)),
    "closure of a method": lambda v: _closed_over(_Called(temperature=v).method),
    "default": _with_default,
    "keyword default": lambda v: _with_default(1.0, scale=v),
    "object": lambda v: _Called(temperature=v),
    "method": lambda v: _Called(temperature=v).method,
    "module": _CalledModule,
    "module of weights": lambda v: nn.Sequential(_filled(v)),
    "compiled": lambda v: _compiled(_closed_over(v), []),
}


def _filled(value: float) -> nn.Module:
    layer = nn.Linear(2, 1)
    layer.load_state_dict({name: torch.full_like(w, value) for name, w in layer.named_parameters()})
    return layer


def _compiled(function, state):
    """As torch.compile does: wrapped in a function of its own, with what changes as it compiles."""
    scope: dict[str, Any] = {"__name__": "torch._dynamo.eval_frame"}
    exec("def wrap(function, state):\n    return lambda *args: function(*args, state)", scope)
    return update_wrapper(scope["wrap"](function, state), function)


def test_a_compiled_measurement_is_the_measurement():
    digests = [as_measurement(_compiled(_losses, state)).digest for state in ([], [1])]
    assert digests == [as_measurement(_losses).digest] * 2


@pytest.mark.parametrize("name", MADE_WITH)
def test_a_measurements_digest_is_that_of_what_it_was_made_with(name):
    """Or rows of another temperature would be taken for those asked for."""
    digests = [as_measurement(MADE_WITH[name](value)).digest for value in (0.5, 0.5, 0.25)]
    assert digests[0] == digests[1] != digests[2]


def _itself():
    def losses(model, batch):
        return losses

    return losses


def _of_its_own_method():
    made = _Called()
    made.again = [made, made.method]
    return made


UNKNOWN = {
    "object": lambda: _closed_over(object()),
    "generator": lambda: _closed_over(torch.Generator()),
    "no numbers": lambda: _closed_over(torch.empty(2, device="meta")),
    "itself": _itself,
    "its own method": _of_its_own_method,
    "set": lambda: _closed_over({"a", "b", nn.Linear, len}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_contents_is_its_type_in_a_digest(name):
    assert as_measurement(UNKNOWN[name]()).digest == as_measurement(UNKNOWN[name]()).digest


def test_a_digest_is_that_of_the_settings_before_any_call():
    """A measurement that counts its calls is still that of the run it resumes."""
    calls: list[int] = []
    measurement = as_measurement(_closed_over(calls))
    before = measurement.digest
    calls.append(1)
    assert measurement.digest == before != as_measurement(_closed_over(calls)).digest


@pytest.mark.parametrize(
    "function", [_losses, _Called(), _Called().method], ids=["function", "object", "method"]
)
def test_without_settings_a_digest_is_that_of_the_code(function):
    """As it was before settings counted: older stores stay valid."""
    name = f"{_Called.__module__}.{_Called.__qualname__}"
    code = name if isinstance(function, _Called) else inspect.getsource(function)
    wanted = blake2b((code + inspect.getsource(identity)).encode(), digest_size=16).hexdigest()
    assert as_measurement(function).digest == wanted


@pytest.mark.parametrize("name", list(MEASUREMENTS))
def test_the_digest_of_a_known_measurement_is_that_of_its_code(name):
    known = MEASUREMENTS[name]
    code = inspect.getsource(known.output) + inspect.getsource(known.link)
    assert known.digest == blake2b(code.encode(), digest_size=16).hexdigest()


def test_functions_within_a_function_without_source_are_part_of_its_digest_by_their_code():
    """Not by their address, which is another one in every process."""

    def digest(number: int) -> str:
        scope: dict[str, Any] = {}
        exec(f"def losses(model, batch):\n    return map(lambda x: x + {number}, batch)", scope)
        return as_measurement(scope["losses"]).digest

    kept = [digest(1), digest(2), digest(1)]
    assert kept[0] == kept[2] != kept[1]


def test_rows_of_another_temperature_are_not_taken_for_those_asked_for(tmp_path):
    data = (torch.randn(6, 2), torch.arange(6) % 2)

    def index(temperature: float) -> tda.Run:
        torch.manual_seed(0)
        measurement = partial(_tempered, temperature=temperature)
        task = tda.Task(nn.Linear(2, 2), measurement=measurement)
        return tda.index(task, data, tmp_path / "run", proj_dim=8, progress=False)

    index(0.5)
    index(0.5)
    with pytest.raises(MismatchError, match=r"measurement\.digest"):
        index(0.25)
