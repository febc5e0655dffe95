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
    return {"input": as_input(images), "target": torch.from_numpy(labels)}


WORK = Work(
    name="fashion_cnn",
    data=_data,
    num_train=NUM_TRAIN,
    num_queries=NUM_QUERIES,
    measurement="cross_entropy",
    training={"steps": 600, "batch_size": 64, "learning_rate": 0.02, "weight_decay": 5e-4},
    trial_training={"steps": 40},
    truth={"num_halves": 64, "num_seeds": 2, "num_removals": 24, "removed": 0.05},
)
# what the leaderboard and configs/suite name
task, train_set, test_set = WORK.task, WORK.train_set, WORK.test_set
train, train_removal = WORK.train, WORK.train_removal
