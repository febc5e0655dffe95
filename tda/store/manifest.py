"""manifest.json: what a run was made with. Two manifests that differ are two runs.

The file holds the manifest and, under ``crc32c``, the checksum of the rest of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from tda.errors import DataError, MismatchError, StoreError
from tda.store.bounds import DOCUMENT_BYTES
from tda.store.encoding import check_dtype
from tda.store.files import (
    Place,
    list_files,
    list_folders,
    read_file,
    seal,
    to_json,
    unseal,
    write_file,
)

FORMAT = 1
NAME = "manifest.json"
BASES = "projection.npz"
TRAIN = "train"
QUERIES = "queries"
CURVATURE = "curvature"

# "bases", where checkpoints have several: of each, the digest of those its rows are in.
_ROWS_DEPEND_ON = ("format", "model", "measurement", "metric", "projection", "layers")
_ABSENT_MEANS = {"metric": "euclidean"}
_MAY_DIFFER = ("data", "versions", "bases")  # data: checked by plan(), example by example
_QUERY_SET = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
_NEW_FOLDER = "or index into a new folder"
_CURES = {
    "model": f"use the model this run was made with, {_NEW_FOLDER}",
    "checkpoints": "give the same checkpoints in the same order (`tda index` takes more at the end "
    f"of the list), {_NEW_FOLDER}",
    "measurement": f"use the measurement this run was made with, {_NEW_FOLDER}",
    "metric": f"give the Task the metric this run was made with, {_NEW_FOLDER}",
    "projection": f"use the projection this run was made with, {_NEW_FOLDER}",
    "format": "this program writes another format: index again into a new folder",
}


def check_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """``manifest`` as it will be read back. Raises StoreError if a part is absent or wrong."""
    try:
        plain = json.loads(to_json({"format": FORMAT, **manifest}))
    except (TypeError, ValueError) as error:
        raise StoreError("the manifest cannot be written as JSON", found=error) from error
    if plain["format"] != FORMAT:
        raise _other_format(plain["format"], None)
    check_dtype(plain.get("dtype"))
    numbers = {"projection.dim": plain.get("projection", {}).get("dim")}
    numbers["chunk_rows"] = plain.get("chunk_rows")
    numbers["number of checkpoints"] = len(plain.get("checkpoints", []))
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise StoreError(f"the manifest's {name} is no positive number", found=number)
    for checkpoint in plain["checkpoints"]:
        if "name" not in checkpoint or "digest" not in checkpoint:
            raise StoreError("a checkpoint of the manifest lacks its name or digest")
    return plain


def read_manifest(run: Place) -> dict[str, Any]:
    """The manifest of a run. Raises StoreError: none, damaged, or of another format."""
    path = run / NAME
    data = read_file(path, DOCUMENT_BYTES)
    if data is None:
        raise StoreError(
            "there is no run in this folder",
            where=run,
            found=f"no {NAME}",
            do="check the path, or make the run with `tda index`",
        )
    manifest = unseal(data)
    form = _format(data) if manifest is None else manifest.get("format")
    if form not in (FORMAT, None):
        raise _other_format(form, path)
    if manifest is None:
        raise _damaged(path)
    from tda.store.claims import manifest_fault

    fault = manifest_fault(manifest)
    if fault is not None:
        raise StoreError(
            "the manifest makes no sense",
            where=path,
            found=fault,
            do="ask whoever made this run; it was not written by this program",
        )
    return manifest


def _format(data: bytes) -> object:
    """The format number even of a manifest that is sealed in another way, as another may be."""
    try:
        return json.loads(data)["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def write_manifest(run: Place, manifest: Mapping[str, Any]) -> None:
    write_file(run / NAME, seal(manifest))


def _damaged(path: Place) -> StoreError:
    return StoreError(
        "the manifest was altered",
        where=path,
        found="its checksum does not match its content",
        do="restore it from a copy; or delete it and rerun `tda index` with the same model, data "
        "and settings: finished chunks are kept (deleted examples are to be deleted again)",
    )


def _other_format(found: object, path: Place | None) -> StoreError:
    return StoreError(
        "the run has a format this program does not know",
        where=path,
        found=f"format {found}",
        wanted=f"format {FORMAT}",
        do="use the version of tda-engine that wrote it, or index again into a new folder",
    )


def require_same(run: Place, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises MismatchError naming the first field in which two manifests differ."""
    # The metric first: one that needs optimizers makes the checkpoints differ as well.
    fields = ["metric", *given, *(name for name in stored if name not in given)]
    for name in fields:
        if name in _MAY_DIFFER:
            continue
        unsaid = _ABSENT_MEANS.get(name)
        differs = _difference(name, stored.get(name, unsaid), given.get(name, unsaid))
        if differs is not None:
            field, there, here = differs
            raise MismatchError(
                f"this run was made with another {field}",
                where=run,
                found=f"{field} = {here!r}",
                wanted=f"{field} = {there!r}, as the run has it",
                do=_CURES.get(name, f"use the {name} of this run, {_NEW_FOLDER}"),
            )


def _difference(name: str, stored: Any, given: Any) -> tuple[str, Any, Any] | None:
    if isinstance(stored, dict) and isinstance(given, dict):
        pairs = [(f"{name}.{key}", stored.get(key), given.get(key)) for key in {**given, **stored}]
    elif isinstance(stored, list) and isinstance(given, list):
        both = zip(stored, given, strict=False)
        pairs = [(f"{name}[{i}]", there, here) for i, (there, here) in enumerate(both)]
        pairs.append((f"number of {name}", len(stored), len(given)))
    else:
        return None if stored == given else (name, stored, given)
    return next((found for pair in pairs if (found := _difference(*pair))), None)


def dtype_of_rows(manifest: Mapping[str, Any], table: str) -> str:
    """How the rows of a table are stored: those of query sets, which are few, as they are."""
    return "float32" if table.startswith(QUERIES) else str(manifest["dtype"])


def rows_depend_on(manifest: Mapping[str, Any], checkpoint: int) -> dict[str, Any]:
    """The part of a manifest that determines the rows of one checkpoint."""
    parts = {name: manifest[name] for name in _ROWS_DEPEND_ON if name in manifest}
    record = manifest["checkpoints"][checkpoint]
    if "bases" in manifest and (basis := manifest["bases"][checkpoint]) != _first(manifest):
        parts["basis"] = basis
    if "metric" in manifest:
        parts["optimizer"] = record["optimizer_digest"]
    return {**parts, "checkpoint": record["digest"]}


def bases_digest(data: bytes) -> str:
    """Of the bases of a projection, as a manifest has it."""
    return blake2b(data, digest_size=16).hexdigest()


def _first(manifest: Mapping[str, Any]) -> str | None:
    digest: str | None = manifest["projection"].get("bases_digest")
    return digest


def bases_by_checkpoint(manifest: Mapping[str, Any]) -> list[str]:
    """The digest of the bases of every checkpoint; empty where the projection has none."""
    first = _first(manifest)
    same = [] if first is None else [first] * len(manifest["checkpoints"])
    return list(manifest.get("bases", same))


def grown_bases(manifest: Mapping[str, Any], added: str | None) -> dict[str, list[str]]:
    """The manifest's part for one more checkpoint with these bases, where not all have the same."""
    if added is None or ("bases" not in manifest and added == _first(manifest)):
        return {}
    return {"bases": [*bases_by_checkpoint(manifest), added]}


def bases_file(first: str, digest: str) -> str:
    """Where the bases of that digest lie, in a run whose first ones are ``first``."""
    return BASES if digest == first else BASES.replace(".", f"-{digest[:16]}.")


def bases_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """File → digest, the first bases first."""
    first = _first(manifest)
    if first is None:
        return {}
    return {bases_file(first, d): d for d in dict.fromkeys([first, *bases_by_checkpoint(manifest)])}


def entries_of(parts: Mapping[str, Any]) -> dict[str, bytes]:
    """Each entry of an object as it is spelled in the JSON of the whole."""
    return {key: to_json({key: value})[2:-3] for key, value in parts.items()}


def config_hash(entries: Mapping[str, bytes]) -> str:
    """Hash of an object's JSON, put together from its entries: most are the same for all chunks."""
    whole = b"{\n" + b",\n".join(entries[key] for key in sorted(entries)) + b"\n}\n"
    return blake2b(whole, digest_size=16).hexdigest()


def table_names(run: Place) -> list[str]:
    """``train``, ``curvature`` and ``queries/NAME``, those that are there. Raises StoreError."""
    there = list_folders(run)
    sets = {key.partition("/")[0] for key in list_files(run / QUERIES) if "/" in key}
    single = [name for name in (TRAIN, CURVATURE) if name in there]
    return single + [f"{QUERIES}/{name}" for name in sorted(sets)]


def has_table(run: Place, name: str) -> bool:
    return bool(list_folders(run / name))


def check_table_name(name: str) -> str:
    """``name`` if it is ``train``, ``curvature`` or ``queries/NAME``, NAME safe as a folder."""
    folder, _, query_set = name.partition("/")
    if name in (TRAIN, CURVATURE) or (folder == QUERIES and _QUERY_SET.fullmatch(query_set)):
        return name
    raise DataError(
        "this is no name for a query set",
        found=query_set or name,
        wanted="up to 100 of A–Z a–z 0–9 _ . - and no dot in front",
        do="choose another name: what the examples are called does not matter, only this name",
    )


def redo(table: str) -> str:
    """What computes the chunks a table lacks."""
    if table == TRAIN:
        return "rerun `tda index` with the same configuration: it computes only what is missing"
    if table == CURVATURE:
        return (
            "call run.add_curvature(train), or rerun `tda index` with [index] gauss_newton = true"
        )
    name = table.partition("/")[2]
    return f"rerun `tda index`, or add the queries {name!r} again: only what is missing is computed"


def cure(run: Place, table: str) -> str:
    """What to do about a damaged table: find out what is damaged, and compute that again."""
    return f"run `tda verify {run}`, then {redo(table)}"
