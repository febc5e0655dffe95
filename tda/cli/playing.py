"""Games and shifts from the command line: players, utilities, tables of columns, and answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tda.cli import tables
from tda.code import accepted, load_code
from tda.errors import ConfigError, DataError
from tda.report.artifacts import parquet
from tda.store.files import write_file
from tda.valuation import Beta, Mechanism, Semivalues, Shift, explain_shift, semivalues
from tda.valuation.groupings import read_groups

if TYPE_CHECKING:
    from rich.table import Table

    from tda.valuation.semivalues import Kind

COLUMNS = ("label", "source", "group")  # of a run


@dataclass(frozen=True)
class Loaded:
    """A utility by name: each process loads it for itself.

    groups: player → positions of its training examples, for a function with ``indices``.
    """

    reference: str
    groups: Mapping[str, np.ndarray]

    def __call__(self, members: tuple[str, ...]) -> float:
        return self._function(members, **self._more(members))

    def _more(self, members: tuple[str, ...]) -> dict[str, Any]:
        if not self.groups:
            return {}
        none = np.zeros(0, np.int64)
        indices = np.sort(np.concatenate([none, *(self.groups[name] for name in members)]))
        return accepted(self._function, {"indices": indices})

    @cached_property
    def _function(self) -> Any:
        return load_code(self.reference, Path())

    def __reduce__(self) -> tuple:
        return Loaded, (self.reference, self.groups)

    @property
    def digest(self) -> str:
        """Changes with the file that the function is in, and with the groups."""
        state = hashlib.blake2b(self.reference.encode(), digest_size=4)
        file = getattr(getattr(self._function, "__code__", None), "co_filename", None)
        state.update(Path(file).read_bytes() if file and Path(file).is_file() else b"")
        for name, indices in self.groups.items():
            state.update(name.encode() + indices.tobytes())
        return state.hexdigest()


def players_of(
    names: Sequence[str], target: str | None, by: str | None, groups: Path | None
) -> dict[str, np.ndarray]:
    """Player → positions of its examples; empty ones of players that are only named."""
    if bool(names) == (target is not None) or (by is None) != (target is None):
        raise ConfigError(
            "who are the players?",
            found="names and a run" if names and target else "--by without --run" if by else None,
            wanted="--player NAME, several times, or --run RUN --by COLUMN",
        )
    if target is None:
        if groups is not None:
            raise ConfigError("--groups is of the examples of a run", do="add --run and --by")
        if len(set(names)) < len(names):
            raise ConfigError("a player is named twice", where="--player", found=", ".join(names))
        return {name: np.zeros(0, np.int64) for name in names}
    from tda.cli.workload import open_workload

    run = open_workload(target, ()).run
    train = run.store.table("train")
    columns = {name: train.column(name) for name in COLUMNS if name in train.columns()}
    if groups is not None:
        columns |= read_groups(groups, run.ids, columns).columns
    if by not in columns:
        raise ConfigError(
            "the training examples have no such column",
            where="--by",
            found=by,
            wanted=", ".join(columns) or "the run has none: give --groups",
        )
    of, inverse = np.unique(columns[by], return_inverse=True)
    return {str(name): np.flatnonzero(inverse == i) for i, name in enumerate(of)}


def play(
    reference: str,
    players: Mapping[str, np.ndarray],
    kind: str,
    *,
    out: Path,
    samples: int,
    truncation: float | None,
    seed: int,
) -> Semivalues:
    """The game of these players, its values written to ``out``, its utilities beside it."""
    if out.suffix != ".parquet":
        raise ConfigError("values are written as Parquet", where="--out", found=out.name)
    positions = {name: indices for name, indices in players.items() if len(indices)}
    utility, chosen = Loaded(_absolute(reference), positions), read_kind(kind)
    kept = out.with_name(f"{out.stem}-{utility.digest}.jsonl")
    found = semivalues(
        utility,
        tuple(players),
        chosen,
        samples=samples,
        truncation=truncation,
        seed=seed,
        cache=kept,
    )
    columns = {
        "player": [str(player) for player in found.players],
        "value": found.value,
        "standard_error": found.standard_error,
        "ci_lo": found.low,
        "ci_hi": found.high,
        "r_hat": found.r_hat,
    }
    about = {
        "kind": found.kind,
        "utility": reference,
        "of_all": repr(found.full),
        "of_none": repr(found.empty),
        "settled": str(found.settled).lower(),
    }
    write_file(out, parquet(columns, about))
    return found


def _absolute(reference: str) -> str:
    """A file that is here, wherever it will be asked for."""
    file, colon, name = reference.rpartition(":")
    return f"{Path(file).resolve()}{colon}{name}" if Path(file).is_file() else reference


def read_kind(text: str) -> Kind:
    """``shapley``, …, or ``beta:ALPHA,BETA``."""
    if text in ("shapley", "banzhaf", "leave_one_out"):
        return text  # type: ignore[return-value]
    name, _, numbers = text.partition(":")
    try:
        alpha, beta = map(float, numbers.split(","))
    except ValueError:
        alpha = beta = float("nan")
    if name != "beta" or not (alpha > 0 and beta > 0):
        raise ConfigError(
            "this is no semivalue",
            where="--kind",
            found=text,
            wanted="shapley, banzhaf, leave_one_out, or beta:ALPHA,BETA with both > 0",
        )
    return Beta(alpha, beta)


def table(found: Semivalues) -> Table:
    """Players, the most valuable first."""
    rows = [
        (
            str(found.players[i]),
            f"{found.value[i]:+.4g}",
            "exact" if found.exact else f"{found.low[i]:+.3g} … {found.high[i]:+.3g}",
            "–" if found.exact else f"{found.r_hat[i]:.3f}",
        )
        for i in np.argsort(-found.value, kind="stable")
    ]
    title = f"{found.kind}: utility {found.full:.4g} of all, {found.empty:.4g} of none"
    return tables.table(title, ("player", "value ", "95 % interval ", "r_hat "), rows)


def verdict(found: Semivalues) -> str:
    """One sentence on whether the values can be read as they are."""
    cost = f"{found.num_coalitions:,} utilities were computed"
    if found.exact:
        return f"Every coalition that counts was seen: the values are exact; {cost}."
    worst = f"largest r_hat {found.r_hat.max():.3f}, split_half {found.split_half:.3f}"
    cut = f"; {found.truncated:.0%} of the contributions were cut off" if found.truncated else ""
    if found.settled:
        return f"Settled: {worst}; {cost}{cut}. Intervals are of the sampling alone."
    return f"Not settled: {worst}; {cost}{cut}. Run it again with more --samples."


def shifted(before: Path, after: Path, metric: str, mechanisms: Sequence[str], seed: int) -> Shift:
    """`explain_shift` of two files. Raises DataError, ConfigError."""
    parsed = [read_mechanism(text) for text in mechanisms]
    old, new = read_columns(before), read_columns(after)
    for path, columns in ((before, old), (after, new)):
        if metric not in columns:
            raise ConfigError(
                "there is no such column", where=path, found=metric, wanted=", ".join(columns)
            )
    return explain_shift(old, new, old[metric], new[metric], parsed, seed=seed)


def read_mechanism(text: str) -> Mechanism:
    """``A, B | C``, with or without P( ) around it."""
    inner = text.strip()
    if inner.startswith("P(") and inner.endswith(")"):
        inner = inner[2:-1]
    of, bar, given = inner.partition("|")
    named = [tuple(n.strip() for n in part.split(",") if n.strip()) for part in (of, given)]
    if not named[0] or (bar and not named[1]):
        raise ConfigError(
            "this is no mechanism", where="--mechanism", found=text, wanted="'A, B' or 'A, B | C'"
        )
    return Mechanism(named[0], named[1])


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """Columns of a .csv or .parquet file ``[example]``, or ``[example, dim]`` of equal lists."""
    import pyarrow as pa
    from pyarrow import csv
    from pyarrow import parquet as format

    readers: dict[str, Any] = {".csv": csv.read_csv, ".parquet": format.read_table}
    if path.suffix not in readers:
        raise ConfigError("this is no table", where=path, wanted="a .csv or .parquet file")
    try:
        read = readers[path.suffix](path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            "the table cannot be read", where=path, found=str(error).splitlines()[0]
        ) from error
    found = {}
    for name in read.column_names:
        column = read[name]
        if column.null_count:
            raise DataError(f"column {name!r} has empty cells", where=path, found=column.null_count)
        if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
            found[name] = np.array(column.to_pylist())
        else:
            found[name] = column.to_numpy()
        if found[name].dtype.kind == "O":
            found[name] = found[name].astype(str)
    return found


def shift_table(found: Shift, metric: str) -> Table:
    rows = [
        (
            name,
            f"{found.value[i]:+.4g}",
            f"{found.low[i]:+.3g} … {found.high[i]:+.3g}",
            f"{found.effective[i]:.0%}",
        )
        for i, name in enumerate(found.mechanisms)
    ]
    rows.append(("unexplained", f"{found.unexplained:+.4g}", "–", "–"))
    title = f"{metric} changed by {found.observed:+.4g} ± {found.observed_error:.2g}"
    columns = ("what moved", "share of it ", "95 % interval ", "examples that count ")
    return tables.table(title, columns, rows)


def write_shift(found: Shift, path: Path) -> None:
    columns = {
        "mechanism": list(found.mechanisms),
        "value": found.value,
        "standard_error": found.standard_error,
        "ci_lo": found.low,
        "ci_hi": found.high,
        "effective": found.effective,
    }
    about = {
        "observed": repr(found.observed),
        "explained": repr(found.explained),
        "verdict": found.verdict,
    }
    write_file(path, parquet(columns, about))
