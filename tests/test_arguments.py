"""What is given in place of what is wanted is refused before any work, by what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tda
from tda.errors import ConfigError, TaskError

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


def test_a_device_that_torch_does_not_know() -> None:
    with pytest.raises(TaskError, match=r"no device 'gpu'[^§]*cuda"):
        tda.Task(MODEL, device="gpu")


def test_what_is_no_projection(tmp_path: Path) -> None:
    kind: Any = tda.Projection
    with pytest.raises(ConfigError, match=r"no projection[^§]*count_sketch"):
        tda.index(tda.Task(MODEL), DATA, tmp_path / "run", projection=kind)
    with pytest.raises(ConfigError, match=r"seed[^§]*'0'"):
        tda.Projection(seed="0")  # type: ignore[arg-type]
