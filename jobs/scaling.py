"""How far it goes: two processes, a thousand workers, a billion examples. Writes jobs/SCALING.md.

    python jobs/scaling.py --repeats 2      # 14 minutes on two cores; without, 5 repeats
    python jobs/scaling.py --workers 50 --pieces 400 --rows 0.05 --repeats 1

Hardware: two cores, as free as can be. Expected: two processes index ≥ 1.8 × as fast as one, Dask's
threads take ≤ 1.15 × and its processes ≤ 1.5 × the time of a plain loop, and what a piece of work
costs the scheduler does not grow with the number of workers. The parts:

    jobs/simulation/ratios.py        processes and Dask against a plain loop
    jobs/simulation/scheduling.py    a real scheduler and client, and workers that do nothing
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from simulation.ratios import DIM, NUM_QUERIES, Ratios, measure
from simulation.scheduling import Cost, cost

PAGE = Path(__file__).with_name("SCALING.md")
WORKERS = (50, 300, 1000)

# Of the extrapolation. Prices are assumptions: list prices of large providers are of this order.
EXAMPLES = 10**9
CHUNK_BYTES = 8 * 2**20
GPU_RATE = 150_000 / 512  # examples/s, in texts of 512 tokens: an H200 (jobs/gpu_smollm2.py)
CORE_PRICE, GPU_PRICE = 0.04, 2.50  # an hour
STORAGE_PRICE, PUT_PRICE = 0.023, 5e-6  # a GB and month; a request
REQUESTS = 2  # of a chunk: its rows, its mark


def page(found: Ratios, costs: Sequence[Cost], command: str, note: str) -> str:
    lines = [
        "# Scaling",
        "",
        f"Written by `{command}` on {date.today().isoformat()}: {os.cpu_count()} cores, "
        f"{platform.machine()}, torch {torch.__version__}.",
        *(["", f"**{note}**"] if note else []),
        "",
        "## Processes, and Dask against a plain loop",
        "",
        f"Rows of {DIM} numbers, one thread a process; then the scores of those of "
        f"{found.indexing[0].what} for {NUM_QUERIES} queries into a Zarr array. Medians of "
        f"{found.repeats} interleaved rounds after one that does not count; clusters are started "
        "before. Scheduler and client share the cores with the workers: where a row costs them "
        "little, two workers do not have two cores.",
        "",
        "| indexing | rows | rows/s, one worker | two workers against one | "
        "one worker against the plain loop |",
        "|---|---|---|---|---|",
        *(
            f"| {i.what} | {i.rows:,} | {i.rows_per_second:,.0f} | {i.two_processes:.2f} × as fast "
            f"(wanted ≥ 1.8) | {i.plain:.2f} × the time |"
            for i in found.indexing
        ),
        "",
        "| scores | measured | wanted |",
        "|---|---|---|",
        f"| Dask's threads against the plain loop | {found.threads:.2f} × the time | ≤ 1.15 |",
        f"| Dask's processes against the plain loop | {found.processes:.2f} × the time | ≤ 1.5 |",
        "",
        "## A thousand workers",
        "",
        "A real scheduler, the engine's own client, and workers that answer each piece at once. "
        "Milliseconds of a processor for one piece; at full speed the two run side by side.",
        "",
        "| workers | pieces | scheduler | client | wall |",
        "|---|---|---|---|---|",
        *(
            f"| {c.workers:,} | {c.pieces:,} | {c.scheduler:.2f} | {c.client:.2f} | {c.wall:.2f} |"
            for c in costs
        ),
        "",
        *_paper(found, costs[-1]),
    ]
    return "\n".join(lines) + "\n"


def _paper(found: Ratios, most: Cost) -> list[str]:
    chunk = CHUNK_BYTES // (2 * DIM)
    pieces = -(-EXAMPLES // chunk)
    size = EXAMPLES * DIM * 2
    busiest = max(most.scheduler, most.client)
    places = [
        (f"cores, {found.indexing[0].what}", found.indexing[0].rows_per_second, 1000, CORE_PRICE),
        ("GPUs, a language model of 135M", GPU_RATE, 256, GPU_PRICE),
        ("GPUs, the same", GPU_RATE, 1000, GPU_PRICE),
    ]
    lines = [
        f"## {EXAMPLES:,} examples, on paper",
        "",
        "One checkpoint; C checkpoints are C times as much of everything. n examples, k numbers a "
        "row in bfloat16, W workers of r examples/s, s the time of the busier of scheduler and "
        "client for a piece.",
        "",
        f"- bytes = 2 n k = {size / 1e12:.2f} TB (k = {DIM}); int8: {size / 2e12:.2f} TB",
        f"- pieces = n / chunk rows = n / (8 MiB / 2k) = {pieces:,} of {chunk:,} rows; the client "
        f"keeps {2 * most.workers:,} of them at the scheduler, not all",
        f"- scheduling = pieces × s = {pieces:,} × {busiest:.2f} ms = "
        f"{pieces * busiest / 3.6e6:.2f} hours of one processor, beside the work",
        "- hours = n / (W r); workers one scheduler can feed = chunk rows / (r s)",
        f"- storage = bytes × ${STORAGE_PRICE}/GB and month = "
        f"${size / 1e9 * STORAGE_PRICE:,.0f} a month; writing it = {REQUESTS} PUT a piece × "
        f"${PUT_PRICE * 1e6:.0f} a million = ${pieces * REQUESTS * PUT_PRICE:,.2f}",
        "",
        "| workers | r, examples/s | W | hours | cost | could be fed |",
        "|---|---|---|---|---|---|",
    ]
    for what, rate, count, price in places:
        hours = EXAMPLES / (count * rate) / 3600
        fed = chunk / (rate * busiest / 1e3)
        paid = f"${hours * count * price:,.0f}"
        lines.append(f"| {what} | {rate:,.0f} | {count:,} | {hours:,.1f} | {paid} | {fed:,.0f} |")
    lines += [
        "",
        f"Assumed: ${CORE_PRICE} a core and hour, ${GPU_PRICE:.2f} a GPU and hour. The rate of "
        "the cores is measured above; that of the GPUs is 150,000 tokens/s in texts of 512 tokens "
        "(an H200 has done 155,000: jobs/gpu_smollm2.py), not a measurement of this page. "
        "Where fewer could be fed than W, larger chunks are the answer: the cost is a piece's, not "
        "a row's. Not in it: reading the data, workers' heartbeats, starting them.",
    ]
    return lines


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="simulated")
    parser.add_argument("--pieces", type=int, default=2000, help="of simulated work")
    parser.add_argument("--rows", type=float, default=1.0, help="share of the usual ones")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="", help="a line for the page, about the machine")
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args(given)
    words = sys.argv[1:] if given is None else list(given)
    command = " ".join(["python jobs/scaling.py", *(w if " " not in w else "…" for w in words)])
    torch.set_num_threads(1)
    costs = []
    for count in asked.workers:
        costs.append(cost(count, asked.pieces))
        print(costs[-1], file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), asked.rows, asked.repeats)
    print(found, file=sys.stderr)
    asked.out.write_text(page(found, costs, command, asked.note))
    print(asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
