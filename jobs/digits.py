"""Which handwritten digits taught a small network to read this one? The whole pipeline, on digits.

    hardware   two CPU cores, no GPU, no network; 1 GB of memory
    time       under a minute
    data       scikit-learn's digits: 1,437 training and 360 test images of 8 × 8 pixels
    makes      stores/demo/: three checkpoints, the index, the answers, report.html

Run it as `make demo`, `tda demo`, or by path:

    python jobs/digits.py               # what `tda demo` runs
    python jobs/digits.py --path stores/digits --proj-dim 64 --num-test 120   # the committed run

`configs/digits.toml` names the functions below, so `tda index configs/digits.toml` does the same
piece by piece.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import tda
from tda.report import write_report

PATH = "stores/demo"
EPOCHS = 30
KEPT = (3, 10, 30)  # epochs after which a checkpoint is kept: early, middle, finished
BATCH = 64
MOMENTUM = 0.9
CHUNK_ROWS = 240  # six chunks hold 1,437 rows with little to spare: a small run stays small
NAMES = [str(digit) for digit in range(10)]

console = Console()


def learning_rate(epoch: int) -> float:
    return 0.05 if epoch < 20 else 0.01


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def train_set() -> dict[str, Any]:
    return _split()[0]


def test_set(num_test: int = 360) -> dict[str, Any]:
    return {name: values[:num_test] for name, values in _split()[1].items()}


def example(label: int, image: np.ndarray) -> dict[str, Any]:
    """An uploaded picture as one of the test set: 8 × 8 pixels, bright on dark (`tda serve`)."""
    picture = Image.fromarray(image).convert("L").resize((8, 8), Image.Resampling.BOX)
    pixels = np.asarray(picture)
    if pixels.mean() > 128:  # ink on paper
        pixels = 255 - pixels
    return {
        "input": torch.tensor(pixels.reshape(-1) / 255, dtype=torch.float32),
        "target": torch.tensor(label),
        "image": pixels,
    }


def task(run_path: str = PATH) -> tda.Task:
    """The network with its checkpoints, trained first if ``run_path`` has none yet."""
    folder = Path(run_path) / "checkpoints"
    index = folder / "index.json"
    if not index.exists():
        _train(folder)
    kept = json.loads(index.read_text())
    checkpoints = [tda.Checkpoint(folder / k.pop("file"), **k) for k in kept]
    return tda.Task(network(), checkpoints=checkpoints, measurement="cross_entropy")


def train(subset: np.ndarray, seed: int) -> nn.Module:
    """The same network, trained in the same way on part of the training set (`tda evaluate`)."""
    torch.manual_seed(seed)
    model = network()
    for _ in _epochs(model, subset, seed):
        pass
    return model


def demo(path: str | Path = PATH, proj_dim: int = 512, num_test: int = 360) -> Path:
    """Train, index, ask, report. Returns the report's path; a second call finds all of it done."""
    model = task(str(path))
    run = tda.index(model, train_set(), path, proj_dim=proj_dim, chunk_rows=CHUNK_ROWS)
    run.add_queries(test_set(num_test), "test", progress=True)
    _tell(run)
    return write_report(run, query_name="test", recipe="influence", label_names=NAMES)


@cache
def _split() -> tuple[dict[str, Any], dict[str, Any]]:
    digits = load_digits()
    split = train_test_split(
        np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
    )
    return _examples(digits, np.sort(split[0])), _examples(digits, np.sort(split[1]))


def _examples(digits: Any, rows: np.ndarray) -> dict[str, Any]:
    return {
        "input": torch.tensor(digits.data[rows] / 16, dtype=torch.float32),
        "target": torch.tensor(digits.target[rows]),
        "image": np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8),
        "id": [f"digit-{row:04}" for row in rows],
    }


def _epochs(model: nn.Module, subset: np.ndarray, seed: int) -> Iterator[int]:
    """Plain SGD with momentum on part of the training set; the steps taken after each epoch."""
    data = train_set()
    inputs, targets = data["input"][subset], data["target"][subset]
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate(0), momentum=MOMENTUM)
    step = 0
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch)
        for batch in torch.randperm(len(targets), generator=order).split(BATCH):
            loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        yield step


def _train(folder: Path) -> None:
    """The checkpoints; the same numbers every time on the same machine."""
    torch.manual_seed(0)
    model = network()
    every = np.arange(len(train_set()["target"]))
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    steps = track(_epochs(model, every, seed=0), "training", total=EPOCHS, console=console)
    done, rate_sum = 0, 0.0
    for epoch, step in enumerate(steps):
        rate_sum += (step - done) * learning_rate(epoch)
        done = step
        if epoch + 1 in KEPT:
            file = f"step-{step:05}.safetensors"
            save_file(model.state_dict(), folder / file)
            known = {"learning_rate_sum": round(rate_sum, 6), "momentum": MOMENTUM}
            kept.append(
                {"file": file, "step": step, "learning_rate": learning_rate(epoch), **known}
            )
    (folder / "index.json").write_text(json.dumps(kept, indent=1) + "\n")
    with torch.no_grad():
        held_out = test_set()
        right = (model(held_out["input"]).argmax(1) == held_out["target"]).float().mean()
    console.print(f"{right:.1%} of the test images are read correctly")


def _tell(run: tda.Run) -> None:
    """The answer about the test image that the network is most wrong about, in three lines."""
    queries, labels = run.store.table("queries/test"), run.store.table("train").column("label")
    probability = queries.column("p")[-1]
    worst = int(np.argmin(probability))
    top = run.top_k("test", k=5, recipe="influence")
    console.print(
        f"{queries.column('id')[worst]} is a {queries.column('label')[worst]}; "
        f"the network gives that {probability[worst]:.2g}",
        soft_wrap=True,
    )
    for side, ranking in (("for", top.proponents), ("against", top.opponents)):
        named = [
            f"{name} (a {labels[index]})"
            for name, index in zip(ranking.ids[worst], ranking.indices[worst], strict=True)
        ]
        console.print(f"  spoke {side} it: {', '.join(named)}", soft_wrap=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train on digits, index, ask, report.")
    parser.add_argument("--path", default=PATH)
    parser.add_argument("--proj-dim", type=int, default=512)
    parser.add_argument("--num-test", type=int, default=360, help="the first of 360")
    print(demo(**vars(parser.parse_args())))
