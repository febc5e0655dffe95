"""Reading everything that is stored, and naming what is not as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from tda.errors import StoreError
from tda.store.files import TMP, Place, is_writable, list_files, map_file, read_file, stat_file
from tda.store.manifest import BASES, NAME, cure, read_manifest, redo
from tda.store.marks import FOLDER, STATIC, chunk_mark, damage, is_document, read_mark, remove_mark
from tda.store.table import Table, table_names

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


def find_faults(run: Place, manifest: Mapping[str, Any], withdraw: bool) -> list[Fault]:
    """Every fault of a run, sorted by path; see :meth:`tda.store.Store.verify`."""
    faults = [*_manifest_faults(run), *_bases_faults(run, manifest)]
    for name in table_names(run):
        faults += _TableCheck(run, name, manifest, withdraw).faults()
    return sorted(faults, key=lambda fault: (fault.path, fault.kind))


def _bases_faults(run: Place, manifest: Mapping[str, Any]) -> Iterator[Fault]:
    """A projection fitted to the data has a file; its digest is part of the manifest."""
    digest = manifest["projection"].get("bases_digest")
    if digest is None:
        return
    do = "restore the file from a copy, or index again into a new folder"
    data = read_file(run / BASES)
    if data is None:
        yield Fault(BASES, "missing", _WHAT["missing"], do)
    elif blake2b(data, digest_size=16).hexdigest() != digest:
        yield Fault(BASES, "altered", _WHAT["altered"], do)


def _manifest_faults(run: Place) -> Iterator[Fault]:
    try:
        read_manifest(run)
    except StoreError as error:
        gone = stat_file(run / NAME) is None
        kind: Literal["missing", "altered"] = "missing" if gone else "altered"
        yield Fault(NAME, kind, error.what, error.do or "")
    if stat_file(run / (NAME + TMP)) is not None:
        yield Fault(NAME + TMP, "unmarked", "left by an interrupted write", _DELETE)


class _TableCheck:
    """One table, checked against its marks, and its marks against the table."""

    def __init__(self, run: Place, name: str, manifest: Mapping[str, Any], withdraw: bool) -> None:
        self.run, self.name, self.folder = run, name, run / name
        self.manifest = manifest
        writable = is_writable(self.folder / FOLDER)
        self.withdraw = withdraw and writable
        self.do = redo(name)
        if withdraw and not writable:
            self.do = f"make the folder writable, {cure(run, name)}"
        self.known: set[str] = set()  # files that have been accounted for
        self.bad: set[str] = set()  # marks that have been reported
        self.withdrawn: set[str] = set()
        self.ready = False
        self.listed = list_files(self.folder)

    def faults(self) -> list[Fault]:
        return [*self._marked(), *self._chunks(), *self._others()]

    def _fault(self, key: str, kind: Any, what: str, do: str | None = None) -> Fault:
        return Fault(f"{self.name}/{key}", kind, what, self.do if do is None else do)

    def _marked(self) -> Iterator[Fault]:
        """Every mark, and every file a mark names. Needs nothing else to be intact."""
        for key in self.listed:
            folder, _, name = key.partition("/")
            if folder != FOLDER or is_document(name) or not name.endswith(".json"):
                continue
            self.known.add(key)
            mark = read_mark(self.folder / key)
            if mark is None:
                yield self._bad_mark(key, "the mark is damaged")
                continue
            self.known.update(mark.files)
            found = ((k, damage(k, map_file(self.folder / k), e)) for k, e in mark.files.items())
            bad = [(k, kind) for k, kind in found if kind is not None]
            for name, kind in bad:
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
            self.withdrawn.add(key)

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
        files = [name for name in table.keys(checkpoint, chunk) if name in self.listed]
        self.known.update(files)
        if key in self.known:
            taken = key in self.bad or key in self.withdrawn
            if not taken and table.mark(checkpoint, chunk) is None:
                yield self._bad_mark(key, "the mark is for other rows than these")
        elif files:
            yield self._fault(key, "unmarked", "files are there, but no mark says they are whole")
        else:
            yield self._fault(key, "missing", "this chunk is not computed yet")

    def _others(self) -> Iterator[Fault]:
        """Every file nobody vouches for."""
        for key in self.listed:
            if key in self.known:
                continue
            if key.endswith(TMP):
                yield self._fault(key, "unmarked", "left by an interrupted write", _DELETE)
            elif self.ready:
                yield self._fault(key, "unmarked", "no mark names this file", "delete it")
