"""What this machine keeps of runs that lie elsewhere: copies of objects, and what is made of them.

A copy's name is the digest of its place and its version – the object's etag, or size and checksum
from a mark –, so none goes stale and processes need not agree on anything. What was used longest
ago is deleted first. The folder is ``TDA_CACHE``, or ``tda`` where caches are kept;
``TDA_CACHE_GB`` bounds the copies (20).
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import google_crc32c

from tda.errors import ConfigError, StoreError
from tda.store import remote
from tda.store.local import disk
from tda.store.remote import Remote

_GIGABYTES = 20.0
_unscanned = float("inf")  # bytes added since the folder was last measured by this process


def home() -> Path:
    given = os.environ.get("TDA_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tda"


def beside(place: Path | Remote) -> Path:
    """The folder of this machine for what follows from a run: the run itself if it is here."""
    if isinstance(place, Path):
        return place
    return home() / "runs" / f"{place.name}-{_digest(str(place))[:12]}"


def copy_of(place: Remote, version: object) -> Path:
    """Where a copy of this version is, or would be."""
    name = _digest(f"{place}\0{version}")
    return home() / "objects" / name[:2] / name


def read(place: Remote, version: object) -> bytes | None:
    """A copy of a small file, if there is a sound one."""
    copy = copy_of(place, version)
    try:
        data = copy.read_bytes()
    except OSError:
        return None
    used(copy)
    sound = google_crc32c.value(data[:-4]).to_bytes(4, "little") == data[-4:]
    return data[:-4] if sound else None


def write(place: Remote, version: object, data: bytes) -> None:
    """Keep a small file for `read`. What cannot be kept is downloaded again."""
    with suppress(StoreError):
        keep(copy_of(place, version), data + google_crc32c.value(data).to_bytes(4, "little"))


def used(copy: Path) -> None:
    """This copy is not to be deleted soon. (Its time of change stays: it has been checked.)"""
    with suppress(OSError):
        os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))


def fetch(place: Remote, copy: Path) -> bool:
    """Download an object to ``copy``; False if there is none. Raises StoreError."""
    found = remote.get(place)
    if found is None:
        return False
    keep(copy, found[0])
    return True


def keep(copy: Path, data: bytes | memoryview) -> None:
    """Raises StoreError where the disk is full or cannot be written."""
    _make_room(len(data))
    with disk(copy, "write"):
        copy.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=copy.parent, suffix=".tmp")
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(name, copy)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def forget(copy: Path) -> None:
    with suppress(OSError):
        copy.unlink(missing_ok=True)


def _make_room(size: int) -> None:
    """Before ``size`` more bytes: measures now and then, so a bound may be passed by a tenth."""
    global _unscanned
    bound = _bound()
    _unscanned += size
    if _unscanned <= bound / 10:
        return
    copies = []
    for path in (home() / "objects").glob("*/*"):
        with suppress(OSError):  # another process was faster
            stat = path.stat()
            copies.append((stat.st_atime_ns, stat.st_size, path))
    copies.sort()
    total = sum(one[1] for one in copies) + size
    for _, bytes_, path in copies:
        if total <= bound:
            break
        forget(path)  # whoever has it mapped keeps it
        total -= bytes_
    _unscanned = 0


def _bound() -> float:
    given = os.environ.get("TDA_CACHE_GB", _GIGABYTES)
    try:
        return float(given) * 1e9
    except ValueError:
        raise ConfigError("TDA_CACHE_GB is no number", found=given, wanted="gigabytes") from None


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()
