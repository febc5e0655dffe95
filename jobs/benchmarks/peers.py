"""The peers at the same work: indexing a GPT's, a CNN's and an MLP's training set, k=2048.

Each runs by jobs/peers/speed.py in its own environment under data/peers/ (made on first use from
jobs/peers/PEER.txt), on as many examples as take it a quarter of a minute or so, against a plain
pass over the same examples. Why one fails stands in its place.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from suite.others import PEERS, environment_of, last_words

from benchmarks.indexing import DIM, index_seconds, plain_seconds
from benchmarks.timing import Rows
from benchmarks.workloads import workloads
from tda.projection import Projection

# examples of GPT, CNN and MLP; 0 where the peer cannot: a model it has no function for
METHODS = {
    "traker TRAK": (0, 16, 64),
    "dattri TRAK": (0, 16, 32),
    "dattri LoGra": (64, 256, 16384),
    "dattri FactGraSS": (64, 256, 16384),
    "captum TracInCP": (0, 256, 1024),
    "kronfluence EK-FAC": (0, 256, 2048),
}
SECONDS = 150  # for one peer at one workload

console = Console()


def peers() -> Rows:
    names = [work.name for work in workloads()]
    table: Rows = [("indexing, × plain by processor seconds (examples/s)", *names)]
    for method, numbers in METHODS.items():
        cells = [
            measured(method, name, number) if number else "has no function for it"
            for name, number in zip(names, numbers, strict=True)
        ]
        table.append((method, *cells))
        console.print(*table[-1])
    table.append(("tda, exact count sketch, to disk", *map(own, range(len(names)))))
    console.print(*table[-1])
    return table


def measured(method: str, name: str, number: int) -> str:
    python = environment_of(method.split()[0]).absolute()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [str(python), str(PEERS / "speed.py"), method, name, str(number), str(out)]
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=threads, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"no end after {SECONDS} s with {number} examples"
        if done.returncode:
            return f"fails: {last_words(done.stderr)[:80]}"
        found = json.loads(out.read_text())
    return f"{found['busy'] / found['plain']:.2f} ({number / found['busy']:,.0f})"


def own(place: int) -> str:
    work = workloads()[place]
    torch.set_num_threads(1)
    sketch = Projection("count_sketch", DIM)
    index_seconds(work, sketch, "float32")
    busy, plain = index_seconds(work, sketch, "float32").busy, plain_seconds(work).busy
    number = len(work.data["input_ids"] if isinstance(work.data, dict) else work.data[0])
    return f"{busy / plain:.2f} ({number / busy:,.0f})"
