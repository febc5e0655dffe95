"""Index once, ask with any method: no question computes a training gradient again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tda
from tda.gradients import Gradients

RECIPES = ["grad_dot", "grad_cos", "trak", "influence", "relatif", "datainf", "arnoldi"]


@pytest.fixture
def differentiated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each backward pass had."""
    counts: list[int] = []
    real: Callable[..., Any] = Gradients._run

    def run(self: Gradients, path: str, batch: Any, num_examples: int, consume: Any) -> Any:
        counts.append(num_examples)
        return real(self, path, batch, num_examples, consume)

    monkeypatch.setattr(Gradients, "_run", run)
    return counts


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=draw)
    return inputs, torch.randint(0, 3, (count,), generator=draw)


def test_no_question_computes_a_training_gradient_again(tmp_path: Path, differentiated: list[int]):
    task = tda.Task(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    run = tda.index(task, data(40, 0), tmp_path / "run", progress=False)
    assert sum(differentiated) >= 40  # it does count
    differentiated.clear()
    for number, queries in enumerate((data(3, 1), data(4, 2))):
        for recipe in RECIPES:
            run.top_k(queries, 5, recipe)
            run.scores(queries, recipe).compute(scheduler="synchronous")
        for damping in (1e-3, 0.1, 10.0):
            run.top_k(queries, 5, replace(tda.RECIPES["influence"], damping=damping))
        assert sum(differentiated) == 3 + number * 4  # each query once, whatever is asked of it
    differentiated.clear()
    tda.open(tmp_path / "run").self_influence("influence")
    tda.open(tmp_path / "run").top_k(run.queries[0], 5, "trak", approximate=True)
    assert differentiated == []
