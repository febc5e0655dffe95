"""Derived arrays kept beside a store: never needed, never trusted, deleted at will.

A file's name is the digest of everything its content follows from, so nothing goes stale: other
rows, another model or another recipe have another name. A file that cannot be read, is damaged
(zip checksums) or cannot be written is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tda.npz import read_npz
from tda.store.files import Place, beside, list_files, read_files

Arrays = dict[str, np.ndarray]
log = logging.getLogger(__name__)


class Run(Protocol):
    """What is asked of a store here (see ``tda.store.Store``)."""

    @property
    def path(self) -> Place: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...


def fingerprint(store: Run, table: str) -> str | None:
    """Digest of the manifest and of a table's completion marks; None if nothing is marked.

    The marks hold the checksums of the rows, so equal fingerprints mean equal bytes.
    """
    folder = store.path / table / "done"
    listed = list_files(folder)
    marks = {name: listed[name] for name in listed if name.endswith(".json")}
    if not marks:
        return None
    digest = hashlib.sha256(json.dumps(store.manifest, sort_keys=True).encode())
    for name, data in read_files(folder, marks).items():
        digest.update(name.encode() + b"\0" + (data or b""))
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """``cache/`` of a store, for what follows from the rows of one of its tables.

    That of a remote store is on this machine.
    """

    folder: Path
    source: str | None

    @staticmethod
    def of(store: Run, table: str = "train") -> Cache:
        return Cache(beside(store.path) / "cache", fingerprint(store, table))

    def mine(self) -> Cache:
        """The same in a folder of this user's: for what only its own maker may safely read.

        A run may come from a stranger, and its cache too: arrays are harmless, other formats may
        not be.
        """
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Cache(Path(home) / "tda", self.source)

    def get(self, kind: str, choices: Sequence[object], compute: Callable[[], Arrays]) -> Arrays:
        """The arrays kept for these choices, or those computed, which are then kept.

        Without a source fingerprint nothing is kept.
        """
        if self.source is None:
            return compute()
        name = hashlib.sha256(json.dumps([self.source, *choices]).encode()).hexdigest()[:32]
        path = self.folder / f"{kind}-{name}.npz"
        found = read_arrays(path)
        if found is None:
            found = compute()
            write_arrays(path, found)
        return found


def read_arrays(path: Path) -> Arrays | None:
    """What ``write_arrays`` left there; None if there is nothing, or nothing sound."""
    try:
        with path.open("rb") as file:
            return read_npz(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is damaged (%s) and is computed again", path, error)
        return None


def write_arrays(path: Path, arrays: Arrays) -> None:
    """The whole file or none; a file that cannot be written is as good as none."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(temporary, path)
    except OSError as error:  # a read-only store or a full disk must not stop a query
        log.info("%s could not be kept (%s)", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
