"""Every file of a run goes through here: where it is, its bytes, its checksum.

A place is a folder or a file of a run. Whoever reads a file sees the old bytes or the new ones,
whole; what has been written is durable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import google_crc32c
import numpy as np

from tda.store import local
from tda.store.local import TMP, Parts, Stat, disk, write_apart

__all__ = ["TMP", "Parts", "Place", "Stat", "as_place", "disk", "write_apart"]

Place: TypeAlias = Path
TRAILER = 4  # bytes of the crc32c that ends every chunk file (Zarr's codec "crc32c")


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


def as_place(given: str | Place) -> Place:
    """The place a user names."""
    return Path(given)


def stat_file(place: Place) -> Stat | None:
    """Size and stamp of a file, or None if there is none. Raises StoreError."""
    return local.stat(place)


def list_files(folder: Place) -> dict[str, Stat]:
    """Every file below a folder by its key (relative, with /), sorted. Raises StoreError."""
    return dict(sorted(local.walk(folder)))


def list_folders(folder: Place) -> list[str]:
    """Names of the folders in a folder that hold something, sorted. Raises StoreError."""
    return sorted(local.folders(folder))


def read_file(place: Place) -> bytes | None:
    """The bytes of a file, or None if there is none. Raises StoreError."""
    with disk(place, "read"):
        try:
            return place.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


def map_file(place: Place) -> np.ndarray | None:
    """The bytes of a file without copying them, or None if there is none. Raises StoreError."""
    with disk(place, "read"):
        try:
            return local.map_file(place)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None


def is_writable(folder: Place) -> bool:
    """Whether files of a folder may be replaced, as far as can be told beforehand."""
    return os.access(folder, os.W_OK)


def write_files(folder: Place, files: Iterable[tuple[str, Parts | None]]) -> None:
    """Make each file ``folder / key`` hold its parts, one after the other; durable on return.

    None: the file is there already, make sure of it. Raises StoreError.
    """
    local.write(folder, files)


def write_file(place: Place, data: bytes) -> None:
    """Make ``place`` hold ``data``; durable on return. Raises StoreError."""
    write_files(place.parent, [(place.name, (data,))])


def remove_file(place: Place) -> None:
    """Delete a file if it is there; durable on return. Raises StoreError."""
    local.remove(place)


def remove_unfinished(folder: Place) -> None:
    """What killed writers left anywhere in a folder. Raises StoreError."""
    local.remove_unfinished(folder)


def remove_tree(folder: Place) -> None:
    """Delete a folder and all in it, if it is there. Raises StoreError."""
    local.remove_tree(folder)
