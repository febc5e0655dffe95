"""A training recorded as it runs: what is read back is what happened, by books kept apart."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tda
from tda.errors import TaskError
from tda.training.optimizer import read_state
from tda.training.schedule import implied_damping
from tda.weights import digest_of


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=random), torch.arange(n) % 3


@dataclass
class Training:
    """A loop as anyone writes it, and its own books: rates, weights and moments by step."""

    optimizer: torch.optim.Optimizer
    model: nn.Module
    rates: list[float] = field(default_factory=list)
    weights: dict[int, Any] = field(default_factory=dict)
    states: dict[int, Any] = field(default_factory=dict)

    def run(self, steps: int, scheduler: Any = None) -> Training:
        inputs, targets = data()
        for batch in torch.arange(24).repeat(steps)[: 8 * steps].split(8):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(inputs[batch]), targets[batch]).backward()
            self.optimizer.step()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.weights[len(self.rates)] = copy.deepcopy(self.model.state_dict())
            self.states[len(self.rates)] = copy.deepcopy(self.optimizer.state_dict())
            if scheduler is not None:
                scheduler.step()
        return self


def sgd() -> Training:
    model = network()
    settings = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-3}
    return Training(torch.optim.SGD(model.parameters(), **settings), model)


def adam() -> Training:
    """Groups in another order than the model's, alike in shape: only names tell them apart."""
    model = network()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": vectors[::-1], "weight_decay": 0.0}, {"params": matrices}]
    return Training(torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1), model)


def halved(training: Training) -> Any:
    return torch.optim.lr_scheduler.StepLR(training.optimizer, step_size=2, gamma=0.5)


@pytest.mark.parametrize("keep", [3, (3, 6)])
def test_what_is_read_back_is_what_the_training_did(tmp_path, keep):
    training = sgd()
    with tda.Recorder(tmp_path, training.model, training.optimizer, keep):
        training.run(7, halved(training))
    found = tda.recorded(tmp_path)
    assert [c.step for c in found] == [3, 6, 7]
    for checkpoint in found:
        step = checkpoint.step
        assert checkpoint.learning_rate == training.rates[step - 1]
        assert checkpoint.learning_rate_sum == pytest.approx(sum(training.rates[:step]), abs=1e-15)
        assert (checkpoint.momentum, checkpoint.weight_decay) == (0.9, 1e-3)
        assert digest_of(checkpoint.load()) == digest_of(training.weights[step])
        assert checkpoint.optimizer is None  # SGD has nothing more to tell
    assert np.fromfile(tmp_path / "learning_rates.f64", "<f8").tolist() == training.rates


def test_adams_moments_come_back_by_name_whatever_the_order_of_groups(tmp_path):
    training = adam()
    with tda.Recorder(tmp_path, training.model, training.optimizer, 2):
        training.run(4)
    task = tda.Task(training.model, tda.recorded(tmp_path), metric="adam")
    order = [id(p) for group in training.optimizer.param_groups for p in group["params"]]
    for index, step in enumerate((2, 4)):
        state = task.optimizer_state(index)
        for name, parameter in training.model.named_parameters():
            kept = training.states[step]["state"][order.index(id(parameter))]
            assert state.moments[name].step == step
            assert torch.equal(state.moments[name].mean, kept["exp_avg"])
            assert torch.equal(state.moments[name].square, kept["exp_avg_sq"])
    matrices = sum(p.numel() for p in training.model.parameters() if p.ndim == 2)
    every = sum(p.numel() for p in training.model.parameters())
    assert task.manifest()["checkpoints"][0]["weight_decay"] == pytest.approx(
        0.1 * matrices / every
    )


def test_automatic_damping_sees_the_schedule(tmp_path):
    training = sgd()
    with tda.Recorder(tmp_path / "record", training.model, training.optimizer, 5):
        training.run(10, halved(training))
    task = tda.Task(training.model, tda.recorded(tmp_path / "record"))
    given = [
        tda.Checkpoint(
            training.weights[step],
            learning_rate_sum=sum(training.rates[:step]),
            momentum=0.9,
            weight_decay=1e-3,
        )
        for step in (5, 10)
    ]
    exact = {"projection": "identity", "dtype": "float32", "progress": False, "gauss_newton": True}
    run = tda.index(task, data(), tmp_path / "run", **exact)
    for index, step in enumerate((5, 10)):
        wanted = 1e-3 + (1 - 0.9) / sum(training.rates[:step])
        found = implied_damping(run.store.manifest["checkpoints"], index)
        assert found == pytest.approx(wanted, rel=1e-12)
    by_hand = tda.index(tda.Task(training.model, given), data(), tmp_path / "hand", **exact)
    unknown = tda.Task(training.model, [training.weights[5], training.weights[10]])
    untold = tda.index(unknown, data(), tmp_path / "untold", **exact)
    scores, same, other = (
        each.scores(data(6), "influence_gn").compute() for each in (run, by_hand, untold)
    )
    np.testing.assert_array_equal(scores, same)
    assert np.abs(scores - other).max() > 0.1 * np.abs(scores).max()


def test_a_training_that_goes_on_ends_with_the_record_of_one_that_never_stopped(tmp_path):
    whole, first = sgd(), sgd()
    first.model.load_state_dict(whole.model.state_dict())
    with tda.Recorder(tmp_path / "whole", whole.model, whole.optimizer, 2):
        whole.run(7, halved(whole))
    torn = tda.Recorder(tmp_path / "torn", first.model, first.optimizer, 2)
    first.run(5, halved(first))
    torn.__exit__(KeyboardInterrupt, None, None)  # at step 5; the trainer's own checkpoint is of 3
    again = sgd()
    again.model.load_state_dict(first.weights[3])
    again.optimizer.load_state_dict(first.states[3])
    later = halved(again)
    later.last_epoch = 3
    batches = torch.arange(24).repeat(7)[: 8 * 7].split(8)[3:]
    inputs, targets = data()
    with tda.Recorder(tmp_path / "torn", again.model, again.optimizer, 2, start=3):
        for batch in batches:
            again.optimizer.zero_grad()
            nn.functional.cross_entropy(again.model(inputs[batch]), targets[batch]).backward()
            again.optimizer.step()
            later.step()
    kept = [json.loads((tmp_path / name / "recording.json").read_text()) for name in
            ("whole", "torn")]  # fmt: skip
    assert kept[0] == kept[1]
    rates = [(tmp_path / name / "learning_rates.f64").read_bytes() for name in ("whole", "torn")]
    assert rates[0] == rates[1]
    for one, other in zip(tda.recorded(tmp_path / "whole"), tda.recorded(tmp_path / "torn"),
                          strict=True):  # fmt: skip
        assert digest_of(one.load()) == digest_of(other.load())


def test_a_submodule_is_recorded_with_its_own_part_of_the_optimizer(tmp_path):
    training = adam()
    with tda.Recorder(tmp_path, training.model[3], training.optimizer, 2):
        training.run(2)
    (checkpoint,) = tda.recorded(tmp_path)
    assert set(checkpoint.load()) == {"weight", "bias"}
    state = read_state(checkpoint.load_optimizer(), training.model[3], "here")
    assert torch.equal(state.moments["weight"].mean, training.states[2]["state"][5]["exp_avg"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # what importing its compiler says
@pytest.mark.parametrize(
    "wrap", [pytest.param(torch.compile, marks=pytest.mark.slow), nn.DataParallel]
)
def test_a_wrapped_model_is_recorded_by_its_own_names(tmp_path, wrap):
    training = sgd()
    with tda.Recorder(tmp_path, wrap(training.model), training.optimizer, 2):
        training.run(2)
    (checkpoint,) = tda.recorded(tmp_path)
    assert digest_of(checkpoint.load()) == digest_of(training.weights[2])


def test_groups_with_several_rates_count_by_their_size(tmp_path):
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2:].parameters()}]
    training = Training(torch.optim.SGD(groups, lr=0.1), model)
    with tda.Recorder(tmp_path, model, training.optimizer, 1):
        training.run(1)
    first, every = 25, sum(p.numel() for p in model.parameters())
    wanted = 0.1 + 0.2 * first / every
    assert tda.recorded(tmp_path)[0].learning_rate == pytest.approx(wanted)


def test_skipped_steps_count_and_weigh_nothing(tmp_path):
    training = sgd()
    with tda.Recorder(tmp_path, training.model, training.optimizer, 10) as recorder:
        training.run(2)
        recorder.skip_to(5)
    (checkpoint,) = tda.recorded(tmp_path)
    assert (checkpoint.step, checkpoint.learning_rate_sum) == (5, pytest.approx(0.4))


def test_an_optimizer_that_is_not_understood_still_has_its_rates(tmp_path):
    model = network()
    training = Training(torch.optim.RMSprop(model.parameters(), lr=0.01), model)
    with tda.Recorder(tmp_path, model, training.optimizer, 2):
        training.run(2)
    (checkpoint,) = tda.recorded(tmp_path)
    assert (checkpoint.learning_rate_sum, checkpoint.momentum) == (pytest.approx(0.02), None)
    assert tda.Task(model, [checkpoint]).manifest()["checkpoints"][0]["step"] == 2


def test_after_close_nothing_more_is_recorded(tmp_path):
    training = sgd()
    recorder = tda.Recorder(tmp_path, training.model, training.optimizer, 2)
    training.run(3)
    recorder.close()
    recorder.close()
    training.run(3)
    assert [c.step for c in tda.recorded(tmp_path)] == [2, 3]


def test_another_training_in_the_same_folder_is_refused(tmp_path):
    training = sgd()
    with tda.Recorder(tmp_path, training.model, training.optimizer, 2):
        training.run(2)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(TaskError, match="another training"):
        tda.Recorder(tmp_path, training.model, training.optimizer, 2)
    with pytest.raises(TaskError, match="does not reach"):
        tda.Recorder(tmp_path, training.model, training.optimizer, 2, start=3)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_cannot_be_recorded_is_said_before_training(tmp_path):
    model = network()
    half = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(TaskError, match=r"does not train parameter '2\.weight'"):
        tda.Recorder(tmp_path, model, half, 2)
    with pytest.raises(TaskError, match="keep is not"):
        tda.Recorder(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "checkpoints": []}',
                                  '{"format": 1, "checkpoints": [{}]}'])  # fmt: skip
def test_a_damaged_record_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "recording.json").write_text(text)
    with pytest.raises(TaskError) as caught:
        tda.recorded(tmp_path)
    assert "recording.json" in str(caught.value)


def test_no_record_and_an_empty_one(tmp_path):
    with pytest.raises(TaskError, match="no record"):
        tda.recorded(tmp_path)
    training = sgd()
    tda.Recorder(tmp_path, training.model, training.optimizer, 9).leave()
    with pytest.raises(TaskError, match="nothing was kept"):
        tda.recorded(tmp_path)
    with pytest.raises(TaskError, match=r"give tda\.recorded"):
        tda.Task(training.model, tmp_path).manifest()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    training = sgd()
    with pytest.raises(TaskError):
        tda.Recorder(tmp_path / "file" / "folder", training.model, training.optimizer, 2)
