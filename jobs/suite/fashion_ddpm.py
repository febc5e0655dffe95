"""Suite: a small diffusion model (DDPM) of clothes, for D-TRAK.

    data       Fashion-MNIST (the package of jobs/fashion_mnist.py), averaged to 14 × 14 pixels: the
               first 600 training images, 64 queries of the test set
    model      a convolutional denoiser of two resolutions (21,937 parameters), Adam without weight
               decay, 120 steps of 32, each example at five fixed levels of noise
    measured   mean_t mean_pixel (ε − ε_θ(x_t, t))²; D-TRAK's own output is the mean of ε_θ²
    truth      24 halves × 2 seeds; 8 removals of 5 % with the seed of the model attributed
    time       ground truth about 8 minutes on one core

`jobs/leaderboard.py --tasks fashion_ddpm` runs it; `configs/suite/fashion_ddpm.toml` names its
parts.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tda
from tda.code import load_code
from tda.data import Batch

HERE = Path(__file__).parent
NAME = "fashion_ddpm"
NUM_TRAIN, NUM_QUERIES = 600, 64
TRUTH = {"num_halves": 24, "num_seeds": 2, "num_removals": 8, "removed": 0.05}

Course = load_code("training.py:Course", HERE)
Lazily = load_code("training.py:Lazily", HERE)
checkpoints_of = load_code("training.py:checkpoints", HERE)
network = load_code("networks.py:network", HERE)
losses = load_code("networks.py:losses", HERE)
denoising_losses = load_code("networks.py:denoising_losses", HERE)
squared_outputs = load_code("networks.py:squared_outputs", HERE)
read = load_code("../fashion_mnist.py:read", HERE)


def course(quick: bool = False) -> Any:
    """The training of one network; quick: a trial of everything, with fewer of all."""
    data = train_set(quick)
    return Course(
        network=partial(network, NAME),
        inputs=data["input"],
        targets=data["target"],
        losses=partial(losses, NAME),
        steps=6 if quick else 120,
        batch_size=32,
        learning_rate=2e-3,
        optimizer="adamw",
        num_models=2 if quick else 5,
    )


# (subset, seed) -> the network trained on the subset, for `tda evaluate`
train, train_removal = Lazily(course), Lazily(course, "removal")


def denoising(model: nn.Module, batch: Batch) -> Tensor:
    """ℓ of an example: how far the model is from its noise, at fixed levels."""
    return denoising_losses(model, _images(batch))


def squared_output(model: nn.Module, batch: Batch) -> Tensor:
    """What D-TRAK differentiates in place of the loss (Zheng et al. 2024, table 1)."""
    return squared_outputs(model, _images(batch))


def _images(batch: Batch) -> Tensor:
    assert isinstance(batch, dict)
    return batch["input"]


def task(run_path: str, checkpoints: str = "last", quick: bool = False) -> tda.Task:
    """checkpoints: "last", "path" (one run) or "models" (independent seeds)."""
    given = checkpoints_of(course(quick), run_path, checkpoints)
    return tda.Task(network(NAME), checkpoints=given, measurement=denoising)


def train_set(quick: bool = False) -> dict[str, Any]:
    return _examples("train", 0, 64 if quick else NUM_TRAIN)


def test_set(quick: bool = False) -> dict[str, Any]:
    return _examples("query", NUM_TRAIN, 8 if quick else NUM_QUERIES)


def _examples(kind: str, start: int, number: int) -> dict[str, Any]:
    images, labels = _data()
    part = slice(start, start + number)
    names = [f"{kind}-{i:05}" for i in range(number)]
    return {"input": images[part], "target": labels[part], "id": names}


@cache
def _data() -> tuple[Tensor, Tensor]:
    """The training images ``[example, 1, 14, 14]`` in [−1, 1] and labels, then the queries."""
    pairs = [read("train", None), read("t10k", None)]
    cut = [(x[:n], y[:n]) for (x, y), n in zip(pairs, (NUM_TRAIN, NUM_QUERIES), strict=True)]
    images = torch.from_numpy(np.concatenate([x for x, _ in cut])).float()[:, None] / 127.5 - 1
    return F.avg_pool2d(images, 2), torch.from_numpy(np.concatenate([y for _, y in cut]))
