"""FiftyOne: what each sample is worth, as fields that the App sorts and filters by.

add_values(dataset, "stores/my_run", key_field="example_id")
session.view = dataset.sort_by("tda_value")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tda.integrations.sheet import COLUMNS, Sheet, sheet

if TYPE_CHECKING:
    from tda.run import Run


def add_values(
    samples: Any,
    source: str | Path | Run | Sheet,
    *,
    key_field: str,
    columns: Sequence[str] = COLUMNS,
    prefix: str = "tda_",
) -> None:
    """Set the fields ``prefix + column`` of a data set or view of FiftyOne.

    key_field: the field that holds the ids given to `tda index` ("filepath", or one of your own).
    A sample that was not in training, and what is not known, keep no value. Raises DataError where
    no sample is in the run.
    """
    keys, own = samples.values([key_field, "id"])
    for name, values in sheet(source).of(keys, columns).items():
        known = {i: v for i, v in zip(own, values, strict=True) if v is not None}
        if known:
            samples.set_values(prefix + name, known, key_field="id")
