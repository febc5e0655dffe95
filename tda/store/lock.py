"""One process at a time writes a run."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tda.errors import StoreError

try:
    import fcntl
except ImportError:  # no POSIX: nothing keeps two writers apart
    fcntl = None  # type: ignore[assignment]

_NAME = Path("cache") / "writer"


@contextmanager
def sole_writer(run: Path) -> Iterator[None]:
    """Hold the run's writer lock; the system lets go of it when the process ends, however it ends.

    Raises StoreError naming the process that holds it. Where nothing can be written there is
    nothing to keep apart, and the first write says so.
    """
    try:
        (run / _NAME).parent.mkdir(parents=True, exist_ok=True)
        file = (run / _NAME).open("a+")
    except OSError:
        yield
        return
    with file:
        if fcntl is not None:
            _lock(file, run)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(file: IO[str], run: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise StoreError(
            "another process is writing this run",
            where=run,
            found=file.read() or "a process that has just begun",
            do="wait until it is done, then run the same command: it resumes",
        ) from None
