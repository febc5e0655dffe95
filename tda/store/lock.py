"""One process at a time writes a run.

On this machine the system knows who holds a lock and lets go of it when the process ends, however
it ends. Where it does not reach – object storage, file systems shared by several machines – the
lock is a lease: its holder counts up a number in it every few seconds, and a lease whose number has
stood still for `LEASE` seconds *by the clock of whoever waits* is taken over. Clocks are never
compared, so a wrong one steals nothing. Readers need no lock.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tda.errors import StoreError, UnreachableError
from tda.store import remote
from tda.store.files import Place, Remote, require_plain

try:
    import fcntl
except ImportError:  # no POSIX: nothing keeps two writers apart
    fcntl = None  # type: ignore[assignment]

BEAT = 10.0  # seconds between two counts of a holder
LEASE = 60.0  # seconds without one after which it is taken for dead
_POLL = 1.0
_NAME = "cache/writer"
_LENGTH = 1024  # bytes of a file that holds a holder
_ours: set[str] = set()  # tokens of the locks that this process holds or asks for
_waits: ContextVar[bool] = ContextVar("waits", default=False)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who holds the lock. ``machine``: where a process number means the same process."""

    process: int
    host: str
    since: str
    machine: str
    born: str
    beat: int = 0
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @staticmethod
    def me() -> Holder:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return Holder(os.getpid(), socket.gethostname(), since, _machine(), _born(os.getpid()))

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def parse(data: bytes) -> Holder | None:
        try:
            return Holder(**json.loads(data))
        except (ValueError, TypeError):
            return None  # not written to the end, or by another version

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    @property
    def alive(self) -> bool | None:
        """None where it cannot be known: another machine."""
        if self.machine != _machine():
            return None
        if self.process == os.getpid() and self.token not in _ours:
            return False  # we gave it up, and storage that was away could not be told
        return _born(self.process) == self.born


def _machine() -> str:
    """Changes, where the system tells, with the boot and the namespace of process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(process: int) -> str:
    """When a process began, in ticks since the boot; "no" if it has ended, "yes" if unknown."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return "no"
    except OSError:
        pass
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "yes"


class _Held(NamedTuple):
    """By whom, as was read; alive: None where only time tells."""

    data: bytes
    alive: bool | None


@contextmanager
def waiting() -> Iterator[None]:
    """Within, who finds a run being written waits instead of being refused."""
    before = _waits.set(True)
    try:
        yield
    finally:
        _waits.reset(before)


@contextmanager
def sole_writer(run: Place) -> Iterator[None]:
    """Hold the run's writer lock. Raises StoreError naming who holds it (but see `waiting`).

    Where nothing can be written there is nothing to keep apart, and the first write says so.
    """
    require_plain(run)
    me = Holder.me()
    lock: _Lease | _File
    if isinstance(run, Remote):
        lock = _Lease(run / _NAME, me)
    else:
        try:
            (run / _NAME).parent.mkdir(parents=True, exist_ok=True)
            file = os.open(run / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            yield
            return
        lock = _File(file, me)
    _ours.add(me.token)
    try:
        _take(lock, run)
        over = threading.Event()
        beating = threading.Thread(target=_beat, args=(lock, over), daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            lock.release()
    finally:
        _ours.discard(me.token)
        lock.close()


def _take(lock: _Lease | _File, run: Place) -> None:
    seen, since, told, wait = b"", 0.0, False, _waits.get()
    while (held := lock.take()) is not None:
        now = time.monotonic()
        moved = bool(seen) and held.data != seen
        if held.data != seen:
            seen, since = held.data, now
        elif held.alive is None and now - since >= LEASE and lock.seize(held.data):
            return
        holder = Holder.parse(held.data)
        if (held.alive or moved) and not wait:
            raise StoreError(
                "another process is writing this run",
                where=run,
                found=holder or "a process that has just begun",
                do="wait until it is done (`--wait` does), then run the same command: it resumes",
            )
        if not told:
            doing = "waiting for" if wait else "looking whether it is alive:"
            print(f"{run} is being written; {doing} {holder or 'its writer'}", file=sys.stderr)
            told = True
        time.sleep(_POLL)


def _beat(lock: _Lease | _File, over: threading.Event) -> None:
    while not over.wait(BEAT):
        if not lock.beat():
            log.warning("another process has taken the writer's lock over; what both write is one")
            return


class _File:
    """A file of this machine, or one that others see too: then it is a lease as well."""

    def __init__(self, file: int, me: Holder) -> None:
        self._file, self._me = file, me

    def take(self) -> _Held | None:
        """None if it is ours now."""
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _Held(self._read(), True)
            except OSError:
                pass  # no locks on this file system: the lease alone decides
        data = self._read()
        holder = Holder.parse(data)
        if holder is not None and holder.alive is None:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_UN)
            return _Held(data, None)
        self._write(self._me.to_bytes())  # what is there is of a process that has died
        return None

    def seize(self, seen: bytes) -> bool:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._read() != seen:
            return False
        self._write(self._me.to_bytes())
        return True

    def beat(self) -> bool:
        holder = Holder.parse(self._read())
        if holder is not None and holder.token != self._me.token:
            return False
        self._me = replace(self._me, beat=self._me.beat + 1)
        self._write(self._me.to_bytes())
        return True

    def release(self) -> None:
        holder = Holder.parse(self._read())
        if holder is None or holder.token == self._me.token:
            with suppress(OSError):
                os.ftruncate(self._file, 0)

    def close(self) -> None:
        os.close(self._file)

    def _read(self) -> bytes:
        return os.pread(self._file, _LENGTH, 0).strip()

    def _write(self, data: bytes) -> None:
        """In one piece and over what is there: whoever looks meanwhile never finds it empty."""
        with suppress(OSError):  # a full disk: the system's lock holds without the name
            os.pwrite(self._file, data.ljust(_LENGTH), 0)


class _Lease:
    """An object that is created, and from then on replaced only where it is as it was last seen."""

    def __init__(self, place: Remote, me: Holder) -> None:
        self._place, self._me = place, me
        self._stamp: object = None

    def take(self) -> _Held | None:
        if self._put("create"):
            return None
        found = remote.get(self._place)
        if found is None:
            return self.take()
        data, stamp = bytes(found[0]), found[1].stamp
        holder = Holder.parse(data)
        alive = None if holder is None else holder.alive
        if holder is not None and holder.token == self._me.token:
            self._stamp = stamp  # an answer was lost
            return None
        if alive is False and self._put(stamp):
            return None
        return _Held(data, alive or None)

    def seize(self, seen: bytes) -> bool:
        found = remote.get(self._place)
        return found is not None and bytes(found[0]) == seen and self._put(found[1].stamp)

    def beat(self) -> bool:
        self._me = replace(self._me, beat=self._me.beat + 1)
        try:
            if self._put(self._stamp):
                return True
            found = remote.get(self._place)
        except UnreachableError:
            return True  # no network: work stops or goes on by itself
        holder = None if found is None else Holder.parse(bytes(found[0]))
        if found is None or holder is None or holder.token != self._me.token:
            return False
        self._stamp = found[1].stamp
        return True

    def release(self) -> None:
        with suppress(UnreachableError):
            found = remote.get(self._place)
            holder = None if found is None else Holder.parse(bytes(found[0]))
            if holder is not None and holder.token == self._me.token:
                remote.remove(self._place)

    def close(self) -> None:
        """Nothing is held open."""

    def _put(self, mode: object) -> bool:
        stat = remote.put(self._place, self._me.to_bytes(), mode)
        if stat is None:
            return False
        self._stamp = stat.stamp
        return True
