"""Completion marks: a chunk is finished when its mark says so, and only then.

A mark names the files of one chunk with their sizes and checksums. It is written after they are
flushed, in one spelling, so the same chunk has the same mark wherever it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from tda.store.bounds import DOCUMENT_BYTES, is_mark
from tda.store.files import (
    TMP,
    TRAILER,
    Parts,
    Place,
    Remote,
    Stat,
    adopt_files,
    crc32c,
    create_file,
    list_files,
    map_file,
    put_files,
    read_file,
    remove_file,
    seal,
    unseal,
    write_files,
)

FOLDER = "done"
STATIC = f"{FOLDER}/static.json"

Damage = Literal["missing", "torn", "altered"]
Chunks: TypeAlias = Iterable[tuple[str, np.ndarray]]  # files by key


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
    chunks: Chunks,
    known: Mapping[str, Entry] | None = None,
) -> dict[str, Entry]:
    """Write the chunk files that are not there already: each a chunk, then its crc32c.

    known: remote files that are there, as a mark has them; those of a folder are looked at.
    """
    entries: dict[str, Entry] = {}
    write_files(folder, _wanted(folder, _with_trailers(chunks), known or {}, entries))
    return entries


def write_documents(folder: Place, documents: Mapping[str, bytes]) -> dict[str, Entry]:
    """Write the metadata documents that are not there already."""
    texts = ((key, np.frombuffer(text, np.uint8), 0) for key, text in documents.items())
    entries: dict[str, Entry] = {}
    write_files(folder, _wanted(folder, texts, {}, entries))
    return entries


def put_marked(
    folder: Place, key: str, chunks: Chunks, rows: tuple[int, int], config: str
) -> Callable[[], None]:
    """Write chunk files and the mark ``key`` of them so that a killed process leaves them whole.

    Returns what makes them durable, and the mark after them: it never stands over files that are
    being replaced. Until then nothing is finished, and what was finished before is untouched.
    """
    entries: dict[str, Entry] = {}
    files = _wanted(folder, _with_trailers(chunks), {}, entries)
    return put_files(folder, files, key, lambda: Mark(rows, config, entries).to_bytes())


def unfinished_marks(folder: Path) -> Iterator[tuple[str, str]]:
    """(key, where it lies) of each mark that a killed writer had put."""
    for name in list_files(folder / FOLDER):
        if name.endswith(TMP):
            yield f"{FOLDER}/{name.partition('.json')[0]}.json", f"{FOLDER}/{name}"


def adopt(folder: Path, key: str, mark: Mark, unfinished: str) -> bool:
    """Finish what was put with ``mark``, which lies at ``unfinished``, if all its files are whole.

    Their checksums say so: a crash may have left zeros, or another writer other bytes.
    """
    own = unfinished.removeprefix(key)
    there = {
        name: lies
        for name, entry in mark.files.items()
        for lies in (name + own, name)
        if damage(name, map_file(folder / lies), entry) is None
    }
    if there.keys() != mark.files.keys():
        return False
    adopt_files(folder, there, key, unfinished)
    return True


def _with_trailers(chunks: Chunks) -> Iterator[tuple[str, np.ndarray, int]]:
    return ((key, chunk.reshape(-1).view(np.uint8), TRAILER) for key, chunk in chunks)


def _wanted(
    folder: Place,
    files: Iterable[tuple[str, np.ndarray, int]],
    known: Mapping[str, Entry],
    entries: dict[str, Entry],
) -> Iterator[tuple[str, Parts | None]]:
    """What is to be written, None for what is there already; fills in the ``entries``."""
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
