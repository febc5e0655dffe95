"""Hugging Face datasets: what each example is worth, as columns of the data set.

dataset = with_values(dataset, "stores/my_run")
dataset.filter(lambda example: "mislabelled" not in example["tda_flags"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tda.errors import DataError
from tda.integrations.partner import partner
from tda.integrations.sheet import COLUMNS, Sheet, ids_of, sheet

if TYPE_CHECKING:
    from tda.run import Run

datasets: Any = partner("datasets", "datasets")


def with_values(
    dataset: Any,
    source: str | Path | Run | Sheet,
    *,
    id_column: str | None = None,
    columns: Sequence[str] = COLUMNS,
    prefix: str = "tda_",
) -> Any:
    """The data set with ``columns`` of the values beside its own, joined by id.

    id_column: see `tda.integrations.sheet.ids_of`. An example that was not in training has nulls.
    Raises DataError where nothing joins, a column of that name is there, or this is no Dataset.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(
            "columns are added to one data set that is in reach as a whole",
            found=type(dataset).__name__,
            wanted="a datasets.Dataset",
            do='of a DatasetDict give the split that was trained on: dataset["train"]',
        )
    values = sheet(source)
    there = [prefix + name for name in columns if prefix + name in dataset.column_names]
    if there:
        raise DataError(
            f"the data set has a column {there[0]!r} already",
            do="dataset.remove_columns([…]), or another prefix=",
        )
    found = values.of(ids_of(dataset, id_column), columns)
    for name, kind in values.types(columns).items():
        feature = datasets.features.features.generate_from_arrow_type(kind)
        dataset = dataset.add_column(prefix + name, found[name], feature=feature)
    return dataset
