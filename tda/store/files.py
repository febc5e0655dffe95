"""Bytes on disk: written whole or not at all, flushed before anything relies on them, checksummed.

A file that is being written is called ``<name>.tmp``; the name is fixed, so that a writer that
was killed leaves nothing that its successor does not overwrite. Workers of a cluster, of which two
may write the same chunk, have names of their own (`write_apart`), and whoever gave out the work
removes what they left.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import google_crc32c
import numpy as np

from tda.errors import StoreError

TMP = ".tmp"
_own = ""  # what tells this process's unfinished files from those of others
TRAILER = 4  # bytes of the crc32c that ends every chunk file (Zarr's codec "crc32c")

Parts: TypeAlias = tuple[bytes | memoryview, ...]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C (Castagnoli) of the bytes of ``data``."""
    return google_crc32c.value(data)


def to_json(value: Any) -> bytes:
    """``value`` as JSON: one spelling for one value (sorted keys, no NaN, a newline at the end)."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def seal(value: Mapping[str, Any]) -> bytes:
    """``value`` as JSON with one more key, ``crc32c``: of the JSON without it."""
    return to_json({**value, "crc32c": f"{crc32c(to_json(value)):08x}"})


def unseal(data: bytes) -> dict[str, Any] | None:
    """What :func:`seal` made ``data`` of, or None: then a byte of it is not as it was written."""
    try:
        value = json.loads(data)
        del value["crc32c"]
        return value if seal(value) == data else None
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def disk(path: Path, doing: str) -> Iterator[None]:
    """Turns an OSError into a StoreError that says what to do. ``doing``: write, read, delete."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            what = "the disk is full"
            do = "free some space and run the same command again: what is finished is kept"
        elif error.errno in _FORBIDDEN and doing != "read":
            what = "the folder cannot be written"
            do = "choose a folder that you may write to, or change its permissions"
        else:
            what = f"cannot {doing} this file"
            do = "check the disk and the path, then run the same command again"
        raise StoreError(what, where=path, found=error.strerror or error, do=do) from error


def write_apart() -> None:
    """From here on others may be writing the files that this process writes, to the same bytes."""
    global _own
    _own = f".{socket.gethostname()}-{os.getpid()}"


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}{_own}{TMP}")


def remove_unfinished(folder: Path) -> None:
    """What killed writers left anywhere in a folder. Raises StoreError."""
    with disk(folder, "delete"):
        for left in folder.rglob(f"*{TMP}"):
            left.unlink(missing_ok=True)


def write_files(folder: Path, files: Iterable[tuple[str, Parts | None]]) -> None:
    """Make each file ``folder / key`` hold its parts, one after the other; durable on return.

    None: the file is there already, make sure of it. Whoever reads a file sees the old bytes or
    the new ones. All are written before the first is flushed: one journal commit serves them all.
    Raises StoreError (disk full, unwritable folder).
    """
    written: dict[Path, Path] = {}
    kept: list[Path] = []
    path = folder
    top = next(above for above in (folder, *folder.parents) if above.exists())
    try:
        for key, parts in files:
            path = folder / key
            if parts is None:
                kept.append(path)
                continue
            with disk(path, "write"):
                path.parent.mkdir(parents=True, exist_ok=True)
                written[path] = _unfinished(path)
                _write(written[path], parts)
        with disk(path, "write"):
            for name in (*written.values(), *kept):
                _flush(name)
            for final, tmp in written.items():
                tmp.replace(final)
            for final in kept:
                _unfinished(final).unlink(missing_ok=True)
            for name in _folders(top, (*written, *kept)):
                _flush(name)
    except StoreError:
        for tmp in written.values():
            with suppress(OSError):  # the first error is the one to tell
                tmp.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``; durable on return. Raises StoreError."""
    write_files(path.parent, [(path.name, (data,))])


def _write(path: Path, parts: Parts) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)


def _folders(top: Path, paths: Iterable[Path]) -> list[Path]:
    """The folders of ``paths`` up to the one that holds ``top``, innermost first."""
    found = {top.parent}
    for path in paths:
        for folder in path.parents:
            if folder in found:
                break
            found.add(folder)
    return sorted(found, key=lambda folder: -len(folder.parts))


def remove_file(path: Path) -> None:
    """Delete ``path`` if it is there; durable on return. Raises StoreError."""
    with disk(path, "delete"):
        if path.exists():
            path.unlink()
            _flush(path.parent)


def _flush(path: Path) -> None:
    """Bytes of a file, or names in a folder, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot flush a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, mapped; a change to the array stays in memory. Raises OSError."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
