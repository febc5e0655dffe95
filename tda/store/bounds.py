"""What marks and arrays of a run may claim: a run may be a stranger's, who seals what he likes.

What passes here cannot make a reader allocate more than the files on the disk hold, nor name a
file outside its table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tda.store.encoding import BLOCKS, DIGESTS, width

if TYPE_CHECKING:
    from tda.store.arrays import ArraySpec

DOCUMENT_BYTES = 32 * 2**20  # of a JSON file; one of an honest run is far smaller
CHUNK_BYTES = 2 * 2**30  # of a chunk file
MOST = 2**40  # of anything that is counted

MOST_CHUNKS = 2**24

_KEY = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.-]+)*|zarr\.json")
_CRC = re.compile(r"[0-9a-f]{8}")
_ENCODINGS = {
    ("uint16", "bfloat16"),
    ("int8", "int8"),
    *(("uint8", dtype) for dtype in BLOCKS),
    ("uint8", "utf-8"),
    ("float32", ""),
    ("uint8", ""),
    ("int64", ""),
}

_STRINGS = {"id", "source", "group", "text", "example"}
_ROWS = {("uint16", "bfloat16"), ("float32", ""), ("int8", "int8"), *(("uint8", b) for b in BLOCKS)}


def is_key(key: object) -> bool:
    """Whether a path names a file inside its table, and nothing else anywhere."""
    if not isinstance(key, str) or len(key) > 500 or not _KEY.fullmatch(key):
        return False
    return not any(part.strip(".") == "" for part in key.split("/"))


def is_mark(parts: Mapping[str, Any]) -> bool:
    """Whether this is the content of a mark, naming files of its table only."""
    rows, config, files = (parts.get(name) for name in ("rows", "config", "files"))
    if set(parts) != {"rows", "config", "files"}:
        return False
    if not isinstance(rows, list) or len(rows) != 2 or not all(map(_is_count, rows)):
        return False
    return (
        isinstance(config, str)
        and isinstance(files, dict)
        and all(is_key(key) and _is_entry(entry) for key, entry in files.items())
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"size", "crc32c"}:
        return False
    crc = entry["crc32c"]
    return _is_count(entry["size"]) and isinstance(crc, str) and bool(_CRC.fullmatch(crc))


def array_fault(spec: ArraySpec) -> str | None:
    """What is wrong with an array, or None."""
    sizes = (*spec.shape, *spec.chunks)
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        return "sizes are no whole numbers"
    if not (len(spec.shape) == len(spec.chunks) == len(spec.axes)) or not spec.shape:
        return "shape, chunks and axes are not of one rank"
    if not all(isinstance(axis, str) for axis in spec.axes):
        return "an axis without a name"
    if not all(1 <= size <= MOST for size in sizes):
        return f"shape {list(spec.shape)}, chunks {list(spec.chunks)}"
    if (spec.dtype, spec.encoding) not in _ENCODINGS:
        return f"type {spec.dtype!r} encoded as {spec.encoding!r}"
    cut = 2 if spec.per_checkpoint else 1
    if spec.chunks[cut:] != spec.shape[cut:] or (spec.per_checkpoint and spec.chunks[0] != 1):
        return f"shape {list(spec.shape)} cut into {list(spec.chunks)}"
    if len(spec.shape) < cut or spec.num_bytes > CHUNK_BYTES:
        return f"chunks {list(spec.chunks)} of {spec.dtype}"
    return None


def table_fault(
    specs: Mapping[str, ArraySpec], sizes: Mapping[str, int], dim: int, dtype: str
) -> str | None:
    """What is wrong with the arrays of a table, or None. sizes: bytes of its marked files by key;
    dim, dtype: of a row, as the manifest has them.

    All are of the same examples and checkpoints, and where a mark lists the chunks of an array, it
    lists as many as its shape has: so a shape is never larger than the files are.
    """
    if "rows" not in specs or "id" not in specs or "digest" not in specs:
        return f"it lacks rows, id or digest: {', '.join(sorted(specs))[:100]}"
    rows = specs["rows"]
    if not rows.per_checkpoint or len(rows.shape) != 3 or (rows.dtype, rows.encoding) not in _ROWS:
        return f"rows are {rows.dtype} of shape {list(rows.shape)}"
    if (rows.encoding or "float32") != dtype:
        return f"rows are {rows.encoding or 'float32'}, and the manifest says {dtype}"
    if rows.shape[2] != width(dim, dtype):
        return f"rows of shape {list(rows.shape)} do not hold {dim} numbers each"
    if (rows.encoding == "int8") != ("scale" in specs):
        return "int8 rows, and no others, have a scale"
    if rows.shape[0] * -(-rows.shape[1] // rows.chunk_rows) > MOST_CHUNKS:
        return f"rows of shape {list(rows.shape)} in chunks of {rows.chunk_rows}"
    for name, spec in specs.items():
        if spec.per_checkpoint:
            if name not in ("rows", "embedding") and (len(spec.shape), spec.dtype) != (
                2,
                "float32",
            ):
                return f"{name} is {spec.dtype} of shape {list(spec.shape)}"
            if name == "embedding" and (len(spec.shape), spec.encoding) != (3, "bfloat16"):
                return f"{name} is {spec.dtype} of shape {list(spec.shape)}"
            if spec.shape[:2] != rows.shape[:2] or spec.chunks[:2] != rows.chunks[:2]:
                return f"{name} is cut into other examples than rows"
            continue
        if (spec.encoding == "utf-8") < (name in _STRINGS):
            return f"{name} is no string"
        if name == "weight" and (len(spec.shape), spec.dtype) != (1, "float32"):
            return f"weight is {spec.dtype} of shape {list(spec.shape)}"
        if spec.shape[0] != rows.shape[1]:
            return f"{name} has {spec.shape[0]} examples, rows have {rows.shape[1]}"
        count = -(-spec.shape[0] // spec.chunk_rows)
        if count > len(sizes):
            return f"{name} has {count} chunks, and its mark lists {len(sizes)} files"
        if any(sizes.get(spec.key(chunk)) != spec.num_bytes + 4 for chunk in range(count)):
            return f"the mark does not list the {count} chunks of {name}"
    digests = [specs[name] for name in DIGESTS if name in specs]
    if any(spec.shape[1:] != (16,) or spec.dtype != "uint8" for spec in digests):
        return f"digests have the shape {[list(spec.shape) for spec in digests]}"
    return None
