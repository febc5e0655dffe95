"""A checkpoint's optimizer state: read right, matched to the right parameters, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tda
from tda.errors import TaskError
from tda.training.optimizer import read_state

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def network() -> nn.Sequential:
    """Parameters 0.weight [5, 4], 0.bias [5], 1.weight [5], 1.bias [5], 2.weight [3, 5], 2.bias."""
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def trained(
    make: Callable[..., torch.optim.Optimizer] = Adam,
    groups: Callable[[nn.Module], Any] = lambda model: model.parameters(),
    steps: int = 3,
    model: nn.Module | None = None,
    **settings: Any,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after a few steps on random data."""
    model = model or network()
    optimizer = make(groups(model), **{"lr": 0.01, **settings})
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
        optimizer.step()
    return model, optimizer


def moments_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The truth: v of each parameter, found through the parameter objects themselves."""
    return {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters()}


def decayed_and_not(model: nn.Module) -> list[dict[str, Any]]:
    """Hugging Face's groups: matrices decay; biases and norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def backwards(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())[::-1]


def body_and_head(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": model[:2].parameters()}, {"params": model[2].parameters()}]


def body_and_head_by_name(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[4:]}, {"params": named[:4]}]


@pytest.mark.parametrize(
    "groups",
    [nn.Module.parameters, decayed_and_not, body_and_head, backwards, body_and_head_by_name],
)
def test_moments_belong_to_the_parameters_they_were_made_by(groups: Callable):
    model, optimizer = trained(AdamW, groups)
    found = read_state(optimizer.state_dict(), model, "here").moments
    wanted = moments_by_name(model, optimizer)
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name].square, wanted[name]) for name in wanted)


def test_frozen_parameters_may_be_in_the_optimizer_or_not():
    for included in (True, False):
        model = network()
        model[0].requires_grad_(False)
        model[1].requires_grad_(False)

        def chosen(net: nn.Module, everything: bool = included) -> list[Tensor]:
            return [p for p in net.parameters() if everything or p.requires_grad]

        _, optimizer = trained(Adam, chosen, model=model)
        found = read_state(optimizer.state_dict(), model, "here").moments
        assert list(found) == ["2.weight", "2.bias"]
        assert torch.equal(found["2.weight"].mean, optimizer.state[model[2].weight]["exp_avg"])


def test_states_keyed_by_name_are_matched_by_name():
    """As torch.distributed.checkpoint writes them."""
    model, optimizer = trained()
    state, names = optimizer.state_dict(), [n for n, _ in model.named_parameters()]
    named = {
        "state": {name: state["state"][i] for i, name in enumerate(names)},
        "param_groups": [{**state["param_groups"][0], "params": names[::-1]}],
    }
    found = read_state(named, model, "here").moments
    assert torch.equal(found["0.weight"].square, moments_by_name(model, optimizer)["0.weight"])


def test_settings_are_read():
    model, optimizer = trained(AdamW, decayed_and_not, steps=4, betas=(0.8, 0.95), eps=1e-5)
    state = read_state(optimizer.state_dict(), model, "here")
    assert (state.kind, state.step, state.momentum) == ("adam", 4, None)
    assert state.learning_rate("here") == 0.01
    assert state.moments["2.bias"].betas == (0.8, 0.95)
    assert state.moments["2.bias"].eps == 1e-5
    assert state.weight_decay == pytest.approx(0.1 * 35 / 53)  # 20 + 15 of 53 numbers decay

    model, optimizer = trained(SGD, momentum=0.9, weight_decay=0.01)
    state = read_state(optimizer.state_dict(), model, "here")
    assert (state.kind, state.step, state.momentum, state.weight_decay) == ("sgd", None, 0.9, 0.01)


def test_dampening_counts_as_less_momentum():
    """The long-run weight of a constant gradient is 1/(1−β), by running the recursion."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SGD([parameter], lr=1.0, momentum=0.8, dampening=0.5)
    for _ in range(200):
        before = parameter.item()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    model = nn.Module()
    model.register_parameter("w", parameter)
    momentum = read_state(optimizer.state_dict(), model, "here").momentum
    assert momentum is not None
    assert before - parameter.item() == pytest.approx(1 / (1 - momentum))


def test_weight_decay_that_goes_through_the_moments_is_not_a_known_decay():
    for make, wanted in ((Adam, None), (AdamW, 0.1)):
        model, optimizer = trained(make, weight_decay=0.1)
        assert read_state(optimizer.state_dict(), model, "here").weight_decay == wanted


# In a task.


def test_the_record_tells_what_is_known_and_nothing_else():
    model, optimizer = trained(steps=5)
    weights = model.state_dict()
    plain = tda.Task(model, [tda.Checkpoint(weights, step=2)]).manifest()["checkpoints"][0]
    assert sorted(plain) == ["digest", "learning_rate", "name", "step"]
    known = tda.Checkpoint(weights, optimizer=optimizer.state_dict(), learning_rate_sum=0.5)
    record = tda.Task(model, [known]).manifest()["checkpoints"][0]
    assert {n: record[n] for n in sorted(record) if "digest" not in n} == {
        "name": "checkpoint-0",
        "step": 5,
        "learning_rate": 0.01,
        "learning_rate_sum": 0.5,
        "weight_decay": 0.0,
        "optimizer": "adam",
    }


def test_what_is_stated_counts_more_than_what_is_read():
    model, optimizer = trained(SGD, momentum=0.9, weight_decay=0.1)
    stated = {"step": 7, "learning_rate": 0.2, "momentum": 0.5, "weight_decay": 0.0}
    checkpoint = tda.Checkpoint(model.state_dict(), optimizer=optimizer.state_dict(), **stated)
    record = tda.Task(model, [checkpoint]).manifest()["checkpoints"][0]
    assert {name: record[name] for name in stated} == stated


@pytest.mark.parametrize("key", [None, "optimizer", "optimizer_state_dict"])
def test_a_file_says_the_same_as_the_state_itself(tmp_path: Path, key: str | None):
    model, optimizer = trained(AdamW, decayed_and_not)
    state, path = optimizer.state_dict(), tmp_path / "optimizer.pt"
    both = {"model_state_dict": model.state_dict(), key: state}
    torch.save(state if key is None else both, path)
    weights = path if key else model.state_dict()
    by_path = tda.Task(model, [tda.Checkpoint(weights, optimizer=path)]).manifest()
    by_value = tda.Task(model, [tda.Checkpoint(model.state_dict(), optimizer=state)]).manifest()
    assert by_path == by_value
    assert str(tmp_path) not in str(by_path)


def test_the_digest_changes_with_every_number_read():
    model, optimizer = trained()

    def digest(state: dict[str, Any]) -> str:
        task = tda.Task(model, [tda.Checkpoint(model.state_dict(), optimizer=state)])
        return task.manifest()["checkpoints"][0]["optimizer_digest"]

    state = optimizer.state_dict()
    found = {digest(state), digest(copy.deepcopy(state))}
    assert len(found) == 1
    for change in ("moment", "step", "betas"):
        other = copy.deepcopy(state)
        if change == "moment":
            other["state"][5]["exp_avg"][0] += 1e-3
        elif change == "step":
            other["state"][5]["step"] += 1
        else:
            other["param_groups"][0]["betas"] = (0.9, 0.99)
        found.add(digest(other))
    assert len(found) == 4


# What is refused, and by which name.


def _changed(model: nn.Module, **changes: Any) -> dict[str, Any]:
    state = trained(model=model)[1].state_dict()
    state["param_groups"][0].update(changes)
    return state


def _of_another_model(model: nn.Module) -> Any:
    other = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    return trained(model=other)[1].state_dict()


def _of_the_first_layer(model: nn.Module) -> Any:
    return trained(groups=lambda net: net[0].parameters(), model=model)[1].state_dict()


def _with_two_rates(model: nn.Module) -> Any:
    state = trained(groups=body_and_head, model=model)[1].state_dict()
    state["param_groups"][1]["lr"] = 0.02
    return state


def _with_two_momenta(model: nn.Module) -> Any:
    state = trained(SGD, body_and_head, model=model)[1].state_dict()
    state["param_groups"][1]["momentum"] = 0.5
    return state


def _biases_in_groups_by_layer(model: nn.Module) -> Any:
    """Groups in which two next parameters have one shape: 0.bias and 1.weight are both [5]."""

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": [net[1].weight, net[1].bias]},
            {"params": [net[0].weight, net[0].bias, net[2].weight, net[2].bias]},
        ]

    return trained(groups=groups, model=model)[1].state_dict()


def _backwards_without_names(model: nn.Module) -> Any:
    return trained(groups=lambda net: list(net.parameters())[::-1], model=model)[1].state_dict()


REFUSED = [
    (lambda model: model.state_dict(), "no optimizer state"),
    (lambda model: _changed(model, maximize=True), "not known"),
    (lambda model: trained(torch.optim.RMSprop, model=model)[1].state_dict(), "not known"),
    (lambda model: trained(torch.optim.NAdam, model=model)[1].state_dict(), "not known"),
    (lambda model: trained(torch.optim.RAdam, model=model)[1].state_dict(), "not known"),
    (_of_another_model, "'0.weight'"),
    (_of_the_first_layer, "'1.weight'"),
    (_backwards_without_names, "'0.weight'"),
    (_biases_in_groups_by_layer, "'0.bias'"),
    (_with_two_rates, "learning_rate="),
    (_with_two_momenta, "momentum"),
]


@pytest.mark.parametrize(("make", "named"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(make: Callable[[nn.Module], Any], named: str):
    model = network()
    task = tda.Task(model, [tda.Checkpoint(model.state_dict(), optimizer=make(model))])
    with pytest.raises(TaskError) as error:
        task.manifest()
    assert named in str(error.value)
    assert "checkpoint 0" in str(error.value)


def test_names_added_by_hand_are_a_cure():
    model = network()
    state = _biases_in_groups_by_layer(model)
    names = [name for name, _ in model.named_parameters()]
    state["param_groups"][0]["param_names"] = names[2:4]
    state["param_groups"][1]["param_names"] = names[:2] + names[4:]
    assert read_state(state, model, "here").moments["2.weight"].mean.shape == (3, 5)


def test_an_optimizer_that_is_not_there_or_carries_code_is_refused(tmp_path: Path):
    model = network()
    torch.save({"state": print, "param_groups": []}, tmp_path / "code.pt")
    for name, what in (("none.pt", "is missing"), ("code.pt", "cannot be read")):
        task = tda.Task(model, [tda.Checkpoint(model.state_dict(), optimizer=tmp_path / name)])
        with pytest.raises(TaskError, match=what):
            task.manifest()


@pytest.mark.parametrize(
    "wrong",
    [
        {"momentum": 1.0},
        {"weight_decay": -1e-3},
        {"learning_rate_sum": float("nan")},
        {"learning_rate": -0.1},
        {"learning_rate": "0.1"},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(TaskError, match=next(iter(wrong))):
        tda.Checkpoint({}, **wrong)


def test_a_model_or_an_optimizer_in_place_of_its_state_is_refused():
    model, optimizer = trained()
    with pytest.raises(TaskError, match=r"no weights[^§]*state_dict\(\)"):
        tda.Checkpoint(model)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"no state of an optimizer[^§]*optimizer\.state_dict\(\)"):
        tda.Checkpoint(model.state_dict(), optimizer=optimizer)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ["adam", "second_moment", "adam_update"])
def test_a_metric_needs_moments_of_every_checkpoint_and_parameter(metric: str):
    model, optimizer = trained()
    weights = model.state_dict()
    good = tda.Checkpoint(weights, optimizer=optimizer.state_dict())
    with pytest.raises(TaskError, match=r"checkpoint 1 \(last\)"):
        tda.Task(model, [good, tda.Checkpoint(weights, name="last")], metric=metric)
    sgd = trained(SGD, momentum=0.9, model=model)[1].state_dict()
    with pytest.raises(TaskError, match=r"no moments of parameter '0\.weight'"):
        tda.Task(model, [tda.Checkpoint(weights, optimizer=sgd)], metric=metric).manifest()
    unused = optimizer.state_dict()
    del unused["state"][3]
    with pytest.raises(TaskError, match=r"'1\.bias'"):
        tda.Task(model, [tda.Checkpoint(weights, optimizer=unused)], metric=metric).manifest()


def test_an_unknown_metric_is_refused():
    with pytest.raises(TaskError, match="euclidean, adam"):
        tda.Task(network(), metric="adamw")
