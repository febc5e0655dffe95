"""The size of a batch is found, is a function of model and data alone, and does not change rows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import tda
from tda import batch_size as sizing
from tda.batch_size import automatic
from tda.data import as_dataset
from tda.featurizer import Featurizer
from tda.measurements import MEASUREMENTS

CPU = torch.device("cpu")


def dense(*widths: int) -> torch.nn.Module:
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
    return torch.nn.Sequential(*layers)


def found(model: torch.nn.Module, inputs: torch.Tensor) -> int:
    labels = torch.zeros(len(inputs), dtype=torch.long)
    return Featurizer(tda.Task(model)).batch_size("auto", as_dataset((inputs, labels)))


def test_it_lies_on_the_measured_plateaus():
    """Of an MLP 784-512-256-10 (256–1,024) and a small convolutional network (16–64)."""
    assert 256 <= found(dense(784, 512, 256, 10), torch.randn(8, 784)) <= 1024
    cnn = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, stride=2, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(64, 128, 3, stride=2, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(128, 128, 3, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(128, 10),
    )  # fmt: skip
    assert 16 <= found(cnn, torch.randn(8, 3, 32, 32)) <= 64


def test_operations_are_those_of_the_products_and_memory_that_of_the_activations(monkeypatch):
    """Of x → xW → (·)²: 2·n·I·O operations; x, and xW for the square, are kept."""
    weight = torch.randn(30, 50, requires_grad=True)

    def forward(count: int) -> torch.Tensor:
        return (torch.randn(count, 30) @ weight).square().sum(1)

    work, memory = sizing._cost(forward, 7)
    more_work, more_memory = sizing._cost(forward, 8)
    assert work == 2 * 7 * 30 * 50
    assert more_work - work == 2 * 30 * 50
    assert more_memory - memory == 4 * (30 + 50)


def test_memory_limits_it(monkeypatch):
    weight = torch.randn(30, 50, requires_grad=True)

    def forward(count: int) -> torch.Tensor:
        return (torch.randn(count, 30) @ weight).square().sum(1)

    assert automatic(forward, 5000, CPU) == 1024
    monkeypatch.setattr(sizing, "_MEMORY", 100 * 4 * 80)
    assert automatic(forward, 5000, CPU) == 64
    monkeypatch.setattr(sizing, "_MEMORY", 1)
    assert automatic(forward, 5000, CPU) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_few_examples_are_one_batch(count):
    assert found(dense(4, 3), torch.randn(count, 4)) == count


def test_rows_do_not_depend_on_it(tmp_path):
    torch.manual_seed(0)
    data = torch.randn(70, 12), torch.arange(70) % 3
    task = tda.Task(dense(12, 20, 3), measurement=MEASUREMENTS["cross_entropy"])
    rows = {}
    for size in ("auto", 1, 13):
        run = tda.index(
            task, data, tmp_path / str(size), batch_size=size, dtype="float32", proj_dim=64,
            progress=False,
        )  # fmt: skip
        rows[size] = run.store.table("train").rows(0, 0, 70)
    for size in (1, 13):
        torch.testing.assert_close(rows["auto"], rows[size], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [0, -1, 2.0, True, "automatic", None])
def test_anything_else_is_refused(given, tmp_path):
    with pytest.raises(tda.TdaError, match="batch_size is not a count"):
        tda.index(
            tda.Task(dense(4, 3)), torch.randn(3, 4), tmp_path / "run", batch_size=given,
            progress=False,
        )  # fmt: skip
