"""How fast is the engine? Ratios to plain training and to the machine's own roof, in one run.

    hardware   any; figures in jobs/BENCHMARK.md say which. One thread unless --threads is given
    time       half an hour; each part below eight minutes
    makes      one entry at the top of jobs/BENCHMARK.md (earlier entries stay, failures too)

    python jobs/benchmark.py                  # everything, one thread
    python jobs/benchmark.py --only indexing  # start | indexing | costs | scoring | large | growth
                                              # | gram | peers
    python jobs/benchmark.py --repeats 1      # shorter

What is measured, and how, is said in jobs/benchmarks/, a file a part.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.costs import costs
from benchmarks.gram import gram
from benchmarks.growth import growth
from benchmarks.indexing import indexing
from benchmarks.large import large
from benchmarks.peers import peers
from benchmarks.scoring import scoring
from benchmarks.start import start
from benchmarks.timing import Rows

LOG = Path(__file__).parent / "BENCHMARK.md"
REPEATS = 3
PARTS: dict[str, Callable[[int], list[Rows]]] = {
    "start": lambda repeats: [start()],
    "indexing": lambda repeats: [indexing(repeats)],
    "costs": lambda repeats: [costs()],
    "scoring": lambda repeats: [scoring()],
    "large": lambda repeats: [large()],
    "gram": lambda repeats: [gram()],
    "growth": lambda repeats: growth(),
    "peers": lambda repeats: [peers()],
}

console = Console()


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
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    tables: list[Rows] = []
    for name, part in PARTS.items():
        torch.set_num_threads(chosen.threads)
        if chosen.only in (None, name):
            tables += part(chosen.repeats)
    torch.set_num_threads(chosen.threads)
    written = entry(tables)
    title = "# Benchmark log: newest first; nothing is taken out\n\n"
    earlier = LOG.read_text(encoding="utf-8").removeprefix(title) if LOG.exists() else ""
    LOG.write_text(title + written + "\n" + earlier, encoding="utf-8")
    console.print(written)


if __name__ == "__main__":
    main()
