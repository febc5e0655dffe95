"""What is known of every training example, by id: the columns of ``values.parquet``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from tda.data import as_dataset
from tda.errors import DataError, StoreError
from tda.examples import describe
from tda.store.files import as_place, beside

if TYPE_CHECKING:
    from tda.run import Run

COLUMNS = ("value", "ci_lo", "ci_hi", "reliable", "flags")  # what partners get, unless told
_PLACES = ("values.parquet", "value/values.parquet")  # of the report and of `tda value`


@dataclass(frozen=True, eq=False)
class Sheet:
    """One row a training example: ``id``, ``value``, ``ci_lo``, ``ci_hi``, ``flags`` and others.

    A value > 0 helps the queries, per query; what is not known is null. ``table.schema.metadata``
    says of which run, queries and recipe.
    """

    table: pa.Table
    where: str

    @property
    def ids(self) -> list[str]:
        return self.table.column("id").to_pylist()

    def types(self, columns: Sequence[str]) -> dict[str, pa.DataType]:
        """The types of these columns. Raises DataError for one that is not there."""
        unknown = [name for name in columns if name not in self.table.column_names]
        if unknown:
            raise DataError(
                f"the values have no column {unknown[0]!r}",
                where=self.where,
                wanted=", ".join(self.table.column_names),
            )
        return {name: self.table.schema.field(name).type for name in columns}

    def of(self, ids: Sequence[Any], columns: Sequence[str]) -> dict[str, list[Any]]:
        """Values of ``columns`` for each of ``ids``; None for an id that was not in training.

        Raises DataError where none of them was: then these are other ids.
        """
        self.types(columns)
        row = {name: index for index, name in enumerate(self.ids)}
        rows = [row.get(str(name)) for name in ids]
        if all(index is None for index in rows):
            raise DataError(
                "none of these examples is in the run",
                where=self.where,
                found=f"ids {', '.join(repr(str(name)) for name in list(ids)[:3])}, …",
                wanted=f"ids of its training set: {', '.join(map(repr, self.ids[:3]))}, …",
                do="name the column that holds the ids given to `tda index`",
            )
        taken = self.table.select(list(columns)).take(pa.array(rows, pa.int64()))
        return {name: taken.column(name).to_pylist() for name in columns}


def sheet(source: str | Path | Run | Sheet) -> Sheet:
    """The values of a run: its folder, that of a report, a file of `tda value`, or the `tda.Run`.

    Raises StoreError where there is no such file, DataError where it holds several slices.
    """
    if isinstance(source, Sheet):
        return source
    path = beside(as_place(source if isinstance(source, str | Path) else source.path))
    files = [path] if path.suffix == ".parquet" else [path / place for place in _PLACES]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise StoreError(
            "there are no values here",
            where=path,
            wanted=" or ".join(str(file.name) for file in files[:1]),
            do=f"write them with `tda report {path}` or `tda value {path}`",
        )
    try:
        table = parquet.read_table(found)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            "the values cannot be read", where=found, found=error, do="write them again"
        ) from error
    if not {"id", "value"} <= set(table.column_names):
        raise DataError(
            "this is no table of values",
            where=found,
            found=f"columns {', '.join(table.column_names)}",
            wanted="id, value, ci_lo, ci_hi, …",
        )
    ids = table.column("id")
    if len(ids.unique()) != len(ids):
        raise DataError(
            "an example has several values",
            where=found,
            found=f"{len(ids)} rows of {len(ids.unique())} examples: several slices of the queries",
            wanted="one slice",
            do="`tda value RUN --slice COLUMN=NAME --out FILE`",
        )
    return Sheet(table, str(found))


def ids_of(dataset: Any, id_column: str | None = None) -> list[str]:
    """The ids that `tda.index` knows the examples of a data set by.

    id_column: where they are; by default ``id``, or else the hashes of what the model sees, which
    are those of the run only if this is the data set as it was indexed. Raises DataError.
    """
    names = getattr(dataset, "column_names", ())
    column = id_column or ("id" if "id" in names else None)
    if column is None:
        return describe(as_dataset(dataset)).ids.tolist()
    if column not in names:
        raise DataError(
            f"the data set has no column {column!r}", wanted=", ".join(names) or "named columns"
        )
    return [str(name) for name in dataset[column]]
