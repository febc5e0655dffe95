"""What is given in place of what is wanted is refused before any work, by what is wanted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tda
from tda.errors import ConfigError, DataError, GradientError, TaskError

MODEL: Any = nn.Linear(2, 3)
DATA = (torch.randn(4, 2), torch.arange(4) % 3)

NO_TASK: dict[str, Callable[[Path], Any]] = {
    "index": lambda run: tda.index(MODEL, DATA, run),
    "open": lambda run: tda.open(run, MODEL),
    "attribute": lambda run: tda.attribute(MODEL, DATA, DATA),
    "fit_ekfac": lambda run: tda.fit_ekfac(MODEL, DATA),
}


@pytest.mark.parametrize("name", NO_TASK)
def test_a_model_is_no_task(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    if name == "open":
        tda.index(tda.Task(MODEL), DATA, run, proj_dim=8, progress=False)
    with pytest.raises(TaskError, match=rf"not a task[^§]*Linear[^§]*tda\.{name}\("):
        NO_TASK[name](run)


@pytest.mark.parametrize("given", [3, nn.Sequential(MODEL)], ids=["number", "model"])
def test_what_are_no_checkpoints(given: Any) -> None:
    with pytest.raises(TaskError, match=r"no checkpoints[^§]*state dicts"):
        tda.Task(MODEL, checkpoints=given)


def test_checkpoints_that_are_all_the_last_weights() -> None:
    """A state dict is the memory of its model: two hold one point, whatever is trained between."""
    model, kept = nn.Linear(2, 3), []
    for _ in range(2):
        kept.append(model.state_dict())
    for given in (kept, [tda.Checkpoint(one, learning_rate=0.1) for one in kept]):
        with pytest.raises(TaskError, match=r"checkpoint 0 and checkpoint 1[^§]*copy\.deepcopy"):
            tda.Task(model, given)
    with pytest.raises(TaskError, match="same memory"):
        tda.Task(model, tda.smoothed(kept, 2))


def test_memory_that_checkpoints_may_share() -> None:
    """One state dict with other noise, tied weights, a part that stays, and rows of one tensor."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    state, rows = model.state_dict(), torch.randn(2, 3, 3)
    part = {"0.weight": state["0.weight"]}
    apart = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    for net, given in (
        (model, [state, copy.deepcopy(state)]),
        (model, tda.smoothed(state, 4)),
        (model, [*tda.smoothed(state, 2), tda.Checkpoint(model.state_dict())]),
        (model, [{"0.weight": row, "1.weight": row} for row in rows]),
        (apart, [{**part, "1.weight": row} for row in rows]),
    ):
        assert len(tda.Task(net, given).checkpoints) == len(given)


@pytest.mark.parametrize(
    "step", [10.0, "10", -1, True, torch.tensor(True), torch.tensor(1.5)], ids=repr
)
def test_a_step_that_is_no_whole_number(step: Any) -> None:
    with pytest.raises(TaskError, match=r"step[^§]*early[^§]*whole number ≥ 0"):
        tda.Checkpoint(MODEL.state_dict(), step=step, name="early")


@pytest.mark.parametrize("step", [10, np.int64(10), np.array(10), torch.tensor(10)], ids=repr)
def test_a_step_is_kept_as_an_int(step: Any) -> None:
    assert type(tda.Checkpoint(MODEL.state_dict(), step=step).step) is int


@pytest.mark.parametrize("name", ["nested", "list"])
def test_a_file_that_holds_no_weights(name: str, tmp_path: Path) -> None:
    """Told alike in a new folder and where a run is."""
    content = {"nested": {"epoch": 3, "net": MODEL.state_dict()}, "list": [1, 2]}[name]
    torch.save(content, tmp_path / "file.pt")
    tda.index(tda.Task(MODEL), DATA, tmp_path / "run", proj_dim=8, progress=False)
    wrong = tda.Task(MODEL, tmp_path / "file.pt")
    told = set()
    for use in (
        lambda: tda.index(wrong, DATA, tmp_path / "new", proj_dim=8, progress=False),
        lambda: tda.index(wrong, DATA, tmp_path / "run", proj_dim=8, progress=False),
        lambda: tda.open(tmp_path / "run", wrong),
    ):
        with pytest.raises(TaskError, match=r"no weights[^§]*file\.pt[^§]*(epoch|list)") as error:
            use()
        told.add(str(error.value))
    assert len(told) == 1


def test_a_dict_that_is_no_state_dict() -> None:
    given: Any = {"epoch": 3, "net": MODEL.state_dict()}
    task = tda.Task(MODEL, tda.Checkpoint(given, name="early"))
    with pytest.raises(TaskError, match=r"no weights[^§]*early[^§]*'epoch': int"):
        task.manifest()


def test_a_name_of_a_checkpoint_is_text() -> None:
    name: Any = 3
    with pytest.raises(TaskError, match=r"name of a checkpoint[^§]*3[^§]*str"):
        tda.Checkpoint(MODEL.state_dict(), name=name)


@pytest.mark.parametrize("given", [False, True], ids=["by_default", "state_dict"])
def test_a_task_keeps_the_weights_the_model_has_now(given: bool) -> None:
    """Copied once, ties included; what shares nothing with the model is taken as it is."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    before, other = copy.deepcopy(model.state_dict()), copy.deepcopy(model.state_dict())
    saved: Any = tda.smoothed([model.state_dict(), other], 2) if given else None
    task = tda.Task(model, saved)
    digests = [task.digest(index) for index in range(len(task.checkpoints))]
    with torch.no_grad():
        for value in model.state_dict().values():
            value += 1
    kept = [checkpoint.load() for checkpoint in task.checkpoints]
    for name, value in before.items():
        assert torch.equal(kept[0][name], value), name
    assert kept[0]["0.weight"] is kept[0]["2.weight"]
    assert digests == [task.digest(index) for index in range(len(task.checkpoints))]
    if given:
        assert kept[0] is kept[2] and kept[1] is kept[3] is other


def test_a_device_that_torch_does_not_know() -> None:
    with pytest.raises(TaskError, match=r"no device 'gpu'[^§]*cuda"):
        tda.Task(MODEL, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what is to be absent")
def test_a_device_that_this_machine_does_not_have(tmp_path: Path) -> None:
    task = tda.Task(MODEL, device="cuda")  # may be made here for another machine
    with pytest.raises(TaskError, match=r"'cuda' cannot be used here[^§]*cpu"):
        tda.index(task, DATA, tmp_path / "run", progress=False)


@pytest.mark.parametrize("given", [None, 3, ""], ids=repr)
def test_what_names_no_place(given: Any) -> None:
    """Nothing, such as a variable of the environment that is not set, is not this folder."""
    for use in (lambda: tda.open(given), lambda: tda.index(tda.Task(MODEL), DATA, given)):
        with pytest.raises(ConfigError, match=rf"no place[^§]*{given!r}[^§]*folder"):
            use()


def test_a_recorder_is_told_what_to_keep(tmp_path: Path) -> None:
    keep: Any = None
    with pytest.raises(TaskError, match=r"number of steps[^§]*None"):
        tda.Recorder(tmp_path / "rec", MODEL, torch.optim.SGD(MODEL.parameters(), 0.1), keep)


WRONG = {
    "shape": (
        (torch.randn(3, 5), torch.zeros(3).long()),
        GradientError,
        r"float32 \[\d, 5\], int64",
    ),
    "label": ((DATA[0], DATA[1] + 3), DataError, r"no class[^§]*example 0[^§]*3[^§]*0 … 2"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("batch_size", ["auto", 2])
def test_queries_that_the_model_cannot_take(name: str, batch_size: Any, tmp_path: Path) -> None:
    """By the run that has just been indexed, whose first batch went well."""
    run = tda.index(tda.Task(MODEL), DATA, tmp_path / "run", proj_dim=8, progress=False)
    queries, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        run.add_queries(queries, batch_size=batch_size)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.functional.cross_entropy])
def test_a_loss_of_torch_is_no_measurement(loss: Any) -> None:
    with pytest.raises(TaskError, match=r"no measurement[^§]*'cross_entropy'[^§]*lambda"):
        tda.Task(MODEL, measurement=loss)


def test_a_model_whose_shapes_are_not_known_yet() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.LazyLinear(3))
    with pytest.raises(TaskError, match=r"no shape yet[^§]*1\.weight"):
        tda.Task(model)
    model(DATA[0])
    tda.Task(model)


def test_what_is_no_projection(tmp_path: Path) -> None:
    kind: Any = tda.Projection
    with pytest.raises(ConfigError, match=r"no projection[^§]*count_sketch"):
        tda.index(tda.Task(MODEL), DATA, tmp_path / "run", projection=kind)
    with pytest.raises(ConfigError, match=r"seed[^§]*'0'"):
        tda.Projection(seed="0")  # type: ignore[arg-type]
