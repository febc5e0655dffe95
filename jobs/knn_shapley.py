"""KNN-Shapley: is it Shapley's value, how long does it take, and how long does pyDVL take?

    hardware   two CPU cores, no GPU; 3 GB of memory
    data       Fashion-MNIST's pixels, fetched by jobs/fashion_mnist.py (or --data FOLDER)
    peer       pyDVL in an environment of its own under data/peers/, made on first use from the
               pinned jobs/peers/pydvl.txt; both are given the same file, one after the other

    python jobs/knn_shapley.py                      # the peer on 2,000 × 100, ours on that and on
                                                    # 50,000 × 10,000
    python jobs/knn_shapley.py --no-peer --num-train 5000 --num-queries 1000

Seen on busy cores: on 2,000 × 100 pyDVL took 7 and 12 times our processor seconds in two runs (.43
to .06, .33 to .03), the values equal to 6e-7. On two quiet cores 50,000 × 10,000 took 23.8 seconds,
45.6 of a processor.

That the closed form is Shapley's value is proved on small sets by tests/test_valuation_knn.py.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from tda.code import load_code
from tda.valuation import knn_shapley

HERE = Path(__file__).resolve().parent
SHARED = (2_000, 100)  # examples and queries that both are given
K = 10

console = Console()


def of_peer(data: Path) -> dict[str, np.ndarray]:
    python = load_code("suite/others.py:environment_of", HERE)("pydvl")
    out = data.with_name("values.npz")
    subprocess.run([python, HERE / "peers/pydvl_knn.py", data, out], check=True)
    return dict(np.load(out))


def main(num_train: int, num_queries: int, no_peer: bool, folder: str | None) -> None:
    read = load_code("fashion_mnist.py:read", HERE)
    (x, y), (z, wanted) = read("train", folder), read("t10k", folder)
    x, z = (images.reshape(len(images), -1).astype(np.float32) / 255 for images in (x, z))

    def ours(n: int, m: int) -> tuple[np.ndarray, float]:
        begun, busy = time.perf_counter(), time.process_time()
        value = knn_shapley(x[:n], y[:n], z[:m], wanted[:m], K).value
        seconds, busy = time.perf_counter() - begun, time.process_time() - busy
        console.print(f"tda {n:,} × {m:,}: {seconds:.2f} s, {busy:.2f} processor seconds")
        return value, busy

    if not no_peer:
        n, m = SHARED
        data = Path("data/knn_shapley/data.npz")
        data.parent.mkdir(parents=True, exist_ok=True)
        np.savez(data, x=x[:n], y=y[:n], z=z[:m], wanted=wanted[:m], k=K)
        value, busy = ours(n, m)
        theirs = of_peer(data)
        console.print(
            f"pyDVL {n:,} × {m:,}: {theirs['seconds']:.2f} s, {theirs['processor_seconds']:.2f} "
            f"processor seconds, {theirs['processor_seconds'] / busy:.1f} times ours; "
            f"largest difference {np.abs(theirs['values'] - value).max():.1e} of values up to "
            f"{np.abs(value).max():.1e}"
        )
    ours(num_train, num_queries)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="KNN-Shapley beside pyDVL, and at size.")
    parser.add_argument("--num-train", type=int, default=50_000)
    parser.add_argument("--num-queries", type=int, default=10_000)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--data", dest="folder", help="folder with the four idx .gz files")
    main(**vars(parser.parse_args()))
