"""Utilities of coalitions: each computed once, through Dask, and kept in a file.

A coalition of players is the number with one bit a player. Utilities are asked for in batches, so
that a scheduler has work for all its workers and little is lost when the process is stopped; in
this process one by one, and nothing is lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import numpy as np

from tda.errors import DataError, MismatchError

Player = Hashable
Utility = Callable[[tuple], float]
BATCH = 64  # coalitions a scheduler computes between two writes to the file


@dataclass(eq=False)
class Coalitions:
    """A game: players, and ``utility(players of the coalition, in order) -> float``.

    cache: a path of a JSON Lines file, or a mapping from ``hex`` of the coalition to its utility;
    what is there already is not computed again. A file belongs to one list of players
    (MismatchError if it is another) and to one utility, which is for you to see to.
    workers: processes; with more than one the utility must pickle. A Dask scheduler that has been
    configured is used instead.
    Raises DataError where players repeat, or a utility is not a finite number.
    """

    utility: Utility
    players: tuple[Player, ...]
    cache: str | Path | MutableMapping[str, float] | None = None
    workers: int = 1
    num_computed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.players = tuple(self.players)
        if len(set(self.players)) < len(self.players) or not self.players:
            raise DataError(
                "players are not a set",
                found=f"{len(self.players)} players, {len(set(self.players))} different",
                wanted="one or more, all different",
            )
        self._path = Path(self.cache) if isinstance(self.cache, str | Path) else None
        self._known: MutableMapping[str, float] = {}
        if self._path is not None:
            self._known = _read(self._path, self.players)
        elif self.cache is not None:
            self._known = self.cache  # type: ignore[assignment]

    @property
    def everyone(self) -> int:
        return (1 << len(self.players)) - 1

    def members(self, coalition: int) -> tuple[Player, ...]:
        return tuple(p for i, p in enumerate(self.players) if coalition >> i & 1)

    def utilities(self, coalitions: Sequence[int]) -> np.ndarray:
        """Utilities of these coalitions ``[coalition]`` float64."""
        wanted = list(dict.fromkeys(coalitions))
        missing = [c for c in wanted if hex(c) not in self._known]
        size = 1 if self._here else BATCH
        for start in range(0, len(missing), size):
            self._compute(missing[start : start + size])
        return np.array([self._known[hex(c)] for c in coalitions], np.float64)

    @property
    def _here(self) -> bool:
        """Whether utilities are computed in this process, one by one."""
        return self.workers == 1 and dask.base.get_scheduler() is None

    def _compute(self, missing: Sequence[int]) -> None:
        found = self._called([self.members(c) for c in missing])
        new = {hex(c): self._number(c, value) for c, value in zip(missing, found, strict=True)}
        self._known.update(new)
        self.num_computed += len(new)
        if self._path is not None:
            _append(self._path, ([key, value] for key, value in new.items()))

    def _called(self, given: Sequence[tuple[Player, ...]]) -> Sequence[Any]:
        if self._here:
            return [self.utility(members) for members in given]
        tasks = [
            dask.delayed(_Utility(self.utility, members), traverse=False, pure=False)()
            for members in given
        ]
        scheduler = None if dask.base.get_scheduler() is not None else "processes"
        return dask.compute(*tasks, scheduler=scheduler, num_workers=self.workers)

    def _number(self, coalition: int, value: Any) -> float:
        if not math.isfinite(number := float(value)):
            raise DataError(
                "a utility is not a finite number",
                where=f"coalition {_shortened(self.members(coalition))}",
                found=number,
                do="let the utility say what a coalition it cannot score is worth (chance, say)",
            )
        return number


@dataclass(frozen=True)
class _Utility:
    """One coalition's utility, as a task that is opaque to Dask."""

    utility: Utility
    members: tuple[Player, ...]

    def __call__(self) -> float:
        return self.utility(self.members)


def _shortened(members: tuple) -> str:
    names = ", ".join(map(str, members[:5]))
    return f"{{{names}}}" if len(members) <= 5 else f"{{{names}, … {len(members)} players}}"


def _read(path: Path, players: tuple) -> dict[str, float]:
    """What a file holds; a line torn by a crash is cut off. A new file gets its first line."""
    header = [str(player) for player in players]
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, [header])
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        first, *rest = [json.loads(line) for line in whole.splitlines()]
        known = {str(key): float(value) for key, value in rest}
    except (ValueError, TypeError) as error:
        raise DataError(
            "this file holds no utilities", where=path, found=str(error), do="name another file"
        ) from error
    if first != header:
        raise MismatchError(
            "these utilities are of other players",
            where=path,
            found=_shortened(tuple(first)),
            wanted=_shortened(players),
            do="name another file",
        )
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return known


def _append(path: Path, lines: Iterable[Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
