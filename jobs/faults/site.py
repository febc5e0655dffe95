"""A run that is struck while it is made, and what became of it: the machinery of all campaigns.

Processes are forked from one that has everything imported, so that hundreds of real ``kill -9`` are
a matter of minutes. After each series of strikes the store is compared, byte by byte, with one
that was never disturbed, and the log tells how many chunks were computed more than once.
"""

from __future__ import annotations

import faulthandler
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from sklearn.datasets import load_digits

import tda
from tda.errors import TdaError
from tda.featurizer import Featurizer

NUM_ROWS, CHUNK = 96, 8
NUM_CHUNKS = 2 * NUM_ROWS // CHUNK  # of two checkpoints
OPTIONS: dict[str, Any] = {
    "proj_dim": 64,
    "batch_size": CHUNK,
    "chunk_rows": CHUNK,
    "progress": False,
}
PAUSE = 0.015  # seconds a chunk takes at least
PATIENCE = 60  # seconds after which a process hangs
FAILED, REFUSED, LEFT = 3, 4, 5  # exit codes

Look = Callable[[str], dict[str, bytes]]
"""Every file of a run whose name begins so."""


def _task() -> tda.Task:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    second = {name: value * 1.5 for name, value in first.items()}
    return tda.Task(model, [first, second])


@cache
def _data() -> tuple[Any, Any]:
    images, labels = load_digits(return_X_y=True)
    return (images[:NUM_ROWS] / 16).astype("f4"), labels[:NUM_ROWS]


@cache
def _warm() -> None:
    """Everything imported that a process will want, so that those forked need not."""
    with tempfile.TemporaryDirectory() as folder:
        tda.index(_task(), _data(), Path(folder) / "run", **OPTIONS)


@dataclass
class Site:
    """A run that is being made, and in ``folder`` a log of the chunks computed for it.

    run: where it lies, ``look``: what is there. environment: of the processes.
    """

    folder: Path
    run: str | Path
    look: Look
    environment: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def at(folder: Path) -> Site:
        folder.mkdir(parents=True)
        run = folder / "run"

        def look(prefix: str) -> dict[str, bytes]:
            files = (file for file in sorted(run.rglob("*")) if file.is_file())
            named = {file.relative_to(run).as_posix(): file for file in files}
            return {n: f.read_bytes() for n, f in named.items() if n.startswith(prefix)}

        return Site(folder, run, look)

    def start(self, pause: float = PAUSE, before: Callable[[], None] | None = None) -> int:
        """`tda.index` in a process of its own, in a session of its own; its pid."""
        _warm()
        pid = os.fork()
        if pid == 0:
            os._exit(self._work(pause, before))
        return pid

    def _work(self, pause: float, before: Callable[[], None] | None) -> int:
        os.setsid()
        os.environ.update(self.environment)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(self.folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        faulthandler.register(signal.SIGUSR2)
        featurize, log = (
            Featurizer.start,
            os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        )

        def logged(that: Featurizer, batch: Any, num_examples: int, train: bool = False) -> Any:
            os.write(log, f"{os.getpid()}\n".encode())
            time.sleep(pause)
            return featurize(that, batch, num_examples, train)

        Featurizer.start = logged  # type: ignore[method-assign, assignment]
        try:
            if before is not None:
                before()
            tda.index(_task(), _data(), self.run, **OPTIONS)
        except TdaError as error:
            os.write(2, f"{error}\n".encode())
            return REFUSED if "another process" in error.what else FAILED
        except KeyboardInterrupt:
            return LEFT
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            return FAILED
        return 0

    def wait(self, pid: int) -> int:
        """How a process ended: its exit code, or minus the signal that ended it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGUSR2)  # says where
        time.sleep(1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise TimeoutError(f"a process hung for {PATIENCE} s\n{self.errors()}")

    def finish(self) -> dict[str, bytes]:
        """The same command, undisturbed: the bytes of every file it leaves, but the cache's."""
        code = self.wait(self.start(pause=0))
        if code:
            raise RuntimeError(f"the command did not finish: {code}\n{self.errors()}")
        return {name: data for name, data in self.look("").items() if not name.startswith("cache/")}

    def num_computed(self) -> int:
        log = self.folder / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def num_marks(self) -> int:
        return len(self.look("train/done/c"))

    def errors(self) -> str:
        file = self.folder / "errors"
        return file.read_text()[-2000:] if file.exists() else ""

    def at_a_random_moment(self, pid: int, chance: random.Random) -> bool:
        """Wait until some chunk is begun, then a moment longer; False if the process has ended."""
        wanted = self.num_computed() + chance.randrange(0, NUM_CHUNKS // 3)
        deadline = time.monotonic() + PATIENCE
        while self.num_computed() < wanted and time.monotonic() < deadline:
            if _has_ended(pid):
                return False
            time.sleep(0.001)
        time.sleep(chance.random() * 2 * PAUSE)
        return not _has_ended(pid)


def _has_ended(pid: int) -> bool:
    return bool(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))


class Struck(Protocol):
    """What a campaign needs of a site, here or with a cluster's processes."""

    folder: Path

    def finish(self) -> dict[str, Any]: ...
    def num_computed(self) -> int: ...
    def num_marks(self) -> int: ...


@dataclass
class Tally:
    """What became of the strikes of one kind."""

    kind: str
    times: int = 0
    rows_lost: int = 0
    rows_altered: int = 0
    recomputed: int = 0
    most_recomputed: int = 0  # by one strike
    why_not: str = ""


Kind = Callable[[Any, random.Random], int]
"""A kind of fault: strikes a site, and tells how many times."""


@dataclass(frozen=True)
class Campaign:
    """Kinds of fault and how often each, on sites of one sort.

    most: strikes at a run before it may finish; more of them in a row try what a resume resumes.
    """

    kinds: Mapping[Kind, int]
    make: Callable[[Path], Any]
    chunk_rows: int = CHUNK
    num_chunks: int = NUM_CHUNKS
    most: int = 4

    def run(self, folder: Path, share: float = 1.0, seed: int = 0) -> list[Tally]:
        """Every kind, ``share`` of its usual number of strikes."""
        if not self.kinds:
            return []
        torch.set_num_threads(1)
        whole = self.make(folder / "whole").finish()
        found = []
        for kind, usual in self.kinds.items():
            tally = Tally((kind.__doc__ or kind.__name__).strip())
            try:
                wanted = max(1, round(share * usual))
                for attempt in range(4 * wanted):
                    if tally.times >= wanted:
                        break
                    name = f"{kind.__name__}-{attempt}"
                    chance = random.Random(f"{seed}/{name}")
                    site = self.make(folder / name)
                    self._strike(site, kind, chance, tally, whole)
                    shutil.rmtree(site.folder)
            except OSError as error:
                tally.why_not = str(error)
            found.append(tally)
        return found

    def _strike(
        self, site: Struck, kind: Kind, chance: random.Random, tally: Tally, whole: dict[str, Any]
    ) -> None:
        """One run struck once or more before it may finish."""
        for _ in range(chance.randint(1, self.most)):
            marks, computed = site.num_marks(), site.num_computed()
            tally.times += kind(site, chance)
            # What was computed since, less what was finished since, was computed in vain.
            vain = site.num_computed() - computed - (site.num_marks() - marks)
            tally.most_recomputed = max(tally.most_recomputed, vain)
        finished = site.finish()
        tally.recomputed += site.num_computed() - self.num_chunks
        rows = {name for name in whole if "/rows/" in name and not name.endswith("json")}
        altered = [name for name in rows & finished.keys() if finished[name] != whole[name]]
        tally.rows_lost += self.chunk_rows * len(rows - finished.keys())
        tally.rows_altered += self.chunk_rows * len(altered)
        names = (whole.keys() | finished.keys()) - rows
        others = sorted(name for name in names if whole.get(name) != finished.get(name))
        if others:
            raise AssertionError(f"{tally.kind}: other files differ: {others[:5]}")
