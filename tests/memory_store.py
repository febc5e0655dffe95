"""A run held in memory, with the reading half of the store's interface: rows made, not indexed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import torch
from torch import Tensor

from tda.errors import StoreError


@dataclass(frozen=True)
class MemoryTable:
    """rows [C, n, k]; columns slope, curvature [C, n]; ``reads`` counts the rows read in order."""

    name: str
    values: np.ndarray
    columns: dict[str, np.ndarray]
    chunk_rows: int = 7
    reads: list[int] = field(default_factory=list)

    dtype = "float32"

    @property
    def num_checkpoints(self) -> int:
        return self.values.shape[0]

    @property
    def num_rows(self) -> int:
        return self.values.shape[1]

    @property
    def dim(self) -> int:
        return self.values.shape[2]

    def rows(self, checkpoint: int, start: int, stop: int) -> Tensor:
        self.reads.append(stop - start)
        return torch.from_numpy(self.values[checkpoint, start:stop].astype(np.float32))

    def coded_rows(self, checkpoint: int, start: int, stop: int) -> tuple[Tensor, None]:
        return self.rows(checkpoint, start, stop), None

    def gather(self, checkpoint: int, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(self.values[checkpoint, indices].astype(np.float32))

    def column(self, name: str) -> np.ndarray:
        if name == "id":
            return np.array([f"{self.name}-{i}" for i in range(self.num_rows)])
        return self.columns[name].astype(np.float32)

    def entries(self, name: str, indices: np.ndarray) -> np.ndarray:
        return self.column(name)[indices]

    def require_complete(self) -> None:
        """Rows in memory are all there."""


@dataclass(frozen=True)
class MemoryStore:
    """Tables by name under a manifest; ``mark`` writes the marks that allow a cache."""

    path: Path
    manifest: dict[str, Any]
    tables: dict[str, MemoryTable]

    def table(self, name: str) -> MemoryTable:
        if name not in self.tables:
            raise StoreError("there is no such table", where=name)
        return self.tables[name]

    @property
    def train(self) -> MemoryTable:
        return self.tables["train"]

    @property
    def queries(self) -> MemoryTable:
        return self.tables["queries/q"]

    def with_train(self, **changes: Any) -> MemoryStore:
        changed = replace(self.train, reads=[], **changes)
        return replace(self, tables={**self.tables, "train": changed})

    def with_manifest(self, **changes: Any) -> MemoryStore:
        return replace(self, manifest={**self.manifest, **changes})

    def with_checkpoints(self, *changes: dict[str, Any]) -> MemoryStore:
        """Every checkpoint's record changed by its own dict."""
        records = zip(self.manifest["checkpoints"], changes, strict=True)
        return self.with_manifest(checkpoints=[{**record, **new} for record, new in records])

    def with_curvature(self, num_rows: int = 60) -> MemoryStore:
        """With a table of Gauss–Newton rows, weighted."""
        rng = np.random.default_rng(9)
        shape = (self.train.num_checkpoints, num_rows)
        spread = np.exp(rng.normal(size=(len(self.train.values), 1, self.train.dim)))
        rows = (rng.normal(size=(*shape, self.train.dim)) * spread).astype(np.float32)
        weights = rng.uniform(0, 1, shape).astype(np.float32)
        table = MemoryTable("curvature", rows, {"curvature": weights}, self.train.chunk_rows)
        return replace(self, tables={**self.tables, "curvature": table})

    def mark(self) -> MemoryStore:
        for name, table in self.tables.items():
            done = self.path / name / "done"
            done.mkdir(parents=True, exist_ok=True)
            for c, rows in enumerate(table.values):
                digest = hashlib.sha256(rows.tobytes()).hexdigest()
                (done / f"c{c}-0.json").write_text(json.dumps({"config": digest}))
        return self


def make_store(
    path: Path,
    *,
    num_checkpoints: int = 2,
    num_train: int = 40,
    num_queries: int = 6,
    dim: int = 12,
    has_margin: bool = True,
    chunk_rows: int = 7,
    seed: int = 0,
) -> MemoryStore:
    """Random rows with the columns of a log-odds measurement (or of a loss, without a margin)."""
    rng = np.random.default_rng(seed)

    def table(name: str, n: int) -> MemoryTable:
        shape = (num_checkpoints, n)
        spread = np.exp(rng.normal(size=(num_checkpoints, 1, dim)))  # an uneven spectrum
        values = (rng.normal(size=(*shape, dim)) * spread).astype(np.float32)
        p = rng.uniform(0.05, 0.95, shape)
        slope, link = -(1 - p), p * (1 - p)
        if not has_margin:
            slope, link = rng.normal(size=shape), np.ones(shape)
        columns = {"slope": slope.astype(np.float32), "curvature": link.astype(np.float32)}
        return MemoryTable(name, values, columns, chunk_rows)

    manifest = {
        "layers": [
            {"name": name, "offset": low, "size": high - low}
            for name, low, high in (("first", 0, 3), ("middle", 3, 7), ("last", 7, dim))
        ],
        "projection": {"kind": "identity", "dim": dim},
        "measurement": {"name": "made", "digest": "0", "has_margin": has_margin},
        "checkpoints": [
            {
                "name": f"step {c}",
                "step": 10 * (c + 1),
                "learning_rate": 0.1 / (c + 1),
                "digest": f"{seed}/{c}",
            }
            for c in range(num_checkpoints)
        ],
    }
    tables = {"train": table("train", num_train), "queries/q": table("queries/q", num_queries)}
    return MemoryStore(path, manifest, tables)


def exact_rows(store: MemoryStore, name: str = "train") -> list[naive.Rows]:
    """A table's rows as the oracle takes them, float64."""
    table = store.table(name)
    has_margin = store.manifest["measurement"]["has_margin"]
    found = []
    for c, values in enumerate(table.values.astype(np.float64)):
        slope = table.columns["slope"][c].astype(np.float64)
        found.append(
            naive.Rows(
                df=values,
                dl=slope[:, None] * values,
                loss=np.zeros(len(values)),
                p=1 + slope if has_margin else np.full(len(values), np.nan),
                curvature=table.columns["curvature"][c].astype(np.float64),
                has_margin=has_margin,
            )
        )
    return found
