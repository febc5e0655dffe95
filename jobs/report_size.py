"""How long do the report, the values and a page of the explorer take on a very large run?

    hardware   two CPU cores, no GPU; 1 GB of disk for a million examples
    makes      stores/report_size/: a synthetic run whose faults are known, its report, figures.json

    python jobs/report_size.py                                      # 1,000,000 examples
    python jobs/report_size.py --num-train 60000 --num-queries 10000 --dim 1024

The run is that of a linear classifier on made features, trained three times: rows are its exact
gradients, sketched. One label in a hundred is another class's, one example in a thousand is a copy
of another, one query in five is in the training set. No model is trained, so that the time is the
report's; each part runs in a process of its own, whose processor seconds and peak memory it tells.

Seen for 1,000,000 × 1,000 on two quiet cores: the report took 36 s, 52 of a processor (a third of
them to find every example's neighbours), and 1.71 GB; a warm page of the explorer 62 ms. The aims
were 60 s, 2 GB and 300 ms. (On an older processor: 59 s, 82, 1.81 GB, 135 ms.)
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import tda
from tda import valuation
from tda.examples import Examples
from tda.report import write_report
from tda.store import Store

PATH = "stores/report_size"
SEEDS, CLASSES, SOURCES = 3, 10, 5
WRONG, COPIED, LEAKED = 0.01, 0.001, 0.2
SPREAD = 0.6  # of a feature around its class, in the distance between classes
PARTS = ("report", "value", "explorer")

console = Console()


class Made:
    """The features and labels, drawn block by block so that no more than one is ever held."""

    def __init__(self, num_train: int, num_queries: int, hidden: int, dim: int) -> None:
        random = np.random.default_rng(0)
        self.num_train, self.num_queries, self.hidden, self.dim = (
            num_train,
            num_queries,
            hidden,
            dim,
        )
        self.centres = random.standard_normal((CLASSES, hidden)).astype(np.float32)
        self.heads = [
            self.centres.T / hidden**0.5
            + 0.1 * random.standard_normal((hidden, CLASSES)).astype(np.float32)
            for _ in range(SEEDS)
        ]
        self.bucket = random.integers(0, dim, (CLASSES, hidden))
        self.sign = random.choice(np.array([-1, 1], np.float32), (CLASSES, hidden))
        self.true = random.integers(0, CLASSES, num_train)
        self.wrong = random.random(num_train) < WRONG
        self.label = (self.true + self.wrong * random.integers(1, CLASSES, num_train)) % CLASSES
        # What an example's features are drawn from: its own number, or that of what it copies.
        self.drawn_as = np.arange(num_train)
        copies = random.choice(num_train, round(COPIED * num_train), replace=False)
        self.drawn_as[copies] = random.integers(0, num_train, len(copies))
        self.true, self.label = self.true[self.drawn_as], self.label[self.drawn_as]
        self.wrong = self.label != self.true
        self.query_label = random.integers(0, CLASSES, num_queries)
        self.leaked = np.flatnonzero(random.random(num_queries) < LEAKED)
        self.leaks = random.choice(num_train, len(self.leaked), replace=False)
        self.query_label[self.leaked] = self.label[self.leaks]
        self.draws = random.standard_normal((4096, hidden)).astype(np.float32)

    def features(self, drawn_as: np.ndarray, label: np.ndarray) -> np.ndarray:
        """[example, hidden]: the centre of the class and noise that is a function of the number."""
        noise = self.draws[drawn_as % 4096] + self.draws[(drawn_as // 4096 + 7) % 4096]
        noise = noise * (1 + (drawn_as % 13)[:, None] / 13)
        return (self.centres[label] + SPREAD * noise).astype(np.float32)

    def train(self, start: int, stop: int) -> np.ndarray:
        return self.features(self.drawn_as[start:stop], self.true[start:stop])

    def queries(self, start: int, stop: int) -> np.ndarray:
        number = self.num_train + np.arange(self.num_queries)
        label = self.query_label.copy()
        number[self.leaked] = self.drawn_as[self.leaks]
        label[self.leaked] = self.true[self.leaks]
        return self.features(number[start:stop], label[start:stop])

    def chunk(self, seed: int, features: np.ndarray, label: np.ndarray) -> tuple[Any, Any, Any]:
        """(rows, columns, embedding): f = log(p/(1−p)) of the label, ∇f = (1_y − p_other) ⊗ x."""
        logits = features @ self.heads[seed]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        every = np.arange(len(label))
        own = np.clip(p[every, label], 1e-6, 1 - 1e-6)
        factor = -p / (1 - own)[:, None]
        factor[every, label] = 1
        rows = np.zeros((len(label), self.dim), np.float32)
        for c in range(CLASSES):
            signed = factor[:, c : c + 1] * features * self.sign[c]
            np.add.at(rows.T, self.bucket[c], signed.T)
        norm = np.linalg.norm(factor, axis=1) * np.linalg.norm(features, axis=1)
        columns = {
            "loss": -np.log(own),
            "p": own,
            "slope": own - 1,
            "curvature": own * (1 - own),
            "grad_norm": norm,
        }
        return rows, {name: of.astype(np.float32) for name, of in columns.items()}, features


def make(path: Path, made: Made) -> tda.Run:
    """The store of a run, as `tda.index` would leave it."""
    checkpoints = [
        {
            "name": f"seed {seed}",
            "step": 1000,
            "learning_rate": 0.01,
            "learning_rate_sum": 50.0,
            "momentum": 0.9,
            "digest": f"{seed}",
        }
        for seed in range(SEEDS)
    ]
    rows = 8 * 2**20 // (2 * made.dim)
    store = Store.create(
        path,
        {
            "format": 1,
            "model": {"name": "made", "digest": "m"},
            "checkpoints": checkpoints,
            "measurement": {"name": "cross_entropy", "digest": "c", "has_margin": True},
            "projection": {"kind": "count_sketch", "dim": made.dim, "seed": 0},
            "dtype": "bfloat16",
            "chunk_rows": min(rows, 4096),
            "versions": {},
        },
    )
    train = _examples("train", made.label, made.train)
    source = np.array([f"source {c}" for c in range(SOURCES)])
    train.columns["source"] = source[np.arange(made.num_train) % SOURCES]
    for name, examples, features in (
        ("train", train, made.train),
        ("queries/test", _examples("test", made.query_label, made.queries), made.queries),
    ):
        table = store.plan(name, examples, made.hidden)
        for checkpoint, chunk in table.missing():
            span = slice(*table.chunk_range(chunk))
            label = examples.columns["label"][span]
            table.write(
                checkpoint, chunk, *made.chunk(checkpoint, features(span.start, span.stop), label)
            )
    return tda.open(path)


def _examples(name: str, label: np.ndarray, features: Any) -> Examples:
    """Their digests are those of their features, as those of data are."""
    digests = np.empty((len(label), 16), np.uint8)
    for start in range(0, len(label), 65536):
        rows = features(start, min(start + 65536, len(label)))
        stirred = rows[:, :4].copy().view(np.uint8)
        digests[start : start + len(rows)] = stirred.reshape(len(rows), 16)
    ids = np.char.add(f"{name}-", np.arange(len(label)).astype(str))
    text = np.char.add("the text of ", ids)
    return Examples(ids, digests, {"label": label, "text": text})


def report(path: Path) -> dict[str, Any]:
    page = write_report(tda.open(path), query_name="test", recipe="influence")
    found = json.loads(page.with_name("summary.json").read_text())["decisions"]
    return {name: found[name] for name in found if name.startswith("num_")}


def value(path: Path) -> dict[str, Any]:
    found = valuation.values(tda.open(path), "test", "influence")
    return {"reliable": float(found.reliable.mean())}


def explorer(path: Path) -> dict[str, Any]:
    """Milliseconds of the page of a query that was not asked before."""
    from fastapi.testclient import TestClient

    from tda.explorer import Explorer, create_app

    web = TestClient(create_app(Explorer(tda.open(path))), base_url="http://localhost")
    taken = []
    for query in range(9):
        begun = time.perf_counter()
        web.get(f"/?query={query}&recipe=influence").raise_for_status()
        taken.append(1000 * (time.perf_counter() - begun))
    return {"first ms": taken[0], "warm ms": float(np.median(taken[1:]))}


def measured(part: str, path: str) -> dict[str, Any]:
    begun, busy = time.perf_counter(), time.process_time()
    found = {"report": report, "value": value, "explorer": explorer}[part](Path(path))
    return {
        "seconds": time.perf_counter() - begun,
        "processor seconds": time.process_time() - busy,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        **found,
    }


def main(path: str, num_train: int, num_queries: int, hidden: int, dim: int, part: str) -> None:
    if part != "all":
        print(json.dumps(measured(part, path)))
        return
    made = Made(num_train, num_queries, hidden, dim)
    begun = time.perf_counter()
    make(Path(path), made)
    console.print(f"the run was made in {time.perf_counter() - begun:.0f} s")
    figures = {}
    for name in PARTS:
        command = [sys.executable, __file__, "--path", path, "--part", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        figures[name] = json.loads(done.stdout.splitlines()[-1])
        table = Table(name, "")
        for what, number in figures[name].items():
            table.add_row(
                what, json.dumps(number) if isinstance(number, dict) else f"{number:,.4g}"
            )
        console.print(table)
    console.print(
        f"made: {made.wrong.sum():,} wrong labels, {len(made.leaked):,} leaked queries, "
        f"{num_train - len(np.unique(made.drawn_as)):,} copies"
    )
    Path(path, "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the report of a very large run.")
    parser.add_argument("--path", default=PATH)
    parser.add_argument("--num-train", type=int, default=1_000_000)
    parser.add_argument("--num-queries", type=int, default=1_000)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    main(**vars(parser.parse_args()))
