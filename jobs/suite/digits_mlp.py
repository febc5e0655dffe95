"""Suite: handwritten digits and a small network.

    data       scikit-learn's digits: 1,400 training images of 8 × 8 pixels, 200 queries
    model      MLP 64-64-32-10 (6,570 parameters), SGD with momentum, 700 steps of 50
    truth      100 halves × 5 seeds; 100 removals of 5 % with the seed of the model attributed
    time       ground truth 3 to 5 minutes on one core

`jobs/leaderboard.py --tasks digits_mlp` runs it; `configs/suite/digits_mlp.toml` names its parts.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from tda.code import load_code

HERE = Path(__file__).parent
Work = load_code("work.py:Work", HERE)
NUM_TRAIN, NUM_QUERIES = 1_400, 200


@cache
def _data() -> dict[str, Any]:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
    return {"input": images, "target": torch.tensor(digits.target[order])}


WORK = Work(
    name="digits_mlp",
    data=_data,
    num_train=NUM_TRAIN,
    num_queries=NUM_QUERIES,
    measurement="cross_entropy",
    training={
        "steps": 700,
        "batch_size": 50,
        "learning_rate": 0.05,
        "weight_decay": 5e-4,
        "together": True,
    },
    trial_training={"steps": 70},
    truth={"num_halves": 100, "num_seeds": 5, "num_removals": 100, "removed": 0.05},
)
# what the leaderboard and configs/suite name
task, train_set, test_set = WORK.task, WORK.train_set, WORK.test_set
train, train_removal = WORK.train, WORK.train_removal
