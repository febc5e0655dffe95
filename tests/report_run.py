"""A run without a model, and a page read back: what the tests of the report stand on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

from tda import valuation
from tda.recipes import get_recipe
from tda.report.findings import Findings
from tda.scorer import Prepared
from tda.valuation.duplicates import Pairs

# ---- a run without a model


@dataclass
class FakeTable:
    """A stored table as the report sees it: columns by name."""

    held: dict[str, np.ndarray]

    @property
    def num_rows(self) -> int:
        return len(self.held["id"])

    def columns(self) -> list[str]:
        return list(self.held)

    def column(self, name: str) -> np.ndarray:
        return self.held[name]

    def entries(self, name: str, indices: Any) -> np.ndarray:
        return self.held[name][indices]


@dataclass
class FakeStore:
    path: Path
    tables: dict[str, FakeTable]
    manifest: dict[str, Any]

    def table(self, name: str) -> FakeTable:
        return self.tables[name]


@dataclass
class FakeRanking:
    ids: np.ndarray
    indices: np.ndarray
    scores: np.ndarray


@dataclass
class FakeTopK:
    proponents: FakeRanking
    opponents: FakeRanking


@dataclass
class FakeRows:
    """The columns of a score matrix [query, train], as rows of training examples."""

    matrix: np.ndarray
    num_checkpoints = 2
    chunk_rows = 64
    dtype = "float32"

    @property
    def num_rows(self) -> int:
        return self.matrix.shape[1]

    @property
    def dim(self) -> int:
        return self.matrix.shape[0]

    def rows(self, checkpoint: int, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self.matrix[:, start:stop].T.copy())

    def coded_rows(self, checkpoint: int, start: int, stop: int) -> tuple[torch.Tensor, None]:
        return self.rows(checkpoint, start, stop), None

    def gather(self, checkpoint: int, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.matrix[:, indices].T.copy())


@dataclass
class FakeRun:
    """A finished run whose scores are a matrix in memory."""

    store: FakeStore
    matrix: np.ndarray  # [query, train]
    cosine: np.ndarray  # [query, train]
    itself: np.ndarray  # [train]
    queries: list[str] = field(default_factory=lambda: ["test"])

    def recipe(self, recipe: Any) -> Any:
        return get_recipe(recipe)

    def prepare(self, name: str, recipe: Any) -> Prepared:
        """score[q, i] = ⟨e_q, column i of the matrix⟩, half of it from either checkpoint."""
        other = self.matrix if getattr(recipe, "name", recipe) == "influence" else self.cosine
        rows = FakeRows(other)
        chosen = get_recipe(recipe)
        half = torch.eye(rows.dim) / 2
        return Prepared(chosen, rows, (half, half), torch.ones(2, rows.num_rows))

    def top_k(self, queries: Any, k: int, recipe: Any = None) -> FakeTopK:
        return FakeTopK(self._ranking(-self.matrix, k), self._ranking(self.matrix, k))

    def baseline_top_k(self, name: str, k: int, only: Any) -> FakeTopK:
        cosine = self.cosine[only]
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        near = FakeRanking(self._ids(order), order, np.take_along_axis(cosine, order, 1))
        return FakeTopK(near, near)

    def self_influence(self, recipe: Any) -> np.ndarray:
        return self.itself

    def _ranking(self, by: np.ndarray, k: int) -> FakeRanking:
        order = np.argsort(by, axis=1, kind="stable")[:, :k]
        return FakeRanking(self._ids(order), order, np.take_along_axis(self.matrix, order, 1))

    def _ids(self, order: np.ndarray) -> np.ndarray:
        return self.store.table("train").column("id")[order]


MANIFEST = {
    "format": 1,
    "model": {"class": "Sequential", "num_parameters": 4810, "digest": "9f" * 16},
    "checkpoints": [
        {"name": "epoch-2", "step": 90, "learning_rate": 0.05, "digest": "ab" * 16},
        {"name": "epoch-8", "step": 360, "learning_rate": 0.01, "digest": "cd" * 16},
    ],
    "measurement": {"name": "cross_entropy", "digest": "ef" * 16, "has_margin": True},
    "projection": {"kind": "count_sketch", "dim": 1024, "seed": 0},
    "dtype": "bfloat16",
    "chunk_rows": 512,
    "data": {"train": {"num_rows": 1437, "digest": "01" * 16}},
    "versions": {"python": "3.11", "torch": "2.13.0", "zarr": "3.1.6"},
}


@cache
def _digits() -> Any:
    return load_digits()


def digits_run(path: Path, num_train: int = 200, num_queries: int = 40) -> FakeRun:
    """Digits, with scores that a pixel-space kernel and the labels make plausible."""
    data = _digits()
    generator = np.random.default_rng(0)
    order = generator.permutation(len(data.target))[: num_train + num_queries]
    pictures = (data.images[order] * 255 / 16).astype(np.uint8)
    labels = data.target[order].astype(np.int64)
    x = data.data[order]
    x = (x - x.mean(0)) / np.linalg.norm(x - x.mean(0), axis=1, keepdims=True)
    train, query = slice(0, num_train), slice(num_train, None)
    wrong = generator.choice(num_train, num_train // 40, replace=False)
    true = labels.copy()
    labels[wrong] = (labels[wrong] + generator.integers(1, 10, wrong.size)) % 10

    cosine = (x[query] @ x[train].T).astype(np.float32)
    agree = np.where(true[query, None] == labels[None, train], 1.0, -0.35)
    hardness = generator.gamma(0.6, 1.0, num_train + num_queries)
    hardness[wrong] += 6
    matrix = (4e-4 * np.maximum(cosine, 0) ** 4 * agree * (hardness[train] + 0.02)).astype("f4")
    loss = np.stack([hardness * 1.6 + 0.01, hardness + 1e-3]).astype("f4")

    def table(part: slice, prefix: str) -> FakeTable:
        count = len(labels[part])
        source = np.array([("scan-a", "scan-b", "forms")[i % 3] for i in range(count)])
        return FakeTable(
            {
                "id": np.array([f"{prefix}-{i:04d}" for i in range(count)]),
                "digest": np.arange(count * 16, dtype=np.uint8).reshape(count, 16),
                "label": labels[part],
                "source": source,
                "image": pictures[part],
                "loss": loss[:, part],
                "p": np.exp(-loss[:, part]),
            }
        )

    tables = {"train": table(train, "train"), "queries/test": table(query, "test")}
    itself = (3e-3 * hardness[train] ** 1.5 * generator.gamma(4, 0.25, num_train)).astype("f4")
    return FakeRun(FakeStore(path, tables, MANIFEST), matrix, cosine, itself)


def fake_find(
    run: Any, query_name: str, recipe: Any, self_influence: np.ndarray, with_knn: bool = True
) -> Findings:
    """What `tda.report.findings.find` would find: three replicates around the matrix's sums, wrong
    labels by neighbours in the cosines, a pair of copies, and a leak."""
    train, queries = run.store.table("train"), run.store.table(f"queries/{query_name}")
    count = train.num_rows
    total = run.matrix.sum(0, dtype=np.float64)
    shift = np.random.default_rng(1).normal(size=count) * 0.2 * np.abs(total).max()
    replicates = np.stack([total - shift, total, total + shift])[:, None]
    ids, asked = train.column("id"), queries.column("id")
    labels = train.held.get("label")
    near = valuation.neighbours(run.cosine.T, 15)
    classes = labels is not None and labels.dtype.kind != "f"
    one = np.ones(1)
    pairs = Pairs(np.array([0]), np.array([1]), 0.999 * one, 0.998 * one, one > 2, one > 2)
    two = np.array([0, 1])
    copies = valuation.DuplicateGroups(two, two * 0, two * 0, two > 5, ids, pairs)
    leak = Pairs(np.array([0]), np.array([2]), one, one, one > 0, one > 0)
    return Findings(
        values=valuation.Values(
            ids, ("all",), np.array([queries.num_rows]), replicates, None, False, "influence"
        ),
        suspects=valuation.mislabelled(labels, near, self_influence) if classes else None,
        outliers=valuation.outliers(near, labels if classes else None),
        copies=copies,
        leakage=valuation.Leakage(leak, asked, ids, queries.num_rows),
        stability=(0.8, 0.9, 0.7),
        projection=0.9,
        knn=total + shift,
        num_knn_queries=queries.num_rows,
        damping=(0.25, 0.125),
    )


# ---- reading a page back

VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """A page's elements, its text, and whether every element is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text += data

    def tags(self) -> Counter[str]:
        return Counter(tag for tag, _ in self.elements)

    def attributes(self, *names: str) -> list[str]:
        return [a[name] for _, a in self.elements for name in names if name in a]


def numbers_of(value: Any) -> set[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, value.values()), set())
    if isinstance(value, list):
        return set().union(*map(numbers_of, value), set())
    return {float(value)} if isinstance(value, int | float) else set()
