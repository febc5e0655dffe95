"""Reading everything that is stored, and naming what is not as it was written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from tda.errors import StoreError
from tda.store.files import TMP
from tda.store.manifest import BASES, CURVATURE, NAME, QUERIES, TRAIN, cure, read_manifest, redo
from tda.store.marks import FOLDER, STATIC, chunk_mark, damage, read_mark, remove_mark
from tda.store.table import Table

_WHAT = {
    "missing": "the file is gone",
    "torn": "the file has another size than when it was finished",
    "altered": "the checksum does not match",
}
_DELETE = "delete it, or rerun `tda index`, which overwrites what an interrupted run left"


@dataclass(frozen=True)
class Fault:
    """path: relative to the run; do: what mends it."""

    path: str
    kind: Literal["missing", "torn", "altered", "unmarked"]
    what: str
    do: str


def find_faults(run: Path, manifest: Mapping[str, Any], withdraw: bool) -> list[Fault]:
    """Every fault of a run, sorted by path; see :meth:`tda.store.Store.verify`."""
    faults = [*_manifest_faults(run), *_bases_faults(run, manifest)]
    for name in table_names(run):
        faults += _TableCheck(run, name, manifest, withdraw).faults()
    return sorted(faults, key=lambda fault: (fault.path, fault.kind))


def _bases_faults(run: Path, manifest: Mapping[str, Any]) -> Iterator[Fault]:
    """A projection fitted to the data has a file; its digest is part of the manifest."""
    digest = manifest["projection"].get("bases_digest")
    if digest is None:
        return
    do = "restore the file from a copy, or index again into a new folder"
    if not (run / BASES).is_file():
        yield Fault(BASES, "missing", _WHAT["missing"], do)
    elif blake2b((run / BASES).read_bytes(), digest_size=16).hexdigest() != digest:
        yield Fault(BASES, "altered", _WHAT["altered"], do)


def table_names(run: Path) -> list[str]:
    """``train``, ``curvature`` and ``queries/NAME``, those that are there."""
    sets = sorted(path.name for path in (run / QUERIES).glob("*") if (path / FOLDER).is_dir())
    single = [name for name in (TRAIN, CURVATURE) if (run / name).is_dir()]
    return single + [f"{QUERIES}/{name}" for name in sets]


def _manifest_faults(run: Path) -> Iterator[Fault]:
    try:
        read_manifest(run)
    except StoreError as error:
        kind: Literal["missing", "altered"] = "altered" if (run / NAME).exists() else "missing"
        yield Fault(NAME, kind, error.what, error.do or "")
    if (run / (NAME + TMP)).exists():
        yield Fault(NAME + TMP, "unmarked", "left by an interrupted write", _DELETE)


class _TableCheck:
    """One table, checked against its marks, and its marks against the table."""

    def __init__(self, run: Path, name: str, manifest: Mapping[str, Any], withdraw: bool) -> None:
        self.run, self.name, self.folder = run, name, run / name
        self.manifest = manifest
        writable = os.access(self.folder / FOLDER, os.W_OK)
        self.withdraw = withdraw and writable
        self.do = redo(name)
        if withdraw and not writable:
            self.do = f"make the folder writable, {cure(run, name)}"
        self.known: set[str] = set()  # files that have been accounted for
        self.bad: set[str] = set()  # marks that have been reported
        self.ready = False

    def faults(self) -> list[Fault]:
        return [*self._marked(), *self._chunks(), *self._others()]

    def _fault(self, key: str, kind: Any, what: str, do: str | None = None) -> Fault:
        return Fault(f"{self.name}/{key}", kind, what, self.do if do is None else do)

    def _marked(self) -> Iterator[Fault]:
        """Every mark, and every file a mark names. Needs nothing else to be intact."""
        for path in sorted((self.folder / FOLDER).glob("*.json")):
            key = f"{FOLDER}/{path.name}"
            if path.name == "zarr.json":
                continue
            self.known.add(key)
            mark = read_mark(path)
            if mark is None:
                yield self._bad_mark(key, "the mark is damaged")
                continue
            self.known.update(mark.files)
            bad = {k: d for k, e in mark.files.items() if (d := damage(self.folder, k, e))}
            for name, kind in bad.items():
                yield self._fault(name, kind, _WHAT[kind])
            if bad:
                self._take_back(key)

    def _bad_mark(self, key: str, what: str) -> Fault:
        self._take_back(key)
        self.bad.add(key)
        return self._fault(key, "altered", what)

    def _take_back(self, key: str) -> None:
        if self.withdraw:
            remove_mark(self.folder, key)

    def _chunks(self) -> Iterator[Fault]:
        """Every chunk that should be there."""
        try:
            table = Table(self.run, self.name)
            table.column("digest")
        except StoreError:  # damaged, and reported as such, or never finished
            if STATIC not in self.known:
                yield self._fault(STATIC, "missing", "the table is not planned to the end")
            return
        self.ready = True
        rows = table.specs["rows"]
        if rows.shape[0] != len(self.manifest["checkpoints"]):
            yield self._fault(rows.document_key, "altered", "the array lacks a checkpoint")
        for checkpoint in range(table.num_checkpoints):
            for chunk in range(table.num_chunks):
                yield from self._chunk(table, checkpoint, chunk)

    def _chunk(self, table: Table, checkpoint: int, chunk: int) -> Iterator[Fault]:
        key = chunk_mark(checkpoint, chunk)
        files = [name for name in table.keys(checkpoint, chunk) if (self.folder / name).exists()]
        self.known.update(files)
        if key in self.known:
            here = (self.folder / key).exists() and key not in self.bad
            if here and table.mark(checkpoint, chunk) is None:
                yield self._bad_mark(key, "the mark is for other rows than these")
        elif files:
            yield self._fault(key, "unmarked", "files are there, but no mark says they are whole")
        else:
            yield self._fault(key, "missing", "this chunk is not computed yet")

    def _others(self) -> Iterator[Fault]:
        """Every file nobody vouches for."""
        for path in sorted(self.folder.rglob("*")):
            key = path.relative_to(self.folder).as_posix()
            if not path.is_file() or key in self.known:
                continue
            if path.name.endswith(TMP):
                yield self._fault(key, "unmarked", "left by an interrupted write", _DELETE)
            elif self.ready:
                yield self._fault(key, "unmarked", "no mark names this file", "delete it")
