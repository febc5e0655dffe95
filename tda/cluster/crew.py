"""What each worker is at, one line a worker: pieces done, throughput, memory, the piece at hand."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

RECENT = 30.0  # seconds a throughput is of
SILENT = 10.0  # seconds without a word that are worth telling


@dataclass
class Standing:
    """Of one worker. rows: of the pieces it has finished; begun: of the one at hand."""

    first: float
    heard: float
    pieces: int = 0
    rows: int = 0
    memory: int = 0  # bytes
    at: int | None = None
    begun: int = 0
    recent: deque[tuple[float, int]] = field(default_factory=deque)

    def note(self, now: float) -> None:
        self.recent.append((now, self.rows + self.begun))
        while len(self.recent) > 2 and now - self.recent[1][0] > RECENT:
            self.recent.popleft()

    def speed(self, now: float) -> float:
        """Rows a second, of late."""
        since, before = self.recent[0] if self.recent else (self.first, 0)
        return max(0, self.rows + self.begun - before) / max(now - since, 1e-9)


class Crew:
    """The workers of one work, as their words and results tell. Heard in one thread, read in any.

    unit: of a piece's size; clock: seconds.
    """

    def __init__(self, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.unit, self._clock = unit, clock
        self._standing: dict[str, Standing] = {}

    def present(self, addresses: Iterable[str]) -> None:
        """Who is there now; who is not any more has left."""
        now, there = self._clock(), set(addresses)
        known = {name: who for name, who in self._standing.items() if name in there}
        for name in sorted(there - known.keys()):
            known[name] = Standing(now, now)
        self._standing = known

    def heard(self, name: str, piece: int, rows: int, memory: int) -> None:
        """A word from a worker: so many rows of this piece so far, so many bytes of memory."""
        now = self._clock()
        who = self._standing.setdefault(name, Standing(now, now))
        who.at, who.begun, who.memory, who.heard = piece, rows, memory, now
        who.note(now)

    def done(self, name: str, piece: int, size: int) -> None:
        """A worker has finished a piece."""
        now = self._clock()
        who = self._standing.setdefault(name, Standing(now, now))
        who.pieces, who.rows, who.heard = who.pieces + 1, who.rows + size, now
        if who.at == piece:
            who.at, who.begun = None, 0
        who.note(now)

    def lines(self, most: int | None = None) -> list[str]:
        """One a worker, at most ``most``: who has been silent longest is never left out."""
        now, all_ = self._clock(), list(self._standing.items())
        shown = all_
        if most is not None and len(all_) > most:
            quiet = sorted(all_, key=lambda item: item[1].heard)[: max(most - 1, 0)]
            names = {name for name, _ in quiet}
            shown = [item for item in all_ if item[0] in names]
        width = max((len(_short(name)) for name, _ in shown), default=0)
        found = [self._line(_short(name).ljust(width), who, now) for name, who in shown]
        rest = len(all_) - len(shown)
        if rest:
            speed = sum(who.speed(now) for _, who in all_)
            found.append(f"{rest} more workers; all together {speed:,.0f} {self.unit}/s".rstrip())
        return found

    def _line(self, name: str, who: Standing, now: float) -> str:
        speed = f"{who.speed(now):,.1f} {self.unit}/s" if self.unit else ""
        at = "waiting" if who.at is None else f"at piece {who.at}"
        silent = f"silent for {now - who.heard:.0f} s" if now - who.heard > SILENT else ""
        parts = [f"{who.pieces} done", speed, f"{who.memory / 2**20:,.0f} MiB", at, silent]
        return "  ".join([name, *(part for part in parts if part)])


def _short(address: str) -> str:
    return address.rpartition("://")[2]
