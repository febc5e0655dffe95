"""A store that is looked through once: for those who ask many questions of a run at rest."""

from __future__ import annotations

from typing import Any

import numpy as np

from tda.store.store import Store
from tda.store.table import Table


class Steady:
    """A table that is looked through for missing chunks once, not at every question.

    What is read is checked all the same: a chunk that goes missing later is an error when read.
    Columns are held once they were asked for.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._columns: dict[str, np.ndarray] = {}
        self._complete = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def require_complete(self) -> None:
        if not self._complete:
            self._table.require_complete()
            self._complete = True

    def column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self._table.column(name)
        return self._columns[name]


class SteadyStore:
    """Stands in for a store: the tables it hands out are the same ones each time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tables: dict[str, Steady] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def table(self, name: str) -> Steady:
        if name not in self._tables:
            self._tables[name] = Steady(self._store.table(name))
        return self._tables[name]
