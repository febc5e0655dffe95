"""Fixtures: a problem as the engine sees it, and the same problem worked out naively."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import naive
import numpy as np
import problems
import pytest
import stored
import torch

import tda

if TYPE_CHECKING:
    from object_storage import Server

    from tda.run import Run
    from tda.task import Task


@dataclass(frozen=True)
class Indexed:
    """A problem, indexed without projection, and its rows by the oracle (one a checkpoint)."""

    problem: problems.Problem
    run: Run
    train: list[naive.Rows]
    queries: list[naive.Rows]

    def stored(self, checkpoint: int) -> np.ndarray:
        """The engine's rows ∇f of the training set, [train, proj]."""
        return self.run.store.table("train").rows(checkpoint, 0, len(self.problem.train)).numpy()


def make_task(problem: problems.Problem) -> Task:
    checkpoints = [
        tda.Checkpoint(w.state, step=w.step, learning_rate=w.learning_rate)
        for w in problem.checkpoints
    ]
    return tda.Task(problem.make(), checkpoints=checkpoints, measurement=problem.measurement)


def naive_rows(problem: problems.Problem, dataset: Any) -> list[naive.Rows]:
    return [
        naive.rows(problem.make(), weights.state, dataset, problem.outcome)
        for weights in problem.checkpoints
    ]


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    """Sums in one order, draws from one seed: a failure repeats."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _no_flushing() -> Iterator[None]:
    """Flushing to the disk guards against power cuts only, and is most of a small test's time."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda descriptor: None)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    """A real S3 server on this machine, one for all tests of a process."""
    pytest.importorskip("moto")
    from object_storage import Server

    server = Server()
    yield server
    server.kill()


_prefixes = count()


@pytest.fixture
def url(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place there that is this test's own; credentials as users give them."""
    from tda.store import kept

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TDA_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(kept, "_unscanned", float("inf"))
    return f"s3://bucket/runs/{next(_prefixes)}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a query set; copied by those who damage or grow it."""
    store = stored.build(tmp_path_factory.mktemp("sound") / "run")
    stored.fill(store.plan("queries/q", stored.examples(3), stored.H))
    return store.path


@pytest.fixture(scope="session")
def task_of() -> Callable[[problems.Problem], Task]:
    """The engine's task for a problem."""
    return make_task


@pytest.fixture(scope="session")
def index_exactly(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Index a task without projection, in float32 rows, in a folder of its own."""

    def index(task: Task, dataset: Any, path: Path | None = None, **options: Any) -> Run:
        given = {"projection": "identity", "dtype": "float32", "progress": False, **options}
        return tda.index(task, dataset, path or tmp_path_factory.mktemp("run") / "run", **given)

    return index


@pytest.fixture(scope="session")
def indexed(index_exactly: Callable[..., Run]) -> Callable[[str], Indexed]:
    """A problem by name, indexed and worked out once in the whole session."""

    @cache
    def get(name: str) -> Indexed:
        problem = problems.problem(name)
        return Indexed(
            problem=problem,
            run=index_exactly(make_task(problem), problem.train, batch_size=4),
            train=naive_rows(problem, problem.train),
            queries=naive_rows(problem, problem.queries),
        )

    return get


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, headless. Whoever asks for it (`-m browser`) fails without it, and never skips."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert chromium, "no Chromium: make browser installs it, or set CHROMIUM=/path/to/it"
    # No traffic of its own, and no sandbox within a container's root.
    quiet = ["no-sandbox", "disable-gpu", "disable-quic", "disable-background-networking",
             "disable-component-update", "disable-sync", "no-first-run"]  # fmt: skip
    with sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=chromium, args=[f"--{name}" for name in quiet]
        )
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails its test when a script fails or the policy is broken."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on(
        "console",
        lambda message: (
            wrong.append(message.text)
            if message.type == "error" and "responded with a status of" not in message.text
            else None
        ),
    )
    yield page
    context.close()
    assert wrong == []
