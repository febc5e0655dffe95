"""Suite: handwritten digits and a small network.

    data       scikit-learn's digits: 1,400 training images of 8 × 8 pixels, 200 queries
    model      MLP 64-64-32-10 (6,570 parameters), SGD with momentum, 700 steps of 50
    truth      100 halves × 5 seeds; 100 removals of 5 % with the seed of the model attributed
    time       ground truth 3 to 5 minutes on one core

`jobs/leaderboard.py --tasks digits_mlp` runs it; `configs/suite/digits_mlp.toml` names its parts.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import tda
from tda.code import load_code

HERE = Path(__file__).parent
NAME = "digits_mlp"
NUM_TRAIN, NUM_QUERIES = 1_400, 200
TRUTH = {"num_halves": 100, "num_seeds": 5, "num_removals": 100, "removed": 0.05}

Course = load_code("training.py:Course", HERE)
Lazily = load_code("training.py:Lazily", HERE)
checkpoints_of = load_code("training.py:checkpoints", HERE)
examples = load_code("training.py:examples", HERE)
network = load_code("networks.py:network", HERE)
losses = load_code("networks.py:losses", HERE)


def course(quick: bool = False) -> Any:
    """The training of one network; quick: a trial of everything, with fewer of all."""
    data = train_set(quick)
    return Course(
        network=partial(network, NAME),
        inputs=data["input"],
        targets=data["target"],
        losses=partial(losses, NAME),
        steps=70 if quick else 700,
        batch_size=50,
        learning_rate=0.05,
        weight_decay=5e-4,
        together=True,
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
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    return images, torch.tensor(digits.target[order])
