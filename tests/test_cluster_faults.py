"""Whatever is killed, hangs or is asked to leave: the same command finishes, the store is the same.

For a campaign (jobs/): `Site(folder)` writes a small workload there; its methods work on processes
of the real command line, and any of them may be repeated at random moments.

    site = Site(folder)
    whole = Site(other).finish()               # an undisturbed run: {file: digest}
    process = site.start("--workers", "2")     # tda index, each chunk taking `site.pause` seconds
    site.wait_for_marks(3)                     # so many chunks are finished
    site.strike(process, "worker", SIGKILL)    # or "client"; SIGKILL, SIGSTOP, SIGTERM, SIGINT
    process.wait()
    assert site.finish() == whole              # the same command again, undisturbed
    site.num_computed()                        # chunks computed so far, all starts together

With a scheduler and workers of their own (`dask scheduler`, `dask worker`) the same commands take
``--scheduler FILE``: `Site.start_scheduler()` gives the processes, any of which may be killed.
A file ``hungry`` in the folder makes workers need more memory than they may have; ``hungry-once``
makes one of them, which takes the file away.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import problems
import psutil
import pytest
import torch

import tda
from tda.cluster import Cluster, pool
from tda.cluster.pool import Workers
from tda.errors import GradientError
from tda.featurizer import Featurizer

CHUNK_ROWS, NUM_ROWS = 8, 96
NUM_CHUNKS = NUM_ROWS // CHUNK_ROWS

JOB = f"""
import os, time
import torch, tda
from sklearn.datasets import load_digits
from tda.cluster import pool
from tda.featurizer import Featurizer

pool.LEAST_PATIENCE = 2.0
torch.set_num_threads(1)
featurize = Featurizer.start

def logged(self, batch, num_examples, train=False):
    with open("log", "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    time.sleep(float(os.environ["PAUSE"]))
    try:
        os.remove("hungry-once")
        hungry = True
    except FileNotFoundError:
        hungry = os.path.exists("hungry")
    if hungry:
        held = torch.ones(int(os.environ["HUNGER"]) // 4)
        time.sleep(60)
    return featurize(self, batch, num_examples, train)

Featurizer.start = logged

def task():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    return tda.Task(model)

def train():
    images, labels = load_digits(return_X_y=True)
    return (images[:{NUM_ROWS}] / 16).astype("float32"), labels[:{NUM_ROWS}]
"""
CONFIG = f"""
[run]
path = "run"
[workload]
task = "job.py:task"
train = "job.py:train"
[projection]
dim = 32
[index]
chunk_rows = {CHUNK_ROWS}
batch_size = {CHUNK_ROWS}
"""


class Site:
    """A folder with a workload, and processes of the command line that work on it."""

    def __init__(self, folder: Path, pause: float = 0.1) -> None:
        self.folder, self.pause = folder, pause
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.py").write_text(JOB)
        (folder / "job.toml").write_text(CONFIG)

    def start(self, *options: str, pause: float | None = None) -> subprocess.Popen:
        """`tda index` with these options, in a session of its own."""
        return self._spawn(
            [sys.executable, "-m", "tda.cli", "index", "job.toml", *options],
            PAUSE=str(self.pause if pause is None else pause),
        )

    def start_scheduler(self, num_workers: int = 2, memory: int = 0) -> list[subprocess.Popen]:
        """`dask scheduler` and workers of `memory` bytes each; they share ``scheduler.json``.

        A piece that ends a worker's process is given to two more workers.
        """
        dask = [sys.executable, "-m", "dask"]
        there = ["--scheduler-file", "scheduler.json"]
        host = ["--host", "127.0.0.1", "--no-dashboard"]
        (self.folder / "scheduler.json").unlink(missing_ok=True)
        scheduler = self._spawn(
            [*dask, "scheduler", *there, *host, "--port", "0"],
            PAUSE="0",
            DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="2",
        )
        worker = [*dask, "worker", *there, *host, "--nthreads", "1", "--memory-limit", str(memory)]
        about = {"PAUSE": str(self.pause), "HUNGER": str(memory)}
        servers = [scheduler, *(self._spawn(worker, **about) for _ in range(num_workers))]
        while not (self.folder / "scheduler.json").exists() and scheduler.poll() is None:
            time.sleep(0.01)
        return servers

    def _spawn(self, command: list[str], **environment: str) -> subprocess.Popen:
        root = str(Path(tda.__file__).parents[1])
        inherited = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        with (self.folder / "errors").open("a") as errors:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env={**inherited, **environment},
                stderr=errors,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def finish(self, *options: str) -> dict[str, str]:
        """The same command, undisturbed: the digests of all files it leaves."""
        process = self.start(*options, pause=0)
        assert process.wait(180) == 0, (self.folder / "errors").read_text()
        run = self.folder / "run"
        return {
            str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(run.rglob("*"))
            if file.is_file() and "cache" not in file.relative_to(run).parts
        }

    def wait_for_marks(self, count: int, process: subprocess.Popen | None = None) -> None:
        """Until so many chunks are finished, or the process has ended."""
        deadline = time.monotonic() + 120
        while self.num_marks() < count and time.monotonic() < deadline:
            if process is not None and process.poll() is not None:
                return
            time.sleep(0.005)

    def num_computed(self) -> int:
        """Chunks computed by all that was started, finished or not."""
        log = self.folder / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def num_marks(self) -> int:
        """Chunks that are finished."""
        return len(list((self.folder / "run/train/done").glob("c*.json")))

    def errors(self) -> str:
        """What all processes have said."""
        return (self.folder / "errors").read_text()

    def strike(self, process: subprocess.Popen, whom: str, number: int) -> int:
        """Send a signal to the client or to one of its workers that has begun a chunk; its pid."""
        pid = process.pid
        if whom == "worker":
            children = {p.pid for p in psutil.Process(pid).children(recursive=True)}
            seen = [int(line) for line in (self.folder / "log").read_text().split()]
            pid = next(one for one in reversed(seen) if one in children)
        os.kill(pid, number)
        return pid


def stop(servers: list[subprocess.Popen]) -> None:
    for server in servers:
        server.terminate()
    for server in servers:
        server.wait(60)


# With two processes that are there already.


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Cluster(workers=2).started() as started:
        yield started


class Logged:
    """Cross-entropy that writes down who took it, and how many times."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Striking(problems.Listed):
    """A data set that sends a signal to the first worker that reads an example."""

    def __init__(self, folder: Path, number: int, at: int = 21) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.rand(40, 6, generator=generator)
        super().__init__([(x, torch.tensor(i % 3)) for i, x in enumerate(inputs)])
        self.client, self.at, self.number, self.flag = os.getpid(), at, number, folder / "struck"

    def __getitem__(self, i: int) -> Any:
        if i == self.at and os.getpid() != self.client:
            try:
                self.flag.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), self.number)
        return super().__getitem__(i)


def files(path: Path) -> dict[str, bytes]:
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("cache/")}


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGSTOP, id="hangs", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_is_lost_loses_one_chunk(workers, tmp_path, monkeypatch, number) -> None:
    """Killed, its chunk comes back; hanging, its chunk goes to another when the time is up."""
    monkeypatch.setattr(pool, "LEAST_PATIENCE", 1.0)
    data, log = Striking(tmp_path, number), tmp_path / "log"
    task = tda.Task(torch.nn.Linear(6, 3), measurement=Logged(log))
    given: dict[str, Any] = {"projection": "identity", "chunk_rows": 4, "batch_size": 4}
    alone = tda.index(task, data, tmp_path / "alone", progress=False, **given)
    with workers.taking_work():
        together = tda.index(task, data, tmp_path / "together", progress=False, **given)
    assert (tmp_path / "struck").exists()
    assert files(together.path) == files(alone.path)
    there = [pid for pid in log.read_text().split() if pid != str(os.getpid())]
    a_batch = 2  # a measurement is called for the output and for the link
    assert 10 * a_batch <= len(there) <= 11 * a_batch, "more than the lost chunk was done again"


# Without any.


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """A device that has memory for so many examples; the sizes of the batches it was given."""

    def limit(most: int) -> list[int]:
        sizes: list[int] = []
        featurize = Featurizer.start

        def limited(self: Any, batch: Any, num_examples: int, train: bool = False) -> Any:
            sizes.append(num_examples)
            if num_examples > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return featurize(self, batch, num_examples, train)

        monkeypatch.setattr(Featurizer, "start", limited)
        return sizes

    return limit


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(tmp_path, scarce, caplog) -> None:
    task = tda.Task(problems.problem("digits_mlp").make())
    data, given = problems.problem("digits_mlp").train, {"projection": "identity"}
    whole = tda.index(task, data, tmp_path / "whole", progress=False, batch_size=8, **given)
    sizes = scarce(3)
    with caplog.at_level(logging.WARNING):
        halved = tda.index(task, data, tmp_path / "halved", progress=False, batch_size=8, **given)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert "batches of 2" in caplog.text
    one, other = (run.store.table("train").rows(0, 0, 10).numpy() for run in (whole, halved))
    np.testing.assert_allclose(other, one, rtol=1e-2)  # the same but for the rounding of bfloat16
    assert files(halved.path) == files(whole.path)


def test_one_example_that_does_not_fit_is_named(tmp_path, scarce) -> None:
    scarce(0)
    task = tda.Task(problems.problem("digits_mlp").make())
    with pytest.raises(GradientError, match="no memory for the gradient of one example"):
        tda.index(task, problems.problem("digits_mlp").train, tmp_path / "run", progress=False)


def test_at_sigterm_the_chunk_at_hand_is_finished(tmp_path) -> None:
    site = Site(tmp_path / "site", pause=0.3)
    process = site.start()
    site.wait_for_marks(2, process)
    began = time.monotonic()
    site.strike(process, "client", signal.SIGTERM)
    assert process.wait(60) == 75
    assert time.monotonic() - began < 30
    assert "asked to stop (SIGTERM)" in (site.folder / "errors").read_text()
    marks = len(list((site.folder / "run/train/done").glob("c*.json")))
    assert marks == site.num_computed() < NUM_CHUNKS, "a chunk was begun and not finished"
    assert len(site.finish()) > 0
    assert site.num_computed() == NUM_CHUNKS


# On the command line, with processes of its own.


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return Site(tmp_path_factory.mktemp("undisturbed")).finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number", "code"),
    [
        ("client", signal.SIGKILL, -signal.SIGKILL),
        ("client", signal.SIGTERM, 75),
        ("client", signal.SIGINT, 130),
        ("worker", signal.SIGKILL, 0),
        ("worker", signal.SIGSTOP, 0),
        ("worker", signal.SIGTERM, 0),
    ],
)
def test_the_command_line_survives(tmp_path, undisturbed, whom, number, code) -> None:
    site = Site(tmp_path / "site")
    process = site.start("--workers", "2")
    site.wait_for_marks(3, process)
    children = psutil.Process(process.pid).children(recursive=True)
    site.strike(process, whom, number)
    began = time.monotonic()
    assert process.wait(120) == code, (site.folder / "errors").read_text()
    if whom == "client":
        assert time.monotonic() - began < 30
    _, alive = psutil.wait_procs(children, 20)
    assert not alive, "workers outlive their client"
    assert site.finish("--workers", "2") == undisturbed
    assert site.num_computed() <= NUM_CHUNKS + 2
    text = (site.folder / "errors").read_text()
    assert "Traceback" not in text, text


@pytest.mark.slow
@pytest.mark.parametrize("which", ["scheduler", "worker"])
def test_a_scheduler_of_its_own_may_be_killed(tmp_path, undisturbed, which) -> None:
    site = Site(tmp_path / "site", pause=0.3)
    servers = site.start_scheduler()
    try:
        client = site.start("--scheduler", "scheduler.json")
        site.wait_for_marks(2, client)
        servers[0 if which == "scheduler" else 1].kill()
        code = client.wait(120)
    finally:
        stop(servers)
    assert code == (1 if which == "scheduler" else 0), (site.folder / "errors").read_text()
    if which == "scheduler":
        assert "the scheduler is gone" in (site.folder / "errors").read_text()
    assert site.finish() == undisturbed
    assert site.num_computed() <= NUM_CHUNKS + 3


MEMORY = 1536 * 2**20  # of a worker: it holds PyTorch, and no more than that again


@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
def test_a_worker_over_its_memory_is_ended_and_the_work_goes_on_or_says_why(
    tmp_path, undisturbed, always
) -> None:
    site = Site(tmp_path / "site")
    (site.folder / ("hungry" if always else "hungry-once")).touch()
    servers = site.start_scheduler(memory=MEMORY)
    try:
        code = site.start("--scheduler", "scheduler.json").wait(180)
    finally:
        stop(servers)
    assert code == int(always), site.errors()
    assert "memory" in site.errors()  # of Dask, who has ended it
    if always:
        assert "a piece of work ended the process of every worker that took it" in site.errors()
        assert "3 workers were lost at it" in site.errors()
        (site.folder / "hungry").unlink()
    assert site.finish() == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_it_loses_a_chunk_a_worker_at_most(tmp_path, undisturbed, seed) -> None:
    chance, site = random.Random(seed), Site(tmp_path / "site")
    kills = 0
    for marks in sorted(chance.sample(range(1, NUM_CHUNKS - 2), 3)):
        process = site.start("--workers", "2")
        site.wait_for_marks(max(marks, site.num_marks() + 1), process)  # this one's workers work
        time.sleep(chance.random() * 0.1)
        if process.poll() is None:
            site.strike(process, chance.choice(["client", "worker"]), signal.SIGKILL)
            kills += 1
        process.wait(120)
    assert site.finish("--workers", "2") == undisturbed
    assert site.num_computed() <= NUM_CHUNKS + 2 * kills
