"""The chunk files of a table, checked; those of a remote run through copies on this machine.

A file's checksum is computed at its first use and again whenever its time, size or inode has
changed; in between, its bytes come straight from the mapped file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import numpy as np

from tda.store import kept, remote
from tda.store.files import TRAILER, Place, Remote, Stat, map_file, stat_file
from tda.store.marks import Damage, Entry, damage

_SETTLED = 2_000_000_000  # ns; a file changed more recently may change again under the same time
AHEAD = 4  # chunks of a remote table that come while one is used
_FEW = 4  # rows are read alone if all they need is less than the chunk by this factor
_SMALL = 2**18  # bytes; a smaller file comes whole, and is kept: a request costs as much


class Chunks:
    """Files of a table's folder by key. ``entry``: what the mark says of it, asked if need be."""

    def __init__(self, folder: Place) -> None:
        self._folder = folder
        self._checked: dict[str, Stat] = {}
        self._coming: dict[str, Future[bool]] = {}
        self._known: dict[str, Entry] = {}  # remote files that end as their mark says

    def whole(self, key: str, entry: Callable[[], Entry]) -> np.ndarray | Damage:
        """All bytes of a file that is what its mark says; or what is wrong with it.

        Raises StoreError if it cannot be read.
        """
        place = self._folder / key
        if isinstance(place, Path):
            return self._view(place, key, entry)
        wanted = entry()
        copy = _copy(place, wanted)
        coming = self._coming.pop(key, None)
        if coming is not None:
            wait([coming])
        found = self._view(copy, key, entry)
        if not isinstance(found, str):
            kept.used(copy)
            return found
        # There is no copy yet, or it has been damaged here.
        if not kept.fetch(place, copy):
            return "missing"
        found = self._view(copy, key, entry)
        if isinstance(found, str):
            kept.forget(copy)
        return found

    def ahead(self, wanted: Iterable[tuple[str, Entry]]) -> None:
        """Begin to download what will be asked for next. What fails is asked for again then."""
        if isinstance(self._folder, Path):
            return
        for key, entry in wanted:
            place = self._folder / key
            copy = _copy(place, entry)
            if key not in self._coming and not copy.exists():
                self._coming[key] = _pool().submit(kept.fetch, place, copy)

    def rows(
        self, key: str, entry: Callable[[], Entry], picked: np.ndarray, row_bytes: int
    ) -> np.ndarray | None:
        """``[len(picked), row_bytes]`` bytes of a few rows of a remote file, without the others.

        None where the file is to be read whole: it is here, it is small, most of it is wanted, or
        it does not end, where its mark says, in the checksum of its mark: then it is another file
        than the one that was finished. A checksum of the rows themselves there is none (see
        stores/README.md).
        """
        place = self._folder / key
        if isinstance(place, Path) or not len(picked):
            return None
        wanted = entry()
        rows, inverse = np.unique(picked, return_inverse=True)
        is_cheap = wanted.size <= _SMALL or _FEW * len(rows) * row_bytes > wanted.size
        if is_cheap or _copy(place, wanted).exists():
            return None
        spans = [(int(row) * row_bytes, (int(row) + 1) * row_bytes) for row in rows]
        is_known = self._known.get(key) == wanted
        end = [] if is_known else [(wanted.size - TRAILER, wanted.size)]
        pieces = remote.get_ranges(place, [*spans, *end])
        if pieces is None or (
            end and bytes(pieces.pop()) != wanted.crc32c.to_bytes(TRAILER, "little")
        ):
            return None
        self._known[key] = wanted
        return np.stack([np.frombuffer(piece, np.uint8) for piece in pieces])[inverse]

    def _view(self, path: Path, key: str, entry: Callable[[], Entry]) -> np.ndarray | Damage:
        stat = stat_file(path)
        data = None if stat is None else map_file(path)
        if stat is None or data is None:
            return "missing"
        if self._checked.get(key) != stat:
            fault = damage(key, data, entry())
            if fault is not None:
                return fault
            if time.time_ns() - stat.changed_ns > _SETTLED:
                self._checked[key] = stat
        return data


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AHEAD, "tda-ahead")


def _copy(place: Remote, entry: Entry) -> Path:
    return kept.copy_of(place, f"{entry.size}-{entry.crc32c:08x}")
