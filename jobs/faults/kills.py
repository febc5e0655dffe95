"""A process that indexes is struck at a random moment; the same command then finishes its work.

Processes are forked from one that has everything imported, so that hundreds of real ``kill -9`` are
a matter of minutes. After each series of strikes the store is compared, byte by byte, with one
that was never disturbed, and the log tells how many chunks were computed more than once.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

import tda
from tda.errors import TdaError
from tda.featurizer import Featurizer

NUM_ROWS, CHUNK = 96, 8
NUM_CHUNKS = 2 * NUM_ROWS // CHUNK  # of two checkpoints
PAUSE = 0.015  # seconds a chunk takes at least
PATIENCE = 60  # seconds after which a process hangs
FAILED, REFUSED, LEFT = 3, 4, 5  # exit codes


def _task() -> tda.Task:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    second = {name: value * 1.5 for name, value in first.items()}
    return tda.Task(model, [first, second])


@dataclass
class Site:
    """A folder with a run that is being made, and a log of the chunks computed for it."""

    folder: Path
    data: tuple[Any, Any]
    pids: list[int] = field(default_factory=list)

    @staticmethod
    def at(folder: Path) -> Site:
        folder.mkdir(parents=True)
        images, labels = load_digits(return_X_y=True)
        return Site(folder, ((images[:NUM_ROWS] / 16).astype("f4"), labels[:NUM_ROWS]))

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, pause: float = PAUSE, before: Callable[[], None] | None = None) -> int:
        """`tda.index` in a process of its own, in a session of its own; its pid."""
        pid = os.fork()
        if pid == 0:
            os._exit(self._work(pause, before))
        self.pids.append(pid)
        return pid

    def _work(self, pause: float, before: Callable[[], None] | None) -> int:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(self.folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        featurize, log = (
            Featurizer.__call__,
            os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        )

        def logged(that: Featurizer, batch: Any, num_examples: int, train: bool = False) -> Any:
            os.write(log, f"{os.getpid()}\n".encode())
            time.sleep(pause)
            return featurize(that, batch, num_examples, train)

        Featurizer.__call__ = logged  # type: ignore[method-assign, assignment]
        try:
            if before is not None:
                before()
            options: dict[str, Any] = {"proj_dim": 64, "batch_size": CHUNK, "chunk_rows": CHUNK}
            tda.index(_task(), self.data, self.run, progress=False, **options)
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
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise TimeoutError(f"a process hung for {PATIENCE} s")

    def finish(self) -> dict[str, bytes]:
        """The same command, undisturbed: the bytes of every file it leaves, but the cache's."""
        code = self.wait(self.start(pause=0))
        if code:
            raise RuntimeError(f"the command did not finish: {code}\n{self.errors()}")
        files = (file for file in sorted(self.run.rglob("*")) if file.is_file())
        named = {file.relative_to(self.run).as_posix(): file for file in files}
        return {n: f.read_bytes() for n, f in named.items() if not n.startswith("cache/")}

    def num_computed(self) -> int:
        log = self.folder / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def num_marks(self) -> int:
        return len(list(self.run.glob("train/done/c*.json")))

    def errors(self) -> str:
        file = self.folder / "errors"
        return file.read_text()[-2000:] if file.exists() else ""

    def at_a_random_moment(self, pid: int, chance: random.Random) -> bool:
        """Wait until some chunk is begun, then a moment longer; False if the process has ended."""
        wanted = self.num_computed() + chance.randrange(0, NUM_CHUNKS // 3)
        deadline = time.monotonic() + PATIENCE
        while self.num_computed() < wanted and time.monotonic() < deadline:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.001)
        time.sleep(chance.random() * 2 * PAUSE)
        return not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


# ---- kinds of fault; each returns how many times a process was struck


def killed(site: Site, chance: random.Random) -> int:
    """kill -9 of the client"""
    pid = site.start()
    struck = site.at_a_random_moment(pid, chance)
    if struck:
        os.kill(pid, signal.SIGKILL)
    site.wait(pid)
    return int(struck)


def preempted(site: Site, chance: random.Random) -> int:
    """SIGTERM (a job is preempted)"""
    pid = site.start(before=_heed_sigterm)
    struck = site.at_a_random_moment(pid, chance)
    if struck:
        os.kill(pid, signal.SIGTERM)
        started = time.monotonic()
        code = site.wait(pid)
        assert time.monotonic() - started < 30, "it did not leave within 30 seconds"
        assert code in (0, LEFT, -signal.SIGTERM), f"left with {code}: {site.errors()}"
    else:
        site.wait(pid)
    return int(struck)


def _heed_sigterm() -> None:
    from tda.cluster.leaving import on_sigterm

    on_sigterm().__enter__()


def starved(site: Site, chance: random.Random) -> int:
    """out of memory"""
    after = chance.randrange(1, NUM_CHUNKS // 2)

    def limit() -> None:
        featurize, calls = Featurizer.__call__, [0]

        def hungry(that: Featurizer, *given: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == after:
                held = int(Path("/proc/self/statm").read_text().split()[0])
                room = held * resource.getpagesize() + 2**20
                resource.setrlimit(resource.RLIMIT_AS, (room, room))
                torch.empty(2**28).fill_(1)
            return featurize(that, *given, **more)

        Featurizer.__call__ = hungry  # type: ignore[method-assign, assignment]

    return int(site.wait(site.start(before=limit)) != 0)


def hung(site: Site, chance: random.Random) -> int:
    """a client that hangs (SIGSTOP); a second is refused while it holds the run; then kill -9"""
    pid = site.start()
    struck = site.at_a_random_moment(pid, chance)
    if struck:
        os.kill(pid, signal.SIGSTOP)
        if site.run.exists() and site.num_marks():
            code = site.wait(site.start(pause=0))
            os.kill(pid, signal.SIGKILL)
            # 0: it was stopped on its way to the run, before it held it
            assert code in (0, REFUSED), (code, site.errors())
        else:
            os.kill(pid, signal.SIGKILL)
    site.wait(pid)
    return int(struck)


def two_at_once(site: Site, chance: random.Random) -> int:
    """two jobs index the same store at once; one of them, at random, is killed"""
    both = [site.start(), site.start()]
    struck = site.at_a_random_moment(both[0], chance)
    if struck:
        os.kill(chance.choice(both), signal.SIGKILL)
    codes = [site.wait(pid) for pid in both]
    assert all(code in (0, REFUSED, -signal.SIGKILL) for code in codes), (codes, site.errors())
    return int(struck)


def skewed(site: Site, chance: random.Random) -> int:
    """clock skew: killed, and every file is dated years back or ahead"""
    struck = killed(site, chance)
    for file in site.run.rglob("*"):
        moment = time.time() + chance.choice([-1, 1]) * chance.random() * 10**8
        os.utime(file, (moment, moment))
    return struck


@contextmanager
def on_a_disk(run: Path, size: int) -> Iterator[None]:
    """The run's folder is a small disk of its own inside, and a plain folder again after.

    Raises OSError where this user may not mount one.
    """
    held = run.with_name("held")
    if run.exists():
        run.rename(held)
    else:
        held.mkdir()
    run.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run)]
    if subprocess.run(command, capture_output=True).returncode:
        raise OSError("a disk of its own cannot be mounted: run as root")
    try:
        shutil.copytree(held, run, dirs_exist_ok=True)
        yield
        shutil.rmtree(held)
        shutil.copytree(run, held)
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)
    run.rmdir()
    held.rename(run)


def full_disk(site: Site, chance: random.Random) -> int:
    """the disk is full; then there is room"""
    used = sum(file.stat().st_size + 4096 for file in site.run.rglob("*"))
    with on_a_disk(site.run, used + chance.randrange(300_000, 900_000)):
        code = site.wait(site.start())
        assert code in (0, FAILED), code
        assert code == 0 or "disk is full" in site.errors(), site.errors()
    return int(code == FAILED)


KINDS: dict[Callable[[Site, random.Random], int], int] = {
    killed: 80,
    preempted: 30,
    starved: 20,
    hung: 20,
    two_at_once: 20,
    skewed: 20,
    full_disk: 15,
}


@dataclass
class Tally:
    """What became of the strikes of one kind."""

    kind: str
    times: int = 0
    rows_lost: int = 0
    rows_altered: int = 0
    recomputed: int = 0
    most_recomputed: int = 0  # by one strike, one worker
    why_not: str = ""


def campaign(folder: Path, share: float = 1.0, seed: int = 0) -> list[Tally]:
    """Every kind of fault, ``share`` of its usual number of strikes."""
    torch.set_num_threads(1)
    whole = Site.at(folder / "whole").finish()
    found = []
    for kind, usual in KINDS.items():
        tally = Tally((kind.__doc__ or kind.__name__).strip())
        try:
            wanted = max(1, round(share * usual))
            for attempt in range(4 * wanted):
                if tally.times >= wanted:
                    break
                name = f"{kind.__name__}-{attempt}"
                site = Site.at(folder / name)
                _strike(site, kind, random.Random(f"{seed}/{name}"), tally, whole)
                shutil.rmtree(site.folder)
        except OSError as error:
            tally.why_not = str(error)
        found.append(tally)
    return found


def _strike(
    site: Site, kind: Any, chance: random.Random, tally: Tally, whole: dict[str, bytes]
) -> None:
    """One run struck one to four times before it may finish."""
    times = 0
    for _ in range(chance.randint(1, 4)):
        marks, computed = site.num_marks(), site.num_computed()
        times += kind(site, chance)
        # What was computed since, less what was finished since, was computed in vain.
        vain = site.num_computed() - computed - (site.num_marks() - marks)
        tally.most_recomputed = max(tally.most_recomputed, vain)
    finished = site.finish()
    tally.times += max(times, 1) if times else 0
    tally.recomputed += site.num_computed() - NUM_CHUNKS
    rows = {name for name in whole if "/rows/" in name and not name.endswith("json")}
    tally.rows_lost += CHUNK * len(rows - set(finished))
    tally.rows_altered += CHUNK * sum(finished.get(n) != whole[n] for n in rows & set(finished))
    others = {n for n in whole.keys() | finished.keys() if whole.get(n) != finished.get(n)} - rows
    if others:
        raise AssertionError(f"{tally.kind}: other files differ: {sorted(others)[:5]}")
