"""Examples of one stored table, looked up by index and made fit to be shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tda.report.data import Example, Scored

MAX_ID = 200
MAX_TEXT = 600
MAX_NUMBERS = 16


def clean(text: object, limit: int) -> str:
    """One line of valid Unicode of at most ``limit`` characters.

    Control characters and unpaired surrogates would be drawn as nothing or break the file: each
    becomes U+FFFD. Direction marks stay; the page isolates every string it shows.
    """
    line = " ".join(str(text).split())
    if len(line) > limit:
        line = line[: limit - 1] + "…"
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in line)


def finite(value: Any) -> float | None:
    """``value`` as a float, or None where it is undefined."""
    number = float(value)
    return number if np.isfinite(number) else None


def label_name(value: Any, names: Sequence[str] | None) -> str | None:
    """A label as shown: its given name, else an integer or a number of four digits."""
    number = float(value)
    if not np.isfinite(number):
        return None
    if number != round(number):
        return f"{number:.4g}"
    if names is not None and 0 <= number < len(names):
        return clean(names[int(number)], MAX_ID)
    return str(int(number))


class Gallery:
    """The examples of one table (``train`` or a query set), read column by column, once."""

    def __init__(self, table: Any, label_names: Sequence[str] | None = None) -> None:
        self._names = label_names
        self._present = set(table.columns())
        self._table = table
        self._columns: dict[str, np.ndarray | None] = {}
        self.num_rows: int = table.num_rows
        self._ids = table.column("id")
        self._examples: dict[int, Example] = {}

    def column(self, name: str) -> np.ndarray | None:
        """A column as stored, or None when the run does not hold it."""
        if name not in self._columns:
            self._columns[name] = self._table.column(name) if name in self._present else None
        return self._columns[name]

    def last(self, name: str) -> np.ndarray | None:
        """A per-checkpoint column at the last checkpoint; None if absent or nowhere defined."""
        column = self.column(name)
        if column is None or not np.isfinite(column[-1]).any():
            return None
        return column[-1]

    def label(self, index: int) -> str | None:
        column = self.column("label")
        return None if column is None else label_name(column[index], self._names)

    def label_name(self, value: Any) -> str | None:
        """How a value of the label column is shown."""
        return label_name(value, self._names)

    @property
    def ids(self) -> np.ndarray:
        """Ids as stored."""
        return self._ids

    @property
    def classes(self) -> bool:
        """Whether labels are classes: stored as integers, not as targets of a regression."""
        column = self.column("label")
        return column is not None and np.issubdtype(column.dtype, np.integer)

    def example(self, index: int) -> Example:
        """Example ``index`` with everything that is known of it; the same object each time."""
        index = int(index)
        if index not in self._examples:
            self._examples[index] = self._read_example(index)
        return self._examples[index]

    def _read_example(self, index: int) -> Example:
        numbers, image = self._entry("row", index), self._entry("image", index)
        loss, p = self.last("loss"), self.last("p")
        return Example(
            index=index,
            id=clean(self._ids[index], MAX_ID),
            label=self.label(index),
            source=self._string("source", index, MAX_ID),
            group=self._string("group", index, MAX_ID),
            text=_line(self._entry("text", index), MAX_TEXT),
            image=image,
            row=None if numbers is None else tuple(map(float, numbers[:MAX_NUMBERS])),
            loss=None if loss is None else finite(loss[index]),
            p=None if p is None else finite(p[index]),
        )

    def scored(self, indices: Iterable[int], scores: np.ndarray) -> tuple[Scored, ...]:
        """Examples ``indices`` with ``scores[i]``, one for each index, in the same order."""
        return tuple(
            Scored(self.example(index), float(score))
            for index, score in zip(indices, scores, strict=True)
        )

    def _string(self, name: str, index: int, limit: int) -> str | None:
        column = self.column(name)
        return None if column is None else _line(column[index], limit)

    def _entry(self, name: str, index: int) -> Any:
        """A picture, text or row of one example: a whole column of them may not fit in memory."""
        return self._table.entries(name, [index])[0] if name in self._present else None


def _line(text: object, limit: int) -> str | None:
    return None if text is None else clean(text, limit) or None
