"""A folder of this machine: files are written whole or not at all, and flushed.

A file is put under the name ``<name>.tmp``, then flushed and renamed. The name is fixed: what a
writer that was killed leaves is finished or overwritten by its successor. Workers of a cluster, of
which two may write the same chunk, have names of their own (`write_apart`), and whoever gave out
the work removes what they left.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import socket
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import NamedTuple, TypeAlias

import numpy as np

from tda.errors import StoreError

try:
    import fcntl
except ImportError:  # no POSIX: nothing keeps two writers apart
    fcntl = None  # type: ignore[assignment]

TMP = ".tmp"
_FLUSHES = 8  # at once
_own = ""  # what tells this process's unfinished files from those of others

Parts: TypeAlias = tuple[bytes | memoryview, ...]
Lying: TypeAlias = dict[Path, Path]  # a file's own name → where it lies

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # for the other end of a pipe
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class Stat(NamedTuple):
    """Bytes of a file, when it was last changed, and a stamp that every change makes another."""

    size: int
    changed_ns: int
    stamp: Hashable


@contextmanager
def disk(path: object, doing: str) -> Iterator[None]:
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
        elif error.errno == errno.ELOOP:
            what = "there is a link in this run, and runs hold plain files only"
            do = "put what it points to in its place, if you trust it"
        else:
            what = f"cannot {doing} this file"
            do = "check the disk and the path, then run the same command again"
        raise StoreError(what, where=path, found=error.strerror or error, do=do) from error


def stat(path: Path) -> Stat | None:
    """None where there is no such file. Raises StoreError."""
    with disk(path, "read"):
        try:
            found = os.stat(path, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
    return _stat(found)


def _stat(found: os.stat_result) -> Stat:
    return Stat(found.st_size, found.st_mtime_ns, found.st_ino)


def walk(folder: Path) -> Iterator[tuple[str, Stat]]:
    """Every file below a folder, as its key and what it is. Raises StoreError."""
    todo = [("", folder)]
    while todo:
        prefix, here = todo.pop()
        for entry in _entries(here):
            if entry.is_dir(follow_symlinks=False):
                todo.append((f"{prefix}{entry.name}/", Path(entry.path)))
            else:
                with suppress(FileNotFoundError), disk(Path(entry.path), "read"):
                    yield prefix + entry.name, _stat(entry.stat(follow_symlinks=False))


def folders(folder: Path) -> list[str]:
    """Names of the folders in a folder. Raises StoreError."""
    return [entry.name for entry in _entries(folder) if entry.is_dir(follow_symlinks=False)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing where there is none. Raises StoreError."""
    with disk(folder, "read"):
        try:
            return list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []


def require_plain(run: Path) -> None:
    """Refuse a run with links: through them its maker could read and write anywhere.

    Chunks are too many to look at here; `read` and `write` follow no link either.
    """
    todo = [run]
    while todo:
        here = todo.pop()
        for entry in _entries(here):
            with disk(Path(entry.path), "read"):
                if entry.is_symlink():
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if entry.is_dir() and here.name != "c":
                todo.append(Path(entry.path))


def _opened(path: Path) -> int | None:
    """A handle to read a file by, or None for a folder. Raises OSError for whatever else it is."""
    handle = os.open(path, os.O_RDONLY | _NO_LINK | _NO_WAIT)
    mode = os.fstat(handle).st_mode
    if S_ISREG(mode):
        return handle
    os.close(handle)
    if S_ISDIR(mode):
        return None
    raise OSError(errno.EINVAL, "not a file but a device, a pipe or a socket")


def read(path: Path, most: int | None = None) -> bytes | None:
    """The bytes of a file of at most ``most`` bytes, None where there is none. Raises OSError."""
    handle = _opened(path)
    if handle is None:
        return None
    with os.fdopen(handle, "rb") as file:
        if most is not None and os.fstat(handle).st_size > most:
            raise OSError(errno.EFBIG, f"{os.fstat(handle).st_size} bytes, {most} at the most")
        return file.read()


def map_file(path: Path) -> np.ndarray | None:
    """The bytes of a file, mapped; a change to the array stays in memory. Raises OSError."""
    handle = _opened(path)
    if handle is None:
        return None
    with os.fdopen(handle, "rb") as file:
        if not os.fstat(handle).st_size:  # nothing cannot be mapped
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


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


def write(folder: Path, files: Iterable[tuple[str, Parts | None]]) -> None:
    """Make each file ``folder / key`` hold its parts, one after the other; durable on return.

    None: the file is there already, make sure of it. Raises StoreError (disk full, unwritable
    folder).
    """
    put(folder, files)()


def put(folder: Path, *stages: Iterable[tuple[str, Parts | None]]) -> Callable[[], None]:
    """Write files as `write` has them, but under unfinished names; returns what finishes them.

    A process that is killed in between leaves them, whole. Finished, those of a stage are durable
    under their own names before the first of the next is. Raises StoreError, as `write`; then, and
    where finishing fails, nothing unfinished is left.
    """
    top = next(above for above in (folder, *folder.parents) if above.exists())
    lying: list[Lying] = []
    try:
        for files in stages:
            lying.append({})
            for key, parts in files:
                path = folder / key
                lying[-1][path] = path if parts is None else _unfinished(path)
                if parts is not None:
                    with disk(path, "write"):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        _require_within(folder, path)
                        _write(lying[-1][path], parts)
    except StoreError:
        _drop(lying)
        raise
    return partial(finish, top, lying)


def finish(top: Path, stages: Sequence[Lying]) -> None:
    """Make files durable under their own names, stage by stage, in a folder ``top`` that is so.

    All are flushed before the first is renamed: one journal commit serves them all. Raises
    StoreError.
    """
    try:
        with disk(next((path for lying in stages for path in lying), top), "write"):
            _flush_all(there for lying in stages for there in lying.values())
            for lying in stages:
                for final, there in lying.items():
                    if there == final:
                        _unfinished(final).unlink(missing_ok=True)
                    else:
                        there.replace(final)
                _flush_all(_folders(top, lying))
    except StoreError:
        _drop(stages)
        raise


def _drop(stages: Sequence[Lying]) -> None:
    for lying in stages:
        for final, there in lying.items():
            if there != final:
                with suppress(OSError):  # the first error is the one to tell
                    there.unlink(missing_ok=True)


def _require_within(folder: Path, path: Path) -> None:
    """Raises OSError if a folder between is a link."""
    for between in path.relative_to(folder).parents:
        if (folder / between).is_symlink() and between.name:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _write(path: Path, parts: Parts) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_LINK, 0o666)
    with os.fdopen(handle, "wb") as file:
        for part in parts:
            file.write(part)


def _folders(top: Path, paths: Iterable[Path]) -> set[Path]:
    """The folders of ``paths`` up to the one that holds ``top``."""
    found = {top.parent}
    for path in paths:
        for folder in path.parents:
            if folder in found:
                break
            found.add(folder)
    return found


def extend(path: Path, more: Callable[[bytes], bytes]) -> None:
    """Put ``more(content)`` after the last whole line of a file; durable on return."""
    with disk(path, "write"):
        path.parent.mkdir(exist_ok=True)
        file = path.open("a+b", buffering=0)
    with file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        line = more(whole)
        with disk(path, "write"):
            file.truncate(len(whole))
            file.seek(len(whole))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Delete a file if it is there; durable on return. Raises StoreError."""
    with disk(path, "delete"):
        if path.exists():
            path.unlink()
            _flush(path.parent)


def remove_tree(folder: Path) -> None:
    """Delete a folder and all in it, if it is there. Raises StoreError."""
    with disk(folder, "delete"):
        if folder.exists():
            shutil.rmtree(folder)


def _flush_all(paths: Iterable[Path]) -> None:
    """At once: then the disk does for many what it would do for each (a chunk: 80 ms → 9)."""
    with ThreadPoolExecutor(_FLUSHES) as pool:
        for each in [pool.submit(_flush, path) for path in paths]:
            each.result()


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
