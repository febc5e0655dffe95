"""Find wrong labels among 60,000 real images, and ask which images taught a CNN what it predicts.

    hardware   two CPU cores, no GPU; 2 GB of memory, 650 MB of disk
    time       15 minutes with the data set fetched, on busy cores: the job got 1.1 of the two;
               all but the training took 6.4 minutes on one thread in a later run
    data       Fashion-MNIST, 60,000 + 10,000 images of 28 × 28 pixels: the Debian package
               dataset-fashion-mnist (31 MB, fetched once into data/), or --data FOLDER with the
               four idx .gz files. 10 % of the training labels are replaced by another, seeded.
    makes      stores/fashion_mnist/: three checkpoints, the index, the answers, report.html,
               planted.json
    expected   the CNN reads 90 % of the test images. Of the planted labels, inspecting the first
               10 % (20 %) of the training set finds: by self-influence 80 % (99 %) with the recipe
               influence, 74 % (99 %) with tracin; by the loss alone 91 % (99 %), so here the
               plain loss is the better ranking; by chance 10 % (20 %). Two trainings differed
               by up to one point.

    python jobs/fashion_mnist.py                        # all of it
    python jobs/fashion_mnist.py --num-train 2000 --num-test 200 --path stores/fashion_small

`configs/fashion_mnist.toml` names the functions below for `tda plan | index | query | report`.
Interrupted, the same command resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import hashlib
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

import tda
from tda.report import write_report

PATH = "stores/fashion_mnist"
CACHE = Path("data/fashion_mnist")
PACKAGE = "dataset-fashion-mnist"
SHA256 = "39e172fe32dd318e"  # the package's, first 16 digits
NAMES = ["T-shirt", "trouser", "pullover", "dress", "coat"]
NAMES += ["sandal", "shirt", "sneaker", "bag", "ankle boot"]
PLANTED = 0.10  # share of training labels replaced by a wrong one
EPOCHS = 6
KEPT = (1, 3, 6)  # epochs after which a checkpoint is kept
BATCH = 128
RECIPES = ("influence", "tracin")  # whose self-influence is tried
INSPECTED = (0.10, 0.20)

console = Console()


def learning_rate(epoch: int) -> float:
    return 0.05 if epoch < 4 else 0.01


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Pictures(torch.utils.data.Dataset):
    """Images as bytes, handed out one by one as floats: 60,000 of them take 47 MB."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, names: str, source: np.ndarray):
        self.images, self.targets, self.names, self.source = images, targets, names, source

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "input": as_input(self.images[index]),
            "target": int(self.targets[index]),
            "image": self.images[index],
            "id": f"{self.names}-{index:05}",
            "source": str(self.source[index]),
        }


def as_input(images: np.ndarray) -> torch.Tensor:
    """``[..., 28, 28]`` bytes to ``[..., 1, 28, 28]`` floats of about mean 0 and deviation 1."""
    return (torch.from_numpy(images).float().unsqueeze(-3) / 255 - 0.286) / 0.353


def train_set(num_train: int = 60_000, data: str | None = None) -> Pictures:
    """The training images; ``source`` says which labels were replaced, for the reader only."""
    images, labels = read("train", data)
    given, planted = plant(labels)
    source = np.where(planted, "label replaced", "label kept")
    return Pictures(images[:num_train], given[:num_train], "train", source[:num_train])


def test_set(num_test: int = 10_000, data: str | None = None) -> Pictures:
    images, labels = read("t10k", data)
    return Pictures(images[:num_test], labels[:num_test], "test", np.full(num_test, "test set"))


def plant(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(labels with a tenth replaced by one of the nine others, which ones were): seeded."""
    random = np.random.default_rng(0)
    planted = random.random(len(labels)) < PLANTED
    shift = random.integers(1, 10, len(labels))
    return np.where(planted, (labels + shift) % 10, labels), planted


def task(run_path: str = PATH, num_train: int = 60_000, data: str | None = None) -> tda.Task:
    """The CNN with its checkpoints, trained first if ``run_path`` has none yet."""
    folder = Path(run_path) / "checkpoints"
    index = folder / "index.json"
    if not index.exists():
        fit(folder, train_set(num_train, data), test_set(data=data))
    checkpoints = [
        tda.Checkpoint(folder / kept["file"], step=kept["step"], learning_rate=kept["lr"])
        for kept in json.loads(index.read_text())
    ]
    return tda.Task(network(), checkpoints=checkpoints, measurement="cross_entropy")


def fit(folder: Path, pictures: Pictures, held_out: Pictures) -> None:
    """SGD with momentum on the labels as given, wrong ones included."""
    torch.manual_seed(0)
    model, order = network(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate(0), momentum=0.9)
    inputs, targets = as_input(pictures.images), torch.from_numpy(pictures.targets).long()
    folder.mkdir(parents=True, exist_ok=True)
    kept, step = [], 0
    for epoch in track(range(EPOCHS), "training", console=console):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch)
        for batch in torch.randperm(len(targets), generator=order).split(BATCH):
            loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        if epoch + 1 in KEPT:
            file = f"step-{step:06}.safetensors"
            save_file(model.state_dict(), folder / file)
            kept.append({"file": file, "step": step, "lr": learning_rate(epoch)})
    (folder / "index.json").write_text(json.dumps(kept, indent=1) + "\n")
    with torch.no_grad():
        answers = model(as_input(held_out.images)).argmax(1).numpy()
    console.print(f"{np.mean(answers == held_out.targets):.1%} of the test images are right")


@functools.cache
def read(part: str, data: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(images ``[n, 28, 28]``, labels ``[n]``) of "train" or "t10k", from two idx files."""
    folder = Path(data) if data else fetch()
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    pictures = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pictures.copy(), np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def first_of_both(num_train: int, num_test: int) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of the first training examples, then of the first of the test set."""
    pairs = ((read("train", None), num_train), (read("t10k", None), num_test))
    images, labels = zip(*((x[:n], y[:n]) for (x, y), n in pairs), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def fetch() -> Path:
    """The folder of the idx files: fetched from the Debian archive once, checked, and kept."""
    folder = CACHE / "usr/share/datasets/fashion-mnist"
    if (CACHE / "checked").exists():
        return folder
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise SystemExit(
            f"without apt-get and dpkg, name the idx files' folder: --data ({PACKAGE})"
        )
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"fetching {PACKAGE} (31 MB) into {CACHE}/")
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as own:  # another job may fetch it too
        made = _unpacked(Path(own))
        with contextlib.suppress(OSError):  # the other was first
            made.rename(CACHE)
    if not (CACHE / "checked").exists():
        raise SystemExit(f"{CACHE}/ holds something else: delete it")
    return folder


def _unpacked(folder: Path) -> Path:
    """The package, downloaded into ``folder``, checked and unpacked there."""
    subprocess.run(
        ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", PACKAGE],
        cwd=folder,
        check=True,
    )
    package = next(folder.glob(f"{PACKAGE}_*.deb"))
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if not found.startswith(SHA256):
        raise SystemExit(
            f"{package.name}: sha256 is {found[:16]}…, wanted {SHA256}…: another release?"
        )
    made = folder / "unpacked"
    subprocess.run(["dpkg", "-x", package.name, made.name], cwd=folder, check=True)
    (made / "checked").write_text(found + "\n")
    return made


def found_early(ranking: np.ndarray, planted: np.ndarray) -> list[float]:
    """Share of the planted labels among the first 10 % and 20 % of ``ranking``, highest first."""
    return [
        float(planted[ranking[: round(share * len(ranking))]].sum() / planted.sum())
        for share in INSPECTED
    ]


def planted_labels(run: tda.Run) -> dict[str, list[float]]:
    """For each way of ranking the training examples: the share of planted labels it finds early."""
    table = run.store.table("train")
    planted = np.asarray(table.column("source")) == "label replaced"
    orders = {f"self-influence, {name}": -run.self_influence(name) for name in RECIPES}
    loss = table.column("loss")
    orders["loss, last checkpoint"] = -loss[-1]
    orders["loss, mean of checkpoints"] = -loss.mean(0)
    return {
        name: found_early(np.argsort(order, kind="stable"), planted)
        for name, order in orders.items()
    }


def main(path: str, num_train: int, num_test: int, data: str | None, proj_dim: int) -> None:
    started = time.perf_counter()
    model = task(path, num_train, data)
    run = tda.index(model, train_set(num_train, data), path, proj_dim=proj_dim)
    run.add_queries(test_set(num_test, data), "test", progress=True)
    figures = planted_labels(run)
    (Path(path) / "planted.json").write_text(json.dumps(figures, indent=1) + "\n")
    table = Table("planted labels found, inspecting the", *(f"first {s:.0%}" for s in INSPECTED))
    for name, shares in figures.items():
        table.add_row(name, *(f"{share:.1%}" for share in shares))
    table.add_row("chance", *(f"{share:.1%}" for share in INSPECTED))
    console.print(table)
    report = write_report(run, query_name="test", recipe="influence", label_names=NAMES)
    console.print(f"{time.perf_counter() - started:.0f} s")
    print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Index Fashion-MNIST and find planted labels.")
    parser.add_argument("--path", default=PATH)
    parser.add_argument("--num-train", type=int, default=60_000, help="the first of 60,000")
    parser.add_argument("--num-test", type=int, default=10_000, help="the first of 10,000")
    parser.add_argument("--data", help="folder with the four idx .gz files")
    parser.add_argument("--proj-dim", type=int, default=1024)
    arguments = parser.parse_args()
    main(**vars(arguments))
