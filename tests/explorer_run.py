"""A run made of known rows, for the tests of the explorer: every score has a closed form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tda
from tda.examples import Examples
from tda.run import Run
from tda.store import Store, Table

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style><!--",
    "{{ 7 * 7 }}{% raw %}",
    "=HYPERLINK(1)",
    "../../etc/passwd",
    "\u202egnp.exe",
    "javascript:alert(1)",
    "]]>&lt;&amp;",
)


@dataclass(frozen=True)
class Known:
    """Rows ∇f [checkpoint, example, proj] float32 and probabilities p [checkpoint, example] of a
    log-odds measurement: slope −(1−p), curvature p(1−p)."""

    rows: np.ndarray
    p: np.ndarray

    @staticmethod
    def draw(num_checkpoints: int, n: int, dim: int, seed: int) -> Known:
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(num_checkpoints, n, dim)).astype(np.float32)
        return Known(rows, rng.uniform(0.05, 0.95, (num_checkpoints, n)).astype(np.float32))

    @property
    def gradients(self) -> np.ndarray:
        """∇ℓ = −(1−p)·∇f, float64."""
        return -(1 - self.p.astype(np.float64))[..., None] * self.rows.astype(np.float64)

    def write(self, table: Table) -> None:
        for checkpoint, chunk in table.missing():
            part = checkpoint, slice(*table.chunk_range(chunk))
            p = self.p[part]
            columns = {
                "loss": -np.log(p),
                "p": p,
                "slope": p - 1,
                "curvature": p * (1 - p),
                "grad_norm": np.linalg.norm(self.rows[part], axis=1),
            }
            table.write(checkpoint, chunk, self.rows[part], columns)


def manifest(dim: int, num_checkpoints: int, layers: bool, chunk_rows: int) -> dict[str, Any]:
    half = dim // 2
    kept = [{"name": "first", "offset": 0, "size": half}]
    kept += [{"name": HOSTILE[0], "offset": half, "size": dim - half}]
    return {
        "format": 1,
        "model": {"name": "made", "digest": "m"},
        "checkpoints": [
            {"name": f"step {c}", "step": c + 1, "learning_rate": 0.1, "digest": str(c)}
            for c in range(num_checkpoints)
        ],
        "measurement": {"name": "cross_entropy", "digest": "c", "has_margin": True},
        "projection": {"kind": "kronecker" if layers else "identity", "dim": dim, "seed": 0},
        **({"layers": kept} if layers else {}),
        "dtype": "float32",
        "chunk_rows": chunk_rows,
        "versions": {},
    }


def names(n: int, prefix: str, hostile: bool) -> np.ndarray:
    some = HOSTILE if hostile else (prefix,)
    return np.array([f"{some[i % len(some)]}-{i}" for i in range(n)])


def examples(n: int, prefix: str, shows: str = "text", hostile: bool = False) -> Examples:
    """Examples of four labels and three sources, shown as text, pictures or rows of numbers."""
    rng = np.random.default_rng(n)
    sources = HOSTILE[:3] if hostile else ("alpha", "beta", "gamma")
    columns: dict[str, np.ndarray] = {
        "label": np.arange(n) % 4,
        "source": np.array([sources[i % 3] for i in range(n)]),
    }
    if shows == "text":
        columns["text"] = np.array([f"a text about {name}" for name in names(n, prefix, hostile)])
    if shows == "row":
        columns["row"] = rng.normal(size=(n, 5)).astype(np.float32)
    if shows == "image":
        columns["image"] = rng.integers(0, 256, (n, 6, 6), dtype=np.uint8)
    digests = rng.integers(0, 256, (n, 16), dtype=np.uint8)
    return Examples(names(n, prefix, hostile), digests, columns)


@dataclass(frozen=True)
class Made:
    """A run on disk, and what its rows are."""

    run: Run
    train: Known
    queries: Known

    @property
    def grad_dot(self) -> np.ndarray:
        """mean_c ⟨∇ℓ_q, ∇ℓ_i⟩ [query, train] float64."""
        return np.einsum("cqk,cik->qi", self.queries.gradients, self.train.gradients) / len(
            self.train.rows
        )


def make_run(
    path: Path,
    *,
    num_train: int = 60,
    num_queries: int = 9,
    dim: int = 10,
    num_checkpoints: int = 2,
    layers: bool = True,
    chunk_rows: int = 16,
    shows: str = "text",
    hostile: bool = False,
) -> Made:
    """A finished run with the query set ``test``."""
    store = Store.create(path, manifest(dim, num_checkpoints, layers, chunk_rows))
    train = Known.draw(num_checkpoints, num_train, dim, seed=1)
    queries = Known.draw(num_checkpoints, num_queries, dim, seed=2)
    train.write(store.plan("train", examples(num_train, "train", shows, hostile)))
    queries.write(store.plan("queries/test", examples(num_queries, "test", shows, hostile)))
    return Made(tda.open(path), train, queries)
