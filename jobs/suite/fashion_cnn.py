"""Suite: 5,000 images of clothes and a small CNN.

    data       Fashion-MNIST (the package of jobs/fashion_mnist.py): the first 5,000 training images
               of 28 × 28 pixels, 100 queries of the test set
    model      the CNN of jobs/fashion_mnist.py (two convolutions, 105,866 parameters), SGD with
               momentum, 600 steps of 64
    truth      64 halves × 2 seeds; 24 removals of 5 % with the seed of the model attributed
    time       ground truth about 8 minutes on one core

`jobs/leaderboard.py --tasks fashion_cnn` runs it; `configs/suite/fashion_cnn.toml` names its parts.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tda
from tda.code import load_code

HERE = Path(__file__).parent
NAME = "fashion_cnn"
NUM_TRAIN, NUM_QUERIES = 5_000, 100
TRUTH = {"num_halves": 64, "num_seeds": 2, "num_removals": 24, "removed": 0.05}

Course = load_code("training.py:Course", HERE)
Lazily = load_code("training.py:Lazily", HERE)
checkpoints_of = load_code("training.py:checkpoints", HERE)
examples = load_code("training.py:examples", HERE)
network = load_code("networks.py:network", HERE)
losses = load_code("networks.py:losses", HERE)
read = load_code("../fashion_mnist.py:read", HERE)
as_input = load_code("../fashion_mnist.py:as_input", HERE)


def course(quick: bool = False) -> Any:
    """The training of one network; quick: a trial of everything, with fewer of all."""
    data = train_set(quick)
    return Course(
        network=partial(network, NAME),
        inputs=data["input"],
        targets=data["target"],
        losses=partial(losses, NAME),
        steps=40 if quick else 600,
        batch_size=64,
        learning_rate=0.02,
        weight_decay=5e-4,
    )


# (subset, seed) -> the network trained on the subset, for `tda evaluate`
train, train_removal = Lazily(course), Lazily(course, "removal")


def task(run_path: str, checkpoints: str = "last", quick: bool = False) -> tda.Task:
    """checkpoints: "last", "path" (one run) or "models" (independent seeds)."""
    given = checkpoints_of(course(quick), run_path, checkpoints)
    return tda.Task(network(NAME), checkpoints=given, measurement="cross_entropy")


def train_set(quick: bool = False) -> dict[str, Any]:
    return examples(_data(), "train", 0, 200 if quick else NUM_TRAIN)


def test_set(quick: bool = False) -> dict[str, Any]:
    return examples(_data(), "query", NUM_TRAIN, 20 if quick else NUM_QUERIES)


@cache
def _data() -> tuple[Tensor, Tensor]:
    """The training images, then the queries."""
    pairs = [read("train", None), read("t10k", None)]
    cut = [(x[:n], y[:n]) for (x, y), n in zip(pairs, (NUM_TRAIN, NUM_QUERIES), strict=True)]
    images = as_input(np.concatenate([x for x, _ in cut]))
    return images, torch.from_numpy(np.concatenate([y for _, y in cut]))
