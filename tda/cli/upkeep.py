"""What keeps a run sound, and what changes it: verify, delete, restore."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tda.cli import Overrides, Target, app
from tda.errors import DataError

if TYPE_CHECKING:
    from tda.run import Run

Ids = Annotated[list[str] | None, typer.Argument(metavar="ID…", help="Ids of training examples.")]
IdFile = Annotated[
    Path | None, typer.Option("--ids", metavar="FILE", help="A text file with one id a line.")
]


@app.command()
def verify(target: Target, set_: Overrides = None) -> None:
    """Read the whole store; name each chunk that is missing, torn or altered.

    Exit code 1 if there is one.
    """
    from tda.cli import tables
    from tda.cli.workload import find_path
    from tda.store import Store

    path = find_path(target, set_ or ())
    faults = Store.open(path).verify()
    if faults:
        tables.show(tables.faults(path, faults))
        raise typer.Exit(1)
    typer.echo(f"{path}: no faults")


@app.command()
def delete(target: Target, ids: Ids = None, file: IdFile = None, set_: Overrides = None) -> None:
    """Leave training examples out of every answer, from now on.

    Scores, rankings, values, reports and the curvature are then those of a run that never held
    them. Nothing is computed, and no row is removed: `tda restore` takes it back.

    Example: `tda delete stores/digits train-17 train-1204`
    """
    run = _open(target, set_)
    changed = run.delete(_named(ids, file))
    typer.echo(f"{run.path}: {changed} deleted, {len(run.ids)} examples count")


@app.command()
def restore(target: Target, ids: Ids = None, file: IdFile = None, set_: Overrides = None) -> None:
    """Let deleted training examples count again."""
    run = _open(target, set_)
    changed = run.restore(_named(ids, file))
    typer.echo(f"{run.path}: {changed} restored, {len(run.ids)} examples count")


def _open(target: str, overrides: list[str] | None) -> Run:
    import tda
    from tda.cli.workload import find_path

    return tda.open(find_path(target, overrides or ()))


def _named(ids: list[str] | None, file: Path | None) -> list[str]:
    """The ids given as arguments, then those of the file."""
    named = list(ids or ())
    if file is not None:
        try:
            named += [line for line in file.read_text("utf-8").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("cannot read the ids", where=file, found=error) from error
    if not named:
        raise DataError("which examples?", wanted="ids, or --ids FILE with one a line")
    return named
