"""Asked to stop by SIGTERM, as SLURM and Kubernetes do before they take a machine away: finish the
piece at hand, leave within half a minute, and be told apart from an error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GRACE = 22.0  # seconds for the piece at hand; SLURM and Kubernetes kill after 30


class PreemptedError(KeyboardInterrupt):
    """SIGTERM came. Like Ctrl-C, it is no error that code may catch by the way."""


class _Signal:
    def __init__(self) -> None:
        self.asked = False
        self.busy = 0  # pieces in progress, which may end first


_SIGNAL = _Signal()


def is_asked() -> bool:
    """Whether to begin no further piece."""
    return _SIGNAL.asked


def check() -> None:
    """Between two pieces. Raises PreemptedError if SIGTERM came."""
    if _SIGNAL.asked:
        raise PreemptedError


@contextmanager
def a_piece() -> Iterator[None]:
    """What is done inside may end before SIGTERM is heeded, if it ends within the grace."""
    _SIGNAL.busy += 1
    try:
        yield
    finally:
        _SIGNAL.busy -= 1


@contextmanager
def on_sigterm() -> Iterator[None]:
    """Heed SIGTERM inside; only a main thread can, elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*about: Any) -> None:
        raise PreemptedError

    def heed(*about: Any) -> None:
        if not _SIGNAL.busy:
            raise PreemptedError
        _SIGNAL.asked = True
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    before = signal.signal(signal.SIGTERM, heed), signal.getsignal(signal.SIGALRM)
    try:
        yield
    finally:
        if _SIGNAL.asked:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])
        _SIGNAL.asked = False
