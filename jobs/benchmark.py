"""How fast is the engine? Ratios to plain training and to the machine's own roof, in one run.

    hardware   any; figures in jobs/BENCHMARK.md say which. One thread unless --threads is given
    time       about seven minutes
    makes      one entry at the top of jobs/BENCHMARK.md (earlier entries stay, failures too)

    python jobs/benchmark.py                    # everything, one thread
    python jobs/benchmark.py --only featurizer  # featurizer | scorer | start
    python jobs/benchmark.py --repeats 1        # shorter

Featurizing is measured whole – reading the data, hashing it, gradients, projection, columns and the
store – against a plain forward and backward pass over the same batches by the same model; the two
alternate, and the median of the ratios is what counts. The same ratio of processor seconds (which
leave out waiting for the disk) stands beside it: on a machine that others use, it is the steadier.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import tda
from tda.measurements import next_token_loss
from tda.projection import Projection

LOG = Path(__file__).parent / "BENCHMARK.md"
REPEATS = 3
Rows = list[tuple[str, ...]]
DIM = 2048
HAS_BFLOAT16 = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")

console = Console()


@dataclass(frozen=True)
class Workload:
    """A model with data for ``num_batches`` batches, and the loss it is trained with."""

    name: str
    model: nn.Module
    data: Any
    batch_size: int
    measurement: str
    loss: Callable[[nn.Module, Any], Tensor]


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """4 blocks of width 256, tied embedding."""

    def __init__(self, vocabulary: int = 1024, length: int = 128, width: int = 256) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(4)))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        return self.norm(self.blocks(x)) @ self.token.weight.T


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def workloads() -> list[Workload]:
    torch.manual_seed(0)
    tokens = {"input_ids": torch.randint(0, 1024, (128, 128))}
    images = (torch.randn(1024, 3, 32, 32), torch.randint(0, 10, (1024,)))
    vectors = (torch.randn(16384, 784), torch.randint(0, 10, (16384,)))
    return [
        Workload(
            "GPT 4×256", GPT(), tokens, 16, "causal_lm", lambda m, b: next_token_loss(m, b).mean()
        ),
        Workload("CNN", cnn(), images, 64, "cross_entropy", classify),
        Workload("MLP", mlp(), vectors, 256, "cross_entropy", classify),
    ]


def batches_of(work: Workload) -> list[Any]:
    if isinstance(work.data, dict):
        parts = {name: values.split(work.batch_size) for name, values in work.data.items()}
        return [dict(zip(parts, b, strict=True)) for b in zip(*parts.values(), strict=True)]
    return list(zip(*(values.split(work.batch_size) for values in work.data), strict=True))


class Seconds(NamedTuple):
    """Of the clock, and of this process on processors."""

    wall: float
    busy: float


def both(function: Callable[[], Any]) -> Seconds:
    wall, busy = time.perf_counter(), time.process_time()
    function()
    return Seconds(time.perf_counter() - wall, time.process_time() - busy)


def plain_seconds(work: Workload) -> Seconds:
    """Forward and backward over all the data, gradients of every weight."""

    def train() -> None:
        for batch in batches_of(work):
            work.model.zero_grad()
            work.loss(work.model, batch).backward()

    return both(train)


def index_seconds(work: Workload, projection: Projection, precision: str) -> Seconds:
    """The same data featurized into a store."""
    task = tda.Task(work.model, measurement=work.measurement, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        return both(
            lambda: tda.index(
                task, work.data, Path(folder) / "run", projection=projection,
                batch_size=work.batch_size, progress=False,
            )
        )  # fmt: skip


def featurizer(repeats: int) -> Rows:
    paths = [
        ("exact count sketch, fp32", Projection("count_sketch", DIM), "float32"),
        ("exact count sketch, bf16", Projection("count_sketch", DIM), "bfloat16"),
        ("two-stage eigenbasis, fp32", Projection("two_stage", DIM), "float32"),
        ("count sketch k=16,384, fp32", Projection("count_sketch", 16384), "float32"),
    ]
    rows: Rows = [
        ("indexing to disk", "× plain fp32", "range", "by processor seconds", "examples/s")
    ]
    for work in workloads():
        num_examples = len(work.data["input_ids"] if isinstance(work.data, dict) else work.data[0])
        plain_seconds(work)
        for name, projection, precision in paths:
            if precision == "bfloat16" and not HAS_BFLOAT16:
                rows.append((f"{work.name}: {name}", "not run", "no bf16 instructions", "", ""))
                continue
            index_seconds(work, projection, precision)
            pairs = [
                (index_seconds(work, projection, precision), plain_seconds(work))
                for _ in range(repeats)
            ]
            ratios = sorted(a.wall / b.wall for a, b in pairs)
            busy = median(a.busy / b.busy for a, b in pairs)
            speed = num_examples / median(a.wall for a, _ in pairs)
            rows.append(
                (f"{work.name}: {name}", f"{median(ratios):.2f}",
                 f"{ratios[0]:.2f}–{ratios[-1]:.2f}", f"{busy:.2f}", f"{speed:,.0f}")
            )  # fmt: skip
            console.print(*rows[-1])
    return rows


def scorer(num_rows: int = 50_000, num_queries: int = 1000, k: int = 100) -> Rows:
    """Exact top k of a synthetic store, against the float32 product alone and against FAISS."""
    import faiss

    from tda.recipes import RECIPES
    from tda.scorer import prepare, top_k
    from tda.store import Store

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Store, Path(folder) / "run", num_rows, num_queries, generator)
        prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
        rows = store.table("train").rows(0, 0, num_rows)
        flat = faiss.IndexFlatIP(DIM)
        flat.add(rows.numpy())
        faiss.omp_set_num_threads(torch.get_num_threads())
        ways = {
            "float32 product alone (roof)": lambda: [
                prepared.queries[0] @ block.T for block in rows.split(2048)
            ],
            f"exact top {k}, streamed from the store": lambda: top_k(prepared, k),
            f"FAISS flat, rows in memory, top {k}": lambda: flat.search(
                prepared.queries[0].numpy(), k
            ),
        }
        seconds = {name: median(timed(way) for _ in range(3)) for name, way in ways.items()}
    roof = next(iter(seconds.values()))
    head = (f"{num_queries:,} queries × {num_rows:,} rows × k={DIM}", "seconds", "of the roof")
    return [head, *((n, f"{s:.2f}", f"{roof / s:.2f}") for n, s in seconds.items())]


def synthetic_store(store_of: Any, path: Path, num_rows: int, num_queries: int, generator: Any):
    from tda.data import Examples

    store = store_of.create(
        path,
        {
            "model": {}, "checkpoints": [{"name": "c", "digest": "0"}],
            "measurement": {"name": "m", "digest": "0", "has_margin": False},
            "projection": {"kind": "count_sketch", "dim": DIM, "seed": 0},
            "dtype": "bfloat16", "chunk_rows": 2048,
        },
    )  # fmt: skip
    for name, count in (("train", num_rows), ("queries/q", num_queries)):
        ids = np.array([f"{name}-{i}" for i in range(count)])
        digests = np.frombuffer(generator.bytes(16 * count), np.uint8).reshape(count, 16)
        table = store.plan(name, Examples(ids, digests), None)
        for chunk in range(table.num_chunks):
            start, stop = table.chunk_range(chunk)
            ones = np.ones(stop - start, np.float32)
            columns = dict.fromkeys(("loss", "p", "slope", "curvature", "grad_norm"), ones)
            rows = generator.standard_normal((stop - start, DIM), dtype=np.float32)
            table.write(0, chunk, rows, columns)
    return store


def start() -> Rows:
    """Seconds of whole processes, median of five."""
    ways = {
        "import tda": [sys.executable, "-c", "import tda"],
        "tda --help": [sys.executable, "-m", "tda.cli", "--help"],
    }
    rows: Rows = [("start", "seconds")]
    for name, command in ways.items():
        once = partial(subprocess.run, command, check=True, capture_output=True)
        rows.append((name, f"{median(timed(once) for _ in range(5)):.2f}"))
    return rows


def timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def entry(tables: list[Rows]) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    head = (
        f"## {date.today().isoformat()} · {commit} · {torch.get_num_threads()} thread(s), "
        f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()} "
        f"· torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}\n"
    )
    return "\n".join([head, *(markdown(table) + "\n" for table in tables)])


def markdown(table: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("start", "featurizer", "scorer"))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    parts: dict[str, Callable[[], Rows]] = {
        "start": start, "featurizer": lambda: featurizer(chosen.repeats), "scorer": scorer
    }  # fmt: skip
    tables = [part() for name, part in parts.items() if chosen.only in (None, name)]
    written = entry(tables)
    title = "# Benchmark log: newest first; nothing is taken out\n\n"
    earlier = LOG.read_text(encoding="utf-8").removeprefix(title) if LOG.exists() else ""
    LOG.write_text(title + written + "\n" + earlier, encoding="utf-8")
    console.print(written)


if __name__ == "__main__":
    main()
