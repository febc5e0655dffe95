"""The examples of a run as they are shown, listed and searched; read page by page, not whole.

Ids, labels, sources and losses are held as columns. Texts and pictures, which may be a thousand
times as large, are read for the examples that are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, Literal, cast

import numpy as np

from tda.errors import DataError, StoreError
from tda.report.data import Example
from tda.report.examples import Gallery
from tda.report.rollups import categories
from tda.store import Store, Table
from tda.store.files import Place, Stat, list_folders, stat_file
from tda.store.manifest import NAME, QUERIES, has_table, read_manifest
from tda.store.steady import Steady

Order = Literal["position", "lowest_p", "largest_loss"]
COLUMNS = ("source", "group", "label")  # by which examples are grouped and filtered
MAX_CHOICES = 300  # with more values than this a column sorts nothing out for a reader
_SEARCHED = 4096  # texts read at a time


class Library:
    """The tables of a run, opened once and again when their files have changed.

    Stands in for the store where something is computed from it: the tables it hands out remember
    that they are complete, and their columns.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self._lock = Lock()
        self._open: dict[str, tuple[tuple[Stat | None, ...], Shelf]] = {}

    def stamp(self, name: str) -> tuple[Stat | None, ...]:
        """Changes when the table is extended, or the run is."""
        files = (self.path / NAME, self.path / name / "done" / "static.json")
        return tuple(stat_file(file) for file in files)

    def shelf(self, name: str) -> Shelf:
        """The table ``train`` or ``queries/NAME``. Raises StoreError if there is none."""
        stamp = self.stamp(name)
        with self._lock:
            known = self._open.get(name)
            if known is None or known[0] != stamp:
                store = Store.open(self.path)
                known = stamp, Shelf(store, Steady(store.table(name)), stamp)
                self._open[name] = known
        return known[1]

    def table(self, name: str) -> Table:
        return self.shelf(name).table

    @property
    def manifest(self) -> dict[str, Any]:
        return self.train.store.manifest

    @property
    def train(self) -> Shelf:
        return self.shelf("train")

    def queries(self, name: str) -> Shelf:
        """A query set. Raises DataError if there is none of that name."""
        known = self.query_sets()
        if name not in known:
            what = "there is no such query set"
            raise AbsentError(what, found=name, wanted=", ".join(known) or None)
        return self.shelf(f"queries/{name}")

    def query_sets(self) -> list[str]:
        """Their names, sorted. Raises StoreError where there is no run any more.

        Of the folders alone: a run may have thousands of files, and a page asks several times.
        """
        if stat_file(self.path / NAME) is None:
            read_manifest(self.path)  # says so
        found = list_folders(self.path / QUERIES)
        return sorted(name for name in found if has_table(self.path, f"{QUERIES}/{name}"))


class AbsentError(DataError):
    """What was asked for by name or number is not in the run."""


@dataclass(frozen=True)
class Keep:
    """Which training examples are wanted: those with these values, as they are shown."""

    source: str | None = None
    group: str | None = None
    label: str | None = None

    def wanted(self) -> Iterator[tuple[str, str]]:
        return ((c, v) for c in COLUMNS if (v := getattr(self, c)) is not None)


class Shelf:
    """One table with its gallery, its categories and its orders."""

    def __init__(self, store: Store, table: Steady, stamp: tuple[Stat | None, ...]) -> None:
        self.store = store
        self.table = cast(Table, table)
        self.stamp = stamp
        self.gallery = Gallery(self.table)
        self._lock = Lock()
        self._categories: dict[str, tuple[list[str], np.ndarray] | None] = {}

    @property
    def num_rows(self) -> int:
        return self.table.num_rows

    def example(self, index: int) -> Example:
        """Raises AbsentError unless 0 ≤ index < n."""
        if not 0 <= index < self.num_rows:
            what = f"there is no such example of {self.table.name}"
            raise AbsentError(what, found=index, wanted=f"0 … {self.num_rows - 1}")
        return self.gallery.example(index)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.table.column("id").tolist())}

    def has(self, name: str) -> bool:
        """Whether there is an example of this id."""
        return name in self._places

    def index_of(self, name: str) -> int:
        """The example of this id. Raises AbsentError."""
        if name not in self._places:
            raise AbsentError(f"no example of {self.table.name} has this id", found=repr(name))
        return self._places[name]

    def stored_id(self, index: int) -> str:
        """The id as stored; what is shown of it may be shorter."""
        self.example(index)
        return str(self.table.entries("id", [index])[0])

    def categories(self, column: str) -> tuple[list[str], np.ndarray] | None:
        """(names, each example's) of a column that sorts examples out; else None."""
        with self._lock:
            if column not in self._categories:
                self._categories[column] = categories(self.gallery, column)
        return self._categories[column]

    def choices(self) -> dict[str, list[str]]:
        """The values to filter by, of every column that has from two to a few hundred."""
        found = {column: self.categories(column) for column in COLUMNS}
        named = {column: x[0] for column, x in found.items() if x is not None}
        return {c: names for c, names in named.items() if 2 <= len(names) <= MAX_CHOICES}

    def kept(self, keep: Keep) -> np.ndarray | None:
        """Positions of the examples that are wanted, ascending; None for all.

        Raises DataError for a value that no example has.
        """
        mask = None
        for column, value in keep.wanted():
            sorted_out = self.categories(column)
            names, each = sorted_out if sorted_out is not None else ([], np.empty(0, int))
            if value not in names:
                raise DataError(
                    f"no training example has this {column}",
                    where=column,
                    found=value,
                    wanted=", ".join(names[:20]) or f"the run holds no {column} of this kind",
                )
            same = each == names.index(value)
            mask = same if mask is None else mask & same
        return None if mask is None else np.flatnonzero(mask)

    def ordered(self, order: Order) -> np.ndarray:
        """Positions: as stored, or the least p or largest loss first; the undefined come last."""
        column = {"lowest_p": "p", "largest_loss": "loss"}.get(order)
        values = None if column is None else self.gallery.last(column)
        if values is None:
            return np.arange(self.num_rows)
        return np.argsort(values if column == "p" else -values, kind="stable")

    def found(self, search: str, order: Order) -> np.ndarray:
        """Positions of the examples whose id, label or text contains ``search``, in order."""
        places, wanted = self.ordered(order), search.strip().casefold()
        if not wanted:
            return places
        hit = np.zeros(self.num_rows, bool)
        for column in ("id", "text"):
            if column in self.table.columns():
                for start in range(0, self.num_rows, _SEARCHED):
                    span = np.arange(start, min(start + _SEARCHED, self.num_rows))
                    texts = self.table.entries(column, span).tolist()
                    hit[span] |= [wanted in text.casefold() for text in texts]
        labels = self.categories("label")
        if labels is not None:
            hit |= np.array([wanted == name.casefold() for name in labels[0]])[labels[1]]
        return places[hit[places]]


def require_train(path: Place) -> None:
    """Raises StoreError where there is no run, or nothing is indexed."""
    store = Store.open(path)
    if store.table("train").num_rows == 0:
        raise StoreError("nothing is indexed yet", where=path, do="run `tda index`")
