"""What a table holds: its Zarr arrays, the key of each chunk, and the bytes of one chunk.

Zarr makes the metadata documents (``zarr.json``), so any Zarr reader opens the arrays. Chunk files
are written and read here: Zarr's own reader takes a missing chunk for fill values, its writer does
not flush, leaves randomly named files behind when killed, and has to read what it half replaces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tda.store.bounds import array_fault
from tda.store.encoding import BLOCKS, DIGESTS, width

COLUMNS = ("loss", "p", "slope", "curvature", "grad_norm")  # one number an example and checkpoint
OWN = {"id", *DIGESTS, *COLUMNS}  # of the store; all others are what rides along
CHECKPOINT = "checkpoint"

_FILL = {"uint16": 0x7FC0, "float32": np.nan, "int8": 0, "uint8": 0, "int64": 0}  # 0x7FC0: bf16 NaN
_BLOCK_FILL = 0xFF  # a scale of 0xFFFF is a NaN
_AXES = {
    "label": ("class",),
    **dict.fromkeys(DIGESTS, ("byte",)),
    "image": ("height", "width", "channel"),
    "row": ("feature",),
}
_STATIC_CHUNK = 16 * 2**20  # bytes; pictures and texts may be far larger than rows


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array: little-endian C-order chunks followed by their crc32c."""

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]
    encoding: str = ""

    @property
    def per_checkpoint(self) -> bool:
        return self.axes[0] == CHECKPOINT

    @property
    def chunk_rows(self) -> int:
        return self.chunks[1 if self.per_checkpoint else 0]

    @cached_property
    def stored(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @cached_property
    def num_bytes(self) -> int:
        """Of one chunk, without its checksum. Each chunk is whole: the last one is padded."""
        return int(np.prod(self.chunks)) * self.stored.itemsize

    @property
    def fill(self) -> float:
        return _BLOCK_FILL if self.encoding in BLOCKS else _FILL[self.dtype]

    @property
    def document_key(self) -> str:
        return f"{self.name}/zarr.json"

    def key(self, *grid: int) -> str:
        """File of chunk ``(checkpoint, chunk)`` or ``(chunk,)``; the other axes are not cut."""
        place = (*grid, *[0] * (len(self.shape) - len(grid)))
        return f"{self.name}/c/{'/'.join(map(str, place))}"

    def pack(self, values: np.ndarray) -> np.ndarray:
        """The chunk that begins with ``values [r, ...]``, padded with the fill value."""
        if len(values) == self.chunk_rows:
            return np.ascontiguousarray(values, self.stored).reshape(self.chunks)
        whole = np.full(self.chunks, self.fill, self.stored)
        rows = whole[0] if self.per_checkpoint else whole
        rows[: len(values)] = values
        return whole

    def unpack(self, data: np.ndarray) -> np.ndarray:
        """``[chunk_rows, ...]``, a view of the bytes of a chunk (without its checksum)."""
        values = data.view(self.stored).reshape(self.chunks)
        return values[0] if self.per_checkpoint else values

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.chunk_rows

    def unpack_rows(self, data: np.ndarray) -> np.ndarray:
        """``[r, ...]`` of the bytes ``[r, row_bytes]`` of some rows of a chunk."""
        shape = self.chunks[2 if self.per_checkpoint else 1 :]
        return data.view(self.stored).reshape(len(data), *shape)

    def document(self) -> bytes:
        """The array's ``zarr.json``."""
        import zarr  # 0.3 s, needed only when a table is planned
        from zarr.codecs import BytesCodec, Crc32cCodec

        documents: dict = {}
        zarr.create_array(
            documents,
            name=self.name,
            shape=self.shape,
            chunks=self.chunks,
            dtype=self.dtype,
            fill_value=self.fill,
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            filters=None,
            dimension_names=self.axes,
            attributes={"encoding": self.encoding} if self.encoding else {},
        )
        return documents[self.document_key].to_bytes()

    @staticmethod
    def parse(name: str, document: bytes) -> ArraySpec:
        """The array a ``zarr.json`` written by :meth:`document` describes.

        Raises ValueError for one that this never wrote, or that makes no sense.
        """
        try:
            parts = json.loads(document)
            spec = ArraySpec(
                name,
                tuple(parts["shape"]),
                tuple(parts["chunk_grid"]["configuration"]["chunk_shape"]),
                parts["data_type"],
                tuple(parts["dimension_names"]),
                parts["attributes"].get("encoding", ""),
            )
            fault = array_fault(spec)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}"[:100]) from error
        if fault is not None:
            raise ValueError(fault)
        return spec


def group_document() -> bytes:
    """The ``zarr.json`` of a group."""
    import zarr

    documents: dict = {}
    zarr.create_group(documents)
    return documents["zarr.json"].to_bytes()


def layout(
    axis: str,
    static: Mapping[str, tuple[np.ndarray, str]],
    num_checkpoints: int,
    chunk_rows: int,
    dim: int,
    dtype: str,
    hidden: int | None,
) -> dict[str, ArraySpec]:
    """The arrays of a table, by name.

    axis: train or query; static: what is known without the model, name → (values, encoding).
    All arrays with a checkpoint axis are cut at the same rows: a chunk of a checkpoint owns whole
    files, so it has one writer.
    """
    n = len(static["id"][0])
    c, axes = num_checkpoints, (CHECKPOINT, axis)
    stored = {"bfloat16": "uint16", **dict.fromkeys(BLOCKS, "uint8")}.get(dtype, dtype)
    encoding = "" if dtype == "float32" else dtype
    rows, last = (1, chunk_rows), width(dim, dtype)
    along = (*axes, "byte" if dtype in BLOCKS else "proj")
    specs = [ArraySpec("rows", (c, n, last), (*rows, last), stored, along, encoding)]
    specs += [ArraySpec(name, (c, n), rows, "float32", axes) for name in COLUMNS]
    if dtype == "int8":
        specs.append(ArraySpec("scale", (c, n), rows, "float32", axes))
    if hidden is not None:
        shape, along = (c, n, hidden), (*axes, "hidden")
        specs.append(ArraySpec("embedding", shape, (*rows, hidden), "uint16", along, "bfloat16"))
    for name, (values, coded) in static.items():
        specs.append(_static(name, values, coded, axis, chunk_rows))
    return {spec.name: spec for spec in specs}


def _static(name: str, values: np.ndarray, coded: str, axis: str, chunk_rows: int) -> ArraySpec:
    one = max(1, values.nbytes // max(1, len(values)))
    rows = max(1, min(len(values), chunk_rows, _STATIC_CHUNK // one))
    axes = (axis, "byte") if coded else (axis, *_AXES.get(name, ("value",))[: values.ndim - 1])
    return ArraySpec(name, values.shape, (rows, *values.shape[1:]), values.dtype.name, axes, coded)
