"""Bringing a table into being, or to what it should be now.

A plan is a pure function of the manifest and the examples. Planning writes whatever of it is not
there yet, so it begins, resumes, appends and repairs alike; its mark (``done/static.json``) is
taken away first and comes back last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tda.errors import DataError, MismatchError, StoreError
from tda.examples import Examples
from tda.store.arrays import OWN, ArraySpec, group_document, layout
from tda.store.encoding import encode_column
from tda.store.files import Place, Remote, list_files, remove_file
from tda.store.manifest import CURVATURE, QUERIES, TRAIN, dtype_of_rows, read_manifest
from tda.store.marks import (
    STATIC,
    Entry,
    Mark,
    chunk_mark,
    have_sizes,
    is_document,
    remove_mark,
    write_chunks,
    write_documents,
    write_mark,
)
from tda.store.table import Table

Static = dict[str, tuple[np.ndarray, str]]

# ``text``, ``image`` and ``row`` show the content, of which the digest is compared.
_COMPARED = ("digest", "label", "source", "group")
_AXES = {TRAIN: "train", QUERIES: "query", CURVATURE: "row"}
_RESERVED = {"rows", "scale", "embedding", "done", *OWN}


def plan_table(
    run: Place,
    manifest: Mapping[str, Any],
    name: str,
    examples: Examples,
    hidden: int | None,
    changed: bool,
) -> Table:
    """The table ``name`` of these examples, created, appended to, repaired or as it was.

    changed: fewer than half of them may be others than were stored in their places.
    Raises MismatchError if it holds other examples, DataError for what cannot be stored.
    """
    if len(examples) == 0:
        raise DataError(f"the data set of {name!r} is empty", wanted="at least one example")
    static = _encode(examples)
    stored = _stored(run, name)
    chunk_rows = manifest["chunk_rows"]
    if stored is not None:
        (_require_alike if changed else _require_same)(stored, examples, hidden)
        chunk_rows = stored.chunk_rows
        if "input_digest" not in stored.specs:  # begun before there was one: it goes on as it is
            static.pop("input_digest", None)
    elif name == TRAIN and not changed:
        _require_record(run, manifest, examples)
    else:
        chunk_rows = min(chunk_rows, len(examples))
    specs = layout(
        _AXES[name.partition("/")[0]],
        static,
        len(manifest["checkpoints"]),
        chunk_rows,
        manifest["projection"]["dim"],
        dtype_of_rows(manifest, name),
        hidden,
    )
    if not changed and stored is not None and stored.specs == specs and _has_files(stored):
        return stored
    return _settle(run, name, specs, static, examples, {} if stored is None else _there(stored))


def grow_checkpoints(table: Table, num_checkpoints: int) -> None:
    """Make room for more checkpoints. Existing chunks stay as they are."""
    for name, spec in table.specs.items():
        if spec.per_checkpoint:
            table.specs[name] = replace(spec, shape=(num_checkpoints, *spec.shape[1:]))
    kept = {key: entry for key, entry in table.static.files.items() if not is_document(key)}
    remove_mark(table.folder, STATIC)
    files = {**kept, **_write_documents(table.folder, table.specs)}
    write_mark(table.folder, STATIC, Mark(table.static.rows, table.static.config, files))


def _encode(examples: Examples) -> Static:
    clash = _RESERVED.intersection(examples.columns)
    if clash:
        raise DataError("a column has a name the store needs", found=", ".join(sorted(clash)))
    given = {"id": examples.ids, "digest": examples.digests, **examples.columns}
    if examples.inputs is not None:
        given["input_digest"] = examples.inputs
    for name, values in given.items():
        if len(values) != len(examples):
            raise DataError(
                f"the column {name!r} has another length", found=len(values), wanted=len(examples)
            )
    return {name: encode_column(name, values) for name, values in given.items()}


def _stored(run: Place, name: str) -> Table | None:
    """The table as it is, if what identifies its examples can be read."""
    try:
        table = Table(run, name)
        for column in ("id", *_COMPARED):
            if column in table.columns():
                table.column(column)
    except StoreError:
        return None
    return table


def _has_files(table: Table) -> bool:
    return have_sizes(list_files(table.folder), table.static.files)


def _there(stored: Table) -> dict[str, Entry]:
    """The remote files of the static columns that have their size."""
    if not isinstance(stored.folder, Remote):
        return {}
    listed = list_files(stored.folder)
    files = stored.static.files
    return {key: entry for key, entry in files.items() if have_sizes(listed, {key: entry})}


def _require_same(stored: Table, examples: Examples, hidden: int | None) -> None:
    """Raises MismatchError unless the examples begin with all those stored."""
    n = min(stored.num_rows, len(examples))
    if stored.hidden != hidden:
        raise _mismatch(stored, f"an embedding of width {hidden}", f"width {stored.hidden}")
    here, there = set(examples.columns), set(stored.columns()) - OWN
    if here != there:
        raise _mismatch(stored, f"columns {sorted(here)}", f"columns {sorted(there)}")
    ids = stored.column("id")
    given = {**examples.columns, "digest": examples.digests, "id": examples.ids}
    differs = {
        column: _differs(stored.column(column)[:n], np.asarray(given[column])[:n])
        for column in ("id", *_COMPARED)
        if column in given
    }
    first = {column: int(np.argmax(d)) for column, d in differs.items() if d.any()}
    if first:
        column = min(first, key=first.__getitem__)
        index = first[column]
        is_id = column == "id"
        raise _mismatch(
            stored,
            f"example {index} is {str(examples.ids[index])!r}"
            + ("" if is_id else f", with another {'content' if column == 'digest' else column}"),
            f"{str(ids[index])!r} as it was indexed",
        )
    if len(examples) < stored.num_rows:
        raise _mismatch(
            stored,
            f"{len(examples)} examples",
            f"at least {stored.num_rows}; the first that is absent is {str(ids[n])!r}",
        )


def _require_alike(stored: Table, examples: Examples, hidden: int | None) -> None:
    """Raises MismatchError unless most of the examples are those stored, in their places."""
    n = stored.num_rows
    fewer = len(examples) < n
    count = n if fewer else int(_differs(stored.column("digest"), examples.digests[:n]).sum())
    if stored.hidden != hidden or 2 * count > n:
        raise _mismatch(
            stored,
            f"{len(examples)} examples, {count} of the first {n} with another content",
            f"at least {n}, of which not more than half are others than they were",
        )


def _differs(stored: np.ndarray, given: np.ndarray) -> np.ndarray:
    """[n] bool: where two columns differ; NaN equals NaN, and float64 is compared as stored."""
    if stored.dtype.kind == "f":
        given = given.astype(np.float32)
        same = (stored == given) | (np.isnan(stored) & np.isnan(given))
    else:
        same = np.asarray(stored == given)
        if same.shape != stored.shape:  # columns of other widths
            return np.ones(len(stored), bool)
    return ~same.reshape(len(stored), -1).all(axis=1)


def _require_record(run: Place, manifest: Mapping[str, Any], examples: Examples) -> None:
    """The same when the stored columns cannot be read: then by the digest in the manifest."""
    record = manifest.get("data", {}).get(TRAIN)
    if record is None:
        return
    n = record["num_rows"]
    if len(examples) < n or examples.digest(0, n) != record["digest"]:
        raise _mismatch(
            run / TRAIN,
            f"{len(examples)} examples, digest {examples.digest(0, n)} of the first {n}",
            f"{n} examples of digest {record['digest']}, or more that begin with them",
        )


def _mismatch(table: Table | Place, found: str, wanted: str) -> MismatchError:
    folder = table.folder if isinstance(table, Table) else table
    do = "store changed queries under a new name; queries can only be added at the end"
    if folder.name == TRAIN and folder.parent.name != QUERIES:
        do = (
            "build the data without randomness; `tda relabel` if a few examples were changed in "
            "their places; index other data into a new folder: examples are only added at the end"
        )
        if read_manifest(folder.parent)["data"].get(TRAIN, {}).get("deleted"):
            do = "give the deleted examples too, or `tda compact` the run; " + do
    return MismatchError(
        "these are not the examples this table was made with",
        where=folder,
        found=found,
        wanted=wanted,
        do=do,
    )


def _settle(
    run: Place,
    name: str,
    specs: dict[str, ArraySpec],
    static: Static,
    examples: Examples,
    known: Mapping[str, Entry],
) -> Table:
    folder = run / name
    remove_mark(folder, STATIC)
    files = write_chunks(folder, _static_chunks(specs, static), known)
    files.update(_write_documents(folder, specs))
    _sweep(folder, specs, files)
    write_mark(folder, STATIC, Mark((0, len(examples)), examples.digest(), files))
    table = Table(run, name)
    _withdraw_changed(table)
    return table


def _static_chunks(
    specs: Mapping[str, ArraySpec], static: Static
) -> Iterator[tuple[str, np.ndarray]]:
    for column, (values, _) in static.items():
        spec = specs[column]
        for chunk, start in enumerate(range(0, len(values), spec.chunk_rows)):
            yield spec.key(chunk), spec.pack(values[start : start + spec.chunk_rows])


def _write_documents(folder: Place, specs: Mapping[str, ArraySpec]) -> dict[str, Entry]:
    group = group_document()
    # ``done`` is an empty group too: Zarr warns of folders in a group that are none.
    documents = {"zarr.json": group, "done/zarr.json": group}
    documents |= {spec.document_key: spec.document() for spec in specs.values()}
    return write_documents(folder, documents)


def _sweep(folder: Place, specs: Mapping[str, ArraySpec], files: Mapping[str, Entry]) -> None:
    """Files of an older, differently cut or interrupted version of the static columns."""
    static = {spec.name for spec in specs.values() if not spec.per_checkpoint}
    for key in list_files(folder):
        if key.partition("/")[0] in static and key not in files:
            remove_file(folder / key)


def _withdraw_changed(table: Table) -> None:
    """Take back the marks of chunks whose examples are no longer those they were computed for."""
    listed = list_files(table.folder)
    valid = table.marks(listed)
    for place in table.places():
        if place not in valid and chunk_mark(*place) in listed:
            remove_mark(table.folder, chunk_mark(*place))
