"""Answers on their way out: to the terminal, to JSON or Parquet, and full matrices to Zarr."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tda.cli import tables
from tda.cluster import is_open
from tda.errors import ConfigError, DataError, StoreError
from tda.scorer.signs import Signs, signs_of

if TYPE_CHECKING:
    import dask.array as da

    from tda.run import Run
    from tda.scorer import Prepared
    from tda.scorer.ranking import Ranking, TopK

_SIGN = "positive helps the query"
_HEADS = {"proponents": "proponent", "opponents": "opponent", "nearest": "nearest"}


@dataclass(frozen=True)
class Answer:
    """The top training examples of some queries of one set, both sides, best first.

    ``positions [m]`` are the rows of ``sides`` (and of the query table) that are shown. ``sides``:
    proponents, opponents and, beside them, the nearest by cosine of the last hidden layer, which
    needs no gradient. ``losses [m]`` are the queries' own. ``recall``: of an approximate search.
    ``signs``: which scores keep their sign; None where nothing repeats.
    """

    run: str
    query_set: str
    recipe: str
    positions: tuple[int, ...]
    query_ids: Sequence[str]
    query_labels: Sequence[Any] | None
    losses: Sequence[float]
    train_labels: Sequence[Any] | None
    sides: Mapping[str, Ranking]
    recall: float | None
    signs: Signs | None = None

    @property
    def num_queries(self) -> int:
        return len(self.positions)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each query, side and rank."""
        for position in self.positions:
            for side, ranking in self.sides.items():
                for rank, index in enumerate(ranking.indices[position].tolist()):
                    yield {
                        "query": str(self.query_ids[position]),
                        "query_label": _label(self.query_labels, position),
                        "side": side,
                        "rank": rank + 1,
                        "train": str(ranking.ids[position][rank]),
                        "train_index": index,
                        "train_label": _label(self.train_labels, index),
                        "score": float(ranking.scores[position][rank]),
                        "reliable": self._reliable(side, position, rank),
                    }

    def _reliable(self, side: str, position: int, rank: int) -> bool | None:
        if self.signs is None or side == "nearest":
            return None
        return bool(getattr(self.signs, side)[position, rank])

    @property
    def rule(self) -> str:
        """What a reliable score has passed."""
        return "" if self.signs is None else self.signs.rule.says

    def tables(self, limit: int) -> Iterator[Table]:
        """One table a query: proponents to the left, then opponents, then the baseline."""
        columns = ["# "]
        for side in self.sides:
            score = "cosine " if side == "nearest" else "score "
            columns += [_HEADS[side], "label ", score]
        for position in self.positions[:limit]:
            depth = self.sides["proponents"].indices.shape[1]
            rows = [self._cells(position, rank) for rank in range(depth)]
            yield tables.table(self._title(position), columns, rows)

    def _title(self, position: int) -> str:
        label = _label(self.query_labels, position)
        parts = [
            f"query {self.query_ids[position]}" + ("" if label is None else f", label {label}"),
            f"loss {self.losses[position]:.3g}",
            self.recipe,
            *([] if self.recall is None else [f"approximate, recall {self.recall:.2f}"]),
        ]
        return " · ".join(parts)

    def _cells(self, position: int, rank: int) -> list[str]:
        cells = [str(rank + 1)]
        for side, ranking in self.sides.items():
            index = int(ranking.indices[position][rank])
            cells += [
                str(ranking.ids[position][rank]),
                _text(_label(self.train_labels, index)),
                f"{ranking.scores[position][rank]:+.3g}"
                + (" ★" if self._reliable(side, position, rank) else ""),
            ]
        return cells

    def write(self, path: Path) -> None:
        """Write every row to ``path``, whole or not at all. Raises StoreError if it cannot be."""
        check_out(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                head = {
                    "run": self.run,
                    "queries": self.query_set,
                    "recipe": self.recipe,
                    "recall": self.recall,
                    "reliable": self.rule,
                }
                text = json.dumps({**head, "answers": list(self.rows())}, indent=1)
                partial.write_text(text + "\n", encoding="utf-8")
            else:
                self._write_parquet(partial)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StoreError(
                "the answers could not be written", where=path, found=error.strerror or error
            ) from error

    def _write_parquet(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        rows = list(self.rows())
        table = pa.Table.from_pylist(rows)
        if self.signs is None:  # a column of nothing has a type all the same
            at = table.column_names.index("reliable")
            table = table.set_column(at, "reliable", pa.nulls(len(rows), pa.bool_()))
        about = {"run": self.run, "queries": self.query_set, "recipe": self.recipe}
        about["reliable"] = self.rule
        parquet.write_table(table.replace_schema_metadata(about), path)


def _are_answers(path: Path) -> bool:
    """Whether a file is of `Answer.write`."""
    if path.suffix == ".json":
        try:
            return "answers" in json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return False
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return b"queries" in (parquet.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def check_out(path: Path) -> None:
    """Before the work, not after. Raises ConfigError unless the name of ``path`` says a format,
    StoreError where something else than answers is there."""
    if path.suffix not in (".json", ".parquet"):
        raise ConfigError(
            "the format of the answers is told by the file's name",
            where="--out",
            found=path.name,
            wanted="a name that ends in .json or .parquet",
        )
    _require_ours(path, _are_answers, "an answer", "query")


def _require_ours(path: Path, ours: Callable[[Path], bool], what: str, command: str) -> None:
    if path.exists() and not ours(path):
        raise StoreError(
            f"this is not {what} that could be replaced",
            where=path,
            wanted=f"nothing of this name, or what `tda {command}` wrote before",
            do="name another path with --out",
        )


def collect(run: Run, query_set: str, prepared: Prepared, top: TopK, ids: Sequence[str]) -> Answer:
    """The answers about the queries ``ids``, or about all. Raises DataError for an unknown id."""
    queries, train = run.store.table(f"queries/{query_set}"), run.store.table("train")
    query_ids = queries.column("id").tolist()
    positions = {name: position for position, name in enumerate(query_ids)}
    unknown = [name for name in ids if name not in positions]
    if unknown:
        raise DataError(
            f"the query set {query_set!r} has no query {unknown[0]!r}",
            where="--id",
            found=unknown[0],
            wanted=f"one of {len(query_ids)} ids: {', '.join(query_ids[:3])}, …",
        )
    sides = {"proponents": top.proponents, "opponents": top.opponents}
    if train.hidden:
        depth = top.proponents.indices.shape[1]
        sides["nearest"] = run.baseline_top_k(query_set, depth).proponents
    asked = tuple(positions[name] for name in ids) or tuple(range(len(query_ids)))
    return Answer(
        run=str(run.path),
        query_set=query_set,
        recipe=prepared.recipe.name,
        positions=asked,
        query_ids=query_ids,
        query_labels=_labels(queries),
        losses=queries.column("loss")[-1].tolist(),
        train_labels=_labels(train),
        sides=sides,
        recall=top.recall,
        signs=signs_of(prepared, run.store.manifest, top, asked),
    )


def write_scores(scores: da.Array, path: Path, *, queries: str, recipe: str) -> None:
    """Write a score matrix to the Zarr array ``path``, whole or not at all, a block at a time.

    Blocks are computed two at a time at most, or one a worker of the open cluster: what is in
    memory does not grow with the matrix.
    """
    import dask
    import zarr

    _require_ours(path, _is_matrix, "a score matrix", "score")
    partial = path.with_name(f".{path.name}.partial")
    chunks = tuple(sizes[0] for sizes in scores.chunks)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        array = zarr.create_array(
            partial,
            shape=scores.shape,
            chunks=chunks,
            dtype="float32",
            fill_value=float("nan"),
            compressors=None,  # would save 8 % of the bytes for an eighth of the time
            dimension_names=("query", "train"),
            attributes={"queries": queries, "recipe": recipe, "sign": _SIGN},
        )
        here = {} if is_open() else {"scheduler": "threads", "num_workers": 2}
        with dask.config.set(here):
            scores.rechunk(chunks).store(array, lock=False)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(
            "the scores could not be written", where=path, found=error.strerror or error
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_matrix(path: Path) -> bool:
    """Whether a folder is of `write_scores`."""
    try:
        about = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(about.get("attributes", {}).get("sign") == _SIGN)


def _labels(table: Any) -> Sequence[Any] | None:
    return table.column("label").tolist() if "label" in table.columns() else None


def _label(labels: Sequence[Any] | None, index: int) -> Any:
    return None if labels is None else labels[index]


def _text(label: Any) -> str:
    return "" if label is None else str(label)
