"""Suite: 5,000 images of clothes and an MLP.

    data       Fashion-MNIST (the package of jobs/fashion_mnist.py): the first 5,000 training images
               of 28 × 28 pixels, 100 queries of the test set
    model      MLP 784-128-64-10 (109,386 parameters), SGD with momentum, 1,600 steps of 64
    truth      100 halves × 5 seeds; 100 removals of 5 % with the seed of the model attributed
    time       ground truth about 20 minutes on one core

`jobs/leaderboard.py --tasks fashion_mlp` runs it; `configs/suite/fashion_mlp.toml` names its parts.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from tda.code import load_code

HERE = Path(__file__).parent
Work = load_code("work.py:Work", HERE)
NUM_TRAIN, NUM_QUERIES = 5_000, 100
first_of_both = load_code("../fashion_mnist.py:first_of_both", HERE)
as_input = load_code("../fashion_mnist.py:as_input", HERE)


@cache
def _data() -> dict[str, Any]:
    """The training images, then the queries."""
    images, labels = first_of_both(NUM_TRAIN, NUM_QUERIES)
    return {"input": as_input(images).flatten(1), "target": torch.from_numpy(labels)}


WORK = Work(
    name="fashion_mlp",
    data=_data,
    num_train=NUM_TRAIN,
    num_queries=NUM_QUERIES,
    measurement="cross_entropy",
    training={
        "steps": 1600,
        "batch_size": 64,
        "learning_rate": 0.03,
        "weight_decay": 5e-4,
        "together": True,
    },
    trial_training={"steps": 40},
    truth={"num_halves": 100, "num_seeds": 5, "num_removals": 100, "removed": 0.05},
)
# what the leaderboard and configs/suite name
task, train_set, test_set = WORK.task, WORK.train_set, WORK.test_set
train, train_removal = WORK.train, WORK.train_removal
