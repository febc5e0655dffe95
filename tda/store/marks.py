"""Completion marks: a chunk is finished when its mark says so, and only then.

A mark names the files of one chunk with their sizes and checksums. It is written after they are
flushed, in one spelling, so the same chunk has the same mark wherever it was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from tda.store.bounds import DOCUMENT_BYTES, is_mark
from tda.store.files import (
    TRAILER,
    Parts,
    Place,
    Remote,
    Stat,
    crc32c,
    create_file,
    map_file,
    read_file,
    remove_file,
    seal,
    unseal,
    write_files,
)

FOLDER = "done"
STATIC = f"{FOLDER}/static.json"

Damage = Literal["missing", "torn", "altered"]


class Entry(NamedTuple):
    """A file: its bytes, and their crc32c – of a chunk file without the crc32c that ends it.

    (Over both it would be the same number for every chunk file: a property of the CRC.)
    """

    size: int
    crc32c: int


@dataclass(frozen=True)
class Mark:
    """``rows``: start and stop; ``config``: hash of all that determines them; ``files`` by key."""

    rows: tuple[int, int]
    config: str
    files: Mapping[str, Entry]

    def to_bytes(self) -> bytes:
        files = {
            key: {"size": entry.size, "crc32c": f"{entry.crc32c:08x}"}
            for key, entry in self.files.items()
        }
        return seal({"rows": list(self.rows), "config": self.config, "files": files})

    @staticmethod
    @lru_cache(maxsize=4096)  # a run is looked through many times, and its marks stay as they are
    def parse(data: bytes) -> Mark | None:
        """The mark, or None if ``data`` is not exactly what :meth:`to_bytes` wrote."""
        parts = unseal(data)
        if parts is None or not is_mark(parts):
            return None
        files = {
            key: Entry(entry["size"], int(entry["crc32c"], 16))
            for key, entry in parts["files"].items()
        }
        start, stop = parts["rows"]
        return Mark((start, stop), parts["config"], files)


def chunk_mark(checkpoint: int, chunk: int) -> str:
    return f"{FOLDER}/c{checkpoint}-{chunk}.json"


def read_mark(place: Place) -> Mark | None:
    """The mark at ``place``, or None if there is none or it is damaged. Raises StoreError."""
    data = read_file(place, DOCUMENT_BYTES)
    return None if data is None else Mark.parse(data)


def write_chunks(
    folder: Place,
    chunks: Iterable[tuple[str, np.ndarray]],
    known: Mapping[str, Entry] | None = None,
) -> dict[str, Entry]:
    """Write the chunk files that are not there already: each a chunk, then its crc32c.

    known: remote files that are there, as a mark has them; those of a folder are looked at.
    """
    files = ((key, c.reshape(-1).view(np.uint8), TRAILER) for key, c in chunks)
    return _write(folder, files, known or {})


def write_documents(folder: Place, documents: Mapping[str, bytes]) -> dict[str, Entry]:
    """Write the metadata documents that are not there already."""
    texts = ((key, np.frombuffer(text, np.uint8), 0) for key, text in documents.items())
    return _write(folder, texts, {})


def _write(
    folder: Place, files: Iterable[tuple[str, np.ndarray, int]], known: Mapping[str, Entry]
) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}

    def wanted() -> Iterator[tuple[str, Parts | None]]:
        for key, data, trailer in files:
            entry = Entry(len(data) + trailer, crc32c(data))
            entries[key] = entry
            # To look at an object first would cost as much as to put it again.
            if isinstance(folder, Remote):
                there = known.get(key) == entry
            else:
                there = damage(key, map_file(folder / key), entry) is None
            if there:
                yield key, None
            else:
                yield key, (data.data, entry.crc32c.to_bytes(TRAILER, "little")[:trailer])

    write_files(folder, wanted())
    return entries


def write_mark(folder: Place, key: str, mark: Mark) -> None:
    create_file(folder / key, mark.to_bytes())


def remove_mark(folder: Place, key: str) -> None:
    remove_file(folder / key)


def is_document(key: str) -> bool:
    return key.endswith("zarr.json")


def have_sizes(listed: Mapping[str, Stat], files: Mapping[str, Entry]) -> bool:
    """Whether every file of a mark is listed with the size it was finished with."""
    return all(key in listed and listed[key].size == e.size for key, e in files.items())


def damage(key: str, data: np.ndarray | None, entry: Entry) -> Damage | None:
    """What is wrong with the bytes of a file a mark names, or None: it is as it was finished."""
    if data is None:
        return "missing"
    if len(data) != entry.size:
        return "torn"
    return None if is_intact(key, data, entry) else "altered"


def is_intact(key: str, data: np.ndarray, entry: Entry) -> bool:
    """Whether the bytes of a file are those its mark was written for."""
    if is_document(key):
        return crc32c(data) == entry.crc32c
    trailer = int.from_bytes(data[-TRAILER:].tobytes(), "little")
    return trailer == entry.crc32c == crc32c(data[:-TRAILER])
