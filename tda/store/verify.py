"""Reading everything that is stored, and naming what is not as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tda.errors import StoreError
from tda.store.files import TMP, Place, is_writable, list_files, map_file, read_file, stat_file
from tda.store.manifest import (
    NAME,
    bases_digest,
    bases_files,
    cure,
    read_manifest,
    redo,
    table_names,
)
from tda.store.marks import (
    FOLDER,
    STATIC,
    Damage,
    Entry,
    Mark,
    chunk_mark,
    damage,
    is_document,
    read_mark,
    remove_mark,
)
from tda.store.table import Table

_WHAT = {
    "missing": "the file is gone",
    "torn": "the file has another size than when it was finished",
    "altered": "the checksum does not match",
}
_DELETE = "rerun `tda index`, which finishes or removes what an interrupted run left, or delete it"


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
    there = table_names(run)
    for name in sorted(manifest.get("data", {}).keys() - set(there)):
        faults.append(Fault(f"{name}/{STATIC}", "missing", "the table is gone", redo(name)))
    for name in there:
        faults += _table_faults(run, name, len(manifest["checkpoints"]), withdraw)
    return sorted(faults, key=lambda fault: (fault.path, fault.kind))


def _bases_faults(run: Place, manifest: Mapping[str, Any]) -> Iterator[Fault]:
    """A projection fitted to the data has files; their digests are part of the manifest."""
    do = "restore the file from a copy, or index again into a new folder"
    for name, digest in bases_files(manifest).items():
        data = read_file(run / name)
        if data is None:
            yield Fault(name, "missing", _WHAT["missing"], do)
        elif bases_digest(data) != digest:
            yield Fault(name, "altered", _WHAT["altered"], do)


def _manifest_faults(run: Place) -> Iterator[Fault]:
    try:
        read_manifest(run)
    except StoreError as error:
        gone = stat_file(run / NAME) is None
        kind: Literal["missing", "altered"] = "missing" if gone else "altered"
        yield Fault(NAME, kind, error.what, error.do or "")
    if stat_file(run / (NAME + TMP)) is not None:
        yield Fault(NAME + TMP, "unmarked", "left by an interrupted write", _DELETE)


class FolderCheck:
    """A folder whose files are vouched for by marks in ``done/``."""

    def __init__(self, run: Place, name: str, withdraw: bool, do: str) -> None:
        self.run, self.name, self.folder = run, name, run / name
        writable = is_writable(self.folder / FOLDER)
        self.withdraw = withdraw and writable
        self.do = do
        if withdraw and not writable:
            self.do = f"make the folder writable, {cure(run, name)}"
        self.known: set[str] = set()  # files that have been accounted for
        self.bad: set[str] = set()  # marks that have been reported
        self.withdrawn: set[str] = set()
        self.listed = list_files(self.folder)

    def fault(self, key: str, kind: Any, what: str, do: str | None = None) -> Fault:
        return Fault(f"{self.name}/{key}", kind, what, self.do if do is None else do)

    def marked(self) -> Iterator[Fault]:
        """Every mark, and every file a mark names. Needs nothing else to be intact."""
        for key in self.listed:
            folder, _, name = key.partition("/")
            if folder != FOLDER or is_document(name) or not name.endswith(".json"):
                continue
            self.known.add(key)
            mark = _mark(self.folder / key)
            if mark is None:
                yield self.bad_mark(key, "the mark is damaged")
                continue
            self.known.update(mark.files)
            found = ((k, _damage(self.folder, k, e)) for k, e in mark.files.items())
            bad = [(k, kind) for k, kind in found if kind is not None]
            for name, kind in bad:
                yield self.fault(name, kind, _WHAT[kind])
            if bad:
                self._take_back(key)

    def bad_mark(self, key: str, what: str) -> Fault:
        self._take_back(key)
        self.bad.add(key)
        return self.fault(key, "altered", what)

    def _take_back(self, key: str) -> None:
        if self.withdraw:
            remove_mark(self.folder, key)
            self.withdrawn.add(key)

    def stands(self, key: str) -> bool:
        """Whether a mark is there and nothing has been said against it."""
        return key in self.known and key not in self.bad and key not in self.withdrawn

    def others(self, complete: bool) -> Iterator[Fault]:
        """Every file nobody vouches for; ``complete``: all that should be known is."""
        for key in self.listed:
            if key in self.known:
                continue
            if key.endswith(TMP):
                yield self.fault(key, "unmarked", "left by an interrupted write", _DELETE)
            elif complete:
                yield self.fault(key, "unmarked", "no mark names this file", "delete it")


def _mark(place: Place) -> Mark | None:
    try:
        return read_mark(place)
    except StoreError:  # a link, a device, far too large
        return None


def _damage(folder: Place, key: str, entry: Entry) -> Damage | None:
    try:
        return damage(key, map_file(folder / key), entry)
    except StoreError:
        return "altered"


def _table_faults(run: Place, name: str, num_checkpoints: int, withdraw: bool) -> Iterator[Fault]:
    check = FolderCheck(run, name, withdraw, redo(name))
    marked = list(check.marked())
    yield from marked
    try:
        table = Table(run, name)
        table.column("digest")
    except StoreError as error:
        if STATIC not in check.known:
            yield check.fault(STATIC, "missing", "the table is not planned to the end")
        elif not marked and str(error.where).startswith(str(check.folder)):
            # Whole, but nothing this program wrote.
            yield check.bad_mark(STATIC, error.what)
        yield from check.others(complete=False)
        return
    rows = table.specs["rows"]
    if rows.shape[0] != num_checkpoints:
        yield check.fault(rows.document_key, "altered", "the array lacks a checkpoint")
    for checkpoint in range(table.num_checkpoints):
        for chunk in range(table.num_chunks):
            yield from _chunk_faults(check, table, checkpoint, chunk)
    yield from check.others(complete=True)


def _chunk_faults(check: FolderCheck, table: Table, checkpoint: int, chunk: int) -> Iterator[Fault]:
    key = chunk_mark(checkpoint, chunk)
    files = [name for name in table.keys(checkpoint, chunk) if name in check.listed]
    check.known.update(files)
    if key in check.known:
        if check.stands(key) and table.mark(checkpoint, chunk) is None:
            yield check.bad_mark(key, "the mark is for other rows than these")
    elif files:
        yield check.fault(key, "unmarked", "files are there, but no mark says they are whole")
    else:
        yield check.fault(key, "missing", "this chunk is not computed yet")
