"""A small run on disk, as a featurizer would make it: what the tests of the store share."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tda.examples import Examples
from tda.store import Store, Table
from tda.store.arrays import COLUMNS

N, K, H, CHUNK = 10, 6, 5, 4
DTYPES = ("bfloat16", "float32", "int8", "int4", "ternary")
MANIFEST: dict[str, Any] = {
    "format": 1,
    "model": {"name": "net", "digest": "m"},
    "checkpoints": [
        {"name": "first", "step": 10, "learning_rate": 0.1, "digest": "a"},
        {"name": "second", "step": 20, "learning_rate": None, "digest": "b"},
    ],
    "measurement": {"name": "cross_entropy", "digest": "c", "has_margin": True},
    "projection": {"kind": "count_sketch", "dim": K, "seed": 0},
    "layers": [{"name": "fc", "offset": 0, "size": K}],
    "dtype": "bfloat16",
    "chunk_rows": CHUNK,
    "versions": {"torch": "2"},
}
ODD_IDS = [
    "../../etc/passwd",
    "é/ü 日本 🙂",
    "a\0b",
    "<b>&\"'",
    "",
    ".",
    "CON",
    "x" * 40,
    "\n",
    "-rf",
]


def examples(n: int = N) -> Examples:
    digests = np.random.default_rng(1).integers(0, 256, (100, 16), dtype=np.uint8)[:n]
    ids = np.array((ODD_IDS + [f"id{i}" for i in range(90)])[:n])
    columns = {
        "label": np.arange(n) % 3,
        "source": np.array([f"source {i % 2}" for i in range(n)]),
        "text": np.array(["text " * (i % 4) for i in range(n)]),
        "image": np.random.default_rng(2).integers(0, 256, (100, 3, 2), dtype=np.uint8)[:n],
    }
    return Examples(ids, digests, columns, inputs=digests ^ 1)


def values(checkpoint: int, start: int, stop: int) -> tuple[np.ndarray, dict, np.ndarray]:
    """What a featurizer would compute: a function of checkpoint and example alone."""
    draw = np.random.default_rng(checkpoint).normal(size=(100, K + H + len(COLUMNS)))
    draw = draw[start:stop].astype(np.float32)
    columns = {name: draw[:, K + H + i] for i, name in enumerate(COLUMNS)}
    return draw[:, :K], columns, draw[:, K : K + H]


def fill(table: Table, places: Iterable[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """Compute and write ``places`` (by default what is missing); returns them."""
    done = table.missing() if places is None else list(places)
    for checkpoint, chunk in done:
        table.write(checkpoint, chunk, *values(checkpoint, *table.chunk_range(chunk)))
    return done


def build(path: Path, n: int = N, **changes: Any) -> Store:
    store = Store.create(path, {**copy.deepcopy(MANIFEST), **changes})
    fill(store.plan("train", examples(n), H))
    return store


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def read_everything(path: Path) -> None:
    """Every public read of a run."""
    store = Store.open(path)
    for name in ("train", *(f"queries/{query_set}" for query_set in store.queries())):
        table = store.table(name)
        for column in table.columns():
            table.column(column)
        for checkpoint in range(table.num_checkpoints):
            table.rows(checkpoint, 0, table.num_rows)
            table.embedding(checkpoint, 0, table.num_rows)


def age(path: Path) -> None:
    """Let every file look old: what has been checked is then not checked again while it is."""
    for file in path.rglob("*"):
        os.utime(file, ns=(0, 0))


def flip(path: Path, seed: int = 0) -> None:
    """Another byte at a random place."""
    chance = random.Random(seed)
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
