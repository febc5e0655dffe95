"""The files beside the page: ``values.parquet`` and ``top_k.parquet``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from tda.report.data import Ledger, Values
from tda.report.findings import Findings
from tda.scorer.signs import Signs
from tda.valuation import Suspects, inert

SIDES = ("proponents", "opponents")


def ledger(
    train: Any,
    queries: Any,
    values: Values,
    found: Findings,
    top: Any,
    groups: Mapping[str, np.ndarray] = MappingProxyType({}),
    signs: Signs | None = None,
) -> Ledger:
    """What is known of every training example, and the answers to every query (Galleries in).

    groups: more columns of the training set, ``[train]``. signs: of ``top``, those that survive.
    """
    columns = {"id": train.ids}
    for name in ("label", "source", "group"):
        column = train.column(name)
        if column is not None and column.ndim == 1:
            columns[name] = column
    columns |= groups
    others = {} if found.knn is None else {"knn_shapley": found.knn}
    if found.suspects is not None:
        others = {**others, "suggested_label": suggested_labels(found.suspects)}
    return Ledger(columns, flags(values, found), others, answers(queries, top, signs))


def flags(values: Values, found: Findings) -> dict[str, np.ndarray]:
    """Name → ``[train]`` bool, only of what could be looked for."""
    count = len(values.mean)

    def marked(indices: np.ndarray) -> np.ndarray:
        mask = np.zeros(count, bool)
        mask[indices] = True
        return mask

    made = {"inert": inert(np.nan_to_num(values.mean))}
    if found.suspects is not None:
        made["mislabelled"] = found.suspects.flagged
    if found.outliers is not None:
        made["outlier"] = found.outliers
    if found.copies is not None:
        made["duplicate"] = marked(found.copies.member)
        made["conflicting"] = marked(found.copies.member[found.copies.conflicting])
    if found.leakage is not None:
        made["leaked"] = marked(found.leakage.pairs.right)
    if values.sure is not None:
        made["harmful"] = values.sure.reliable & (values.mean < 0)
    return made


def answers(queries: Any, top: Any, signs: Signs | None = None) -> dict[str, np.ndarray]:
    """One row a query, side and rank; only what has the sign of its side."""
    names = ("query", "side", "rank", "train", "train_index", "score", "reliable")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    if top is None:
        return {}
    for side, ranking in zip(SIDES, (top.proponents, top.opponents), strict=True):
        sign = 1 if side == SIDES[0] else -1
        row, rank = np.nonzero(sign * ranking.scores > 0)
        parts["query"].append(queries.ids[row])
        parts["side"].append(np.full(len(row), side))
        parts["rank"].append(rank + 1)
        parts["train"].append(np.asarray(ranking.ids)[row, rank])
        parts["train_index"].append(np.asarray(ranking.indices)[row, rank])
        parts["score"].append(np.asarray(ranking.scores, np.float64)[row, rank])
        sure = None if signs is None else getattr(signs, side)[row, rank]
        parts["reliable"].append(np.full(len(row), None) if sure is None else sure)
    return {name: np.concatenate(of) for name, of in parts.items()}


def value_columns(
    values: Values, self_influence: np.ndarray | None, book: Ledger
) -> dict[str, Any]:
    """Columns of ``values.parquet``, one row a training example in the order of the run."""
    count = len(values.mean)
    nothing: list[None] = [None] * count
    sure = values.sure
    given = book.columns
    found: dict[str, Any] = {
        "id": _texts(given["id"]),
        "value": values.mean.astype(np.float64),
        "ci_lo": nothing if sure is None else sure.low,
        "ci_hi": nothing if sure is None else sure.high,
        "self_influence": nothing if self_influence is None else self_influence,
        "group": _texts(given["group"]) if "group" in given else nothing,
        "flags": flag_lists(book.flags, count),
        "standard_error": nothing if sure is None else sure.standard_error,
        "p": nothing if sure is None else sure.p,
        "q": nothing if sure is None else sure.q,
        "reliable": nothing if sure is None else sure.reliable,
    }
    found |= {name: _texts(of) for name, of in given.items() if name not in ("id", "group")}
    return {**found, **{name: _texts(of) for name, of in book.others.items()}}


def suggested_labels(suspects: Suspects) -> np.ndarray:
    """``[train]`` str, empty where the label is not in doubt."""
    labels, place = np.unique(suspects.suggested, return_inverse=True)
    return np.append(labels.astype(str), "")[np.where(suspects.flagged, place, len(labels))]


def flag_lists(flagged: Mapping[str, np.ndarray], count: int) -> Any:
    """The names of the flags of each example, as an Arrow array of lists."""
    import pyarrow as pa

    each = np.array([*flagged.values()], bool).reshape(len(flagged), count).T
    names = pa.array([*flagged], pa.string()).take(pa.array(np.nonzero(each)[1]))
    ends = np.append(0, np.cumsum(each.sum(1)))
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), names)


def parquet(columns: Mapping[str, Any], about: Mapping[str, str]) -> bytes:
    """A Parquet file of these columns; ``about`` becomes its metadata."""
    import pyarrow as pa
    from pyarrow import parquet as format

    kinds = {"flags": pa.list_(pa.string()), "group": pa.string(), **_types_of_numbers(pa)}
    arrays = {
        name: values
        if isinstance(values, pa.Array)
        else pa.array(values, type=kinds.get(name), from_pandas=True)
        for name, values in columns.items()
    }
    file = io.BytesIO()
    table = pa.table(arrays).replace_schema_metadata(dict(about))
    format.write_table(table, file)
    return file.getvalue()


def _types_of_numbers(pa: Any) -> dict[str, Any]:
    """Types of columns that may hold nothing at all."""
    numbers = ("ci_lo", "ci_hi", "standard_error", "p", "q")
    return {**dict.fromkeys(numbers, pa.float64()), "reliable": pa.bool_()}


def _texts(column: Sequence[Any] | np.ndarray) -> Any:
    """Objects as the strings, or whatever, that they are."""
    array = np.asarray(column)
    return array.tolist() if array.dtype.kind == "O" else array
