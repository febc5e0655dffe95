"""Suite: a small diffusion model (DDPM) of clothes, for D-TRAK.

    data       Fashion-MNIST (the package of jobs/fashion_mnist.py), averaged to 14 × 14 pixels: the
               first 600 training images, 64 queries of the test set
    model      an MLP denoiser, width 128 (69,060 parameters), Adam without weight decay, 1,500
               steps of 32, each example at five levels with noise of its own, drawn once
    measured   mean_t mean_pixel (ε − ε_θ(x_t, t))²; D-TRAK's own output is the mean of ε_θ²
    truth      64 halves × 2 seeds; 32 removals of 5 % with the seed of the model attributed
    time       ground truth about 6 minutes on one core

`jobs/leaderboard.py --tasks fashion_ddpm` runs it; `configs/suite/fashion_ddpm.toml` names its
parts.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda.code import load_code
from tda.data import Batch

HERE = Path(__file__).parent
Work = load_code("work.py:Work", HERE)
NUM_TRAIN, NUM_QUERIES = 600, 64
denoising_losses = load_code("networks.py:denoising_losses", HERE)
squared_outputs = load_code("networks.py:squared_outputs", HERE)
with_noise = load_code("networks.py:with_noise", HERE)
first_of_both = load_code("../fashion_mnist.py:first_of_both", HERE)


def denoising(model: nn.Module, batch: Batch) -> Tensor:
    """ℓ of an example: how far the model is from its noise."""
    return denoising_losses(model, _inputs(batch))


def squared_output(model: nn.Module, batch: Batch) -> Tensor:
    """What D-TRAK differentiates in place of the loss (Zheng et al. 2024, table 1)."""
    return squared_outputs(model, _inputs(batch))


def _inputs(batch: Batch) -> Tensor:
    assert isinstance(batch, dict)
    return batch["input"]


@cache
def _data() -> dict[str, Any]:
    """The training images in [−1, 1] with their noise, and labels, then the queries."""
    images, labels = first_of_both(NUM_TRAIN, NUM_QUERIES)
    pixels = F.avg_pool2d(torch.from_numpy(images).float()[:, None] / 127.5 - 1, 2).flatten(1)
    return {"input": with_noise(pixels), "target": torch.from_numpy(labels)}


WORK = Work(
    name="fashion_ddpm",
    data=_data,
    num_train=NUM_TRAIN,
    num_queries=NUM_QUERIES,
    trial_sizes=(64, 8),
    measurement=denoising,
    output=squared_output,
    training={
        "steps": 1_500,
        "batch_size": 32,
        "learning_rate": 2e-3,
        "optimizer": "adamw",
        "num_models": 5,
    },
    trial_training={"steps": 6, "num_models": 2},
    truth={"num_halves": 64, "num_seeds": 2, "num_removals": 32, "removed": 0.05},
)
# what the leaderboard and configs/suite name
task, train_set, test_set = WORK.task, WORK.train_set, WORK.test_set
train, train_removal = WORK.train, WORK.train_removal
