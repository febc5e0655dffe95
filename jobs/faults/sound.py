"""A sound run with everything in it, and what it answers: what strangers meddle with."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tda
from tda.decisions import Marks

IDS = ["../../etc/passwd", "é/ü 日本 🙂", "a\0b", "<b>&\"'", "", ".", "CON", "x" * 40, "\n", "-rf"]


def make_run(path: Path) -> tda.Task:
    """Small, but with everything a run may hold; ids are as odd as they get."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(14, 5, generator=generator)
    y = torch.arange(14) % 3
    data = [{"input": x[i], "target": y[i], "id": name} for i, name in enumerate(IDS)]
    asked = [{"input": x[i], "target": y[i], "id": f"q{i}"} for i in range(10, 14)]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    second = {name: value * 1.5 for name, value in first.items()}
    checkpoints = [
        tda.Checkpoint(first, step=1, learning_rate=0.1),
        tda.Checkpoint(second, step=2, learning_rate=0.05),
    ]
    task = tda.Task(model, checkpoints=checkpoints, measurement="cross_entropy")
    options: dict[str, Any] = {"projection": "eigenbasis", "proj_dim": 16, "progress": False}
    run = tda.index(task, data, path, chunk_rows=6, **options)
    run.add_curvature(data, num_rows=10)
    run.add_queries(asked, "q")
    run.delete([IDS[3]])

    def retrain(subset: np.ndarray, seed: int) -> np.ndarray:
        return np.full(4, subset.sum() + seed, np.float32)

    design = tda.evaluate.Design(num_subsets=3, seeds=(0, 1))
    tda.evaluate.ground_truth(run, retrain, asked, design, progress=False)
    marks = Marks(path)
    for i, action in enumerate(("remove", "keep", "relabel")):
        marks.set(IDS[i], action, "2" if action == "relabel" else None, "note")  # type: ignore[arg-type]
    shutil.rmtree(path / "cache")
    (path / "cache").write_text("no folder, so nothing is kept between two inputs")
    return task


Answer = Callable[[tda.Run], Any]


def _columns(run: tda.Run) -> Any:
    table = run.store.table("train")
    return [(name, table.column(name).tobytes()) for name in table.columns()]


def _top(run: tda.Run) -> Any:
    top = run.top_k("q", k=3, recipe="influence_gn")
    return top.proponents.ids.tolist(), top.opponents.scores.tobytes()


def _truth(run: tda.Run) -> Any:
    truth = tda.evaluate.GroundTruth.open(run.path / "evaluate" / "half")
    return truth.masks.tobytes(), truth.outputs.tobytes()


def _decided(run: tda.Run) -> Any:
    return [(m.id, m.action, m.label, m.note) for m in Marks(run.path).all().values()]


def _bases(run: tda.Run) -> Any:
    projector = run.featurizer().projector
    return None if projector is None else list(projector.layers)


ANSWERS: dict[str, tuple[Answer, tuple[str, ...]]] = {  # with the files it is made of
    "top": (_top, ("train/", "curvature/", "queries/", "manifest.json")),
    "columns": (_columns, ("train/", "manifest.json")),
    "self": (lambda run: run.self_influence("grad_dot").tobytes(), ("train/", "manifest.json")),
    "near": (lambda run: run.baseline_top_k("q", 2).proponents.ids.tolist(), ("queries/",)),
    "truth": (_truth, ("evaluate/",)),
    "marks": (_decided, ("actions/",)),
    "bases": (_bases, ("projection.npz", "manifest.json")),
}


def answers(path: Path, task: tda.Task, which: set[str]) -> dict[str, Any]:
    """These kinds of answer."""
    run = tda.open(path, task)
    found = {name: ask(run) for name, (ask, _) in ANSWERS.items() if name in which}
    return {"ids": run.ids.tolist(), "queries": run.queries, **found}


def concerned(keys: set[str], chance: random.Random) -> set[str]:
    """The answers that are made of some of these files, and one other."""
    made = {n for n, (_, files) in ANSWERS.items() if any(k.startswith(files) for k in keys)}
    picked = chance.sample(sorted(made), min(2, len(made)))
    return {*picked, chance.choice(list(ANSWERS))}


@dataclass
class Sound:
    """The run that is tampered with, on a copy that is put right after each input."""

    path: Path
    task: tda.Task
    files: dict[str, bytes]
    answers: dict[str, Any]
    outside: Path

    @staticmethod
    def make(folder: Path) -> Sound:
        path, outside = folder / "run", folder / "outside"
        task = make_run(path)
        outside.mkdir()
        (outside / "secret").write_bytes(b"not for you\n")
        files = {
            file.relative_to(path).as_posix(): file.read_bytes()
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        return Sound(path, task, files, answers(path, task, set(ANSWERS)), outside)

    def put_right(self, keys: set[str]) -> None:
        for key in sorted(keys):  # a folder before what is in it
            place = self.path / key
            if place.is_symlink() or place.is_file() or place.is_fifo():
                place.unlink()
            elif place.is_dir():
                shutil.rmtree(place)
            if key in self.files:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(self.files[key])
