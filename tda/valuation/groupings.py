"""Groups named in a table beside the data: one row an example, one column a way to group them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tda.errors import DataError

ABSENT = "(none)"  # the group of examples that the table does not name
# Columns of values.parquet:
TAKEN = {"value", "ci_lo", "ci_hi", "self_influence", "flags", "standard_error", "p", "q"}
TAKEN |= {"reliable", "slice", "knn_shapley", "data_oob", "suggested_label"}


@dataclass(frozen=True, eq=False)
class Groupings:
    """columns: name → group of every training example ``[train]`` str. notes: what was left out."""

    columns: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()


def read_groups(path: str | Path, ids: np.ndarray, known: Collection[str] = ()) -> Groupings:
    """Groupings of the examples ``ids [train]`` by a CSV file of columns ``id``, and any others.

    Examples that the file does not name are in the group "(none)", and so are empty cells. A column
    with another name for each example groups nothing and is left out; so is one that the run has
    itself (``known``).
    Raises DataError where the file cannot be read so, or names none of the examples.
    """
    table = _table(Path(path))
    given = table.pop("id")
    names, first, count = np.unique(given, return_index=True, return_counts=True)
    if (count > 1).any():
        raise DataError(
            "an id is there twice", where=path, found=names[count > 1][0], wanted="one row an id"
        )
    wanted = np.asarray(ids).astype(str)
    place = np.clip(np.searchsorted(names, wanted), 0, max(0, len(names) - 1))
    here = names[place] == wanted if len(names) else np.zeros(len(wanted), bool)
    if not here.any():
        raise DataError(
            "the file names none of the training examples",
            where=path,
            found=f"ids such as {given[0]}" if len(given) else "no rows",
            wanted=f"ids such as {wanted[0]}",
        )
    notes = []
    if not here.all():
        missing = len(wanted) - int(here.sum())
        notes.append(f"{path} does not name {missing:,} of the training examples: {ABSENT}")
    columns = {}
    for name, column in table.items():
        if name in known:
            notes.append(f"column {name!r} of {path} is not used: the run has its own")
            continue
        of = np.where(here, column[first[place]], "")
        of = np.where(of == "", ABSENT, of)
        if len(np.unique(of)) == len(of):
            notes.append(f"column {name!r} of {path} has another name for each example: left out")
        else:
            columns[name] = of
    return Groupings(columns, tuple(notes))


def _table(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file as strings, ``id`` among them."""
    import pyarrow as pa
    from pyarrow import csv

    try:
        with path.open("rb") as file:
            head = file.readline().decode("utf-8-sig").rstrip("\r\n")
        names = csv.read_csv(pa.BufferReader(head.encode() + b"\n")).column_names
        texts = csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        )
        read = csv.read_csv(path, convert_options=texts)
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DataError(
            "the groups cannot be read", where=path, found=str(error).splitlines()[0],
            wanted="a CSV file in UTF-8 with a line of names: id, and one or more columns",
        ) from error  # fmt: skip
    if "id" not in names or len(names) < 2 or len(set(names)) < len(names):
        raise DataError(
            "this is no table of groups",
            where=path,
            found=f"columns {', '.join(names)}",
            wanted="id, and one or more others, each once",
        )
    taken = sorted(TAKEN.intersection(names))
    if taken:
        raise DataError(
            f"a grouping cannot be called {taken[0]!r}", where=path,
            found="values.parquet has a column of that name", do="give the column another name",
        )  # fmt: skip
    return {name: np.asarray(read[name].to_pylist(), dtype=str) for name in names}
