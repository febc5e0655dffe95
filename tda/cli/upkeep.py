"""What keeps a run sound, and what changes it: verify, repair, delete, relabel, compact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tda.cli import app
from tda.cli.arguments import ConfigFile, Overrides, Target
from tda.errors import DataError

if TYPE_CHECKING:
    from tda.run import Run

Ids = Annotated[list[str] | None, typer.Argument(metavar="ID…", help="Ids of training examples.")]
IdFile = Annotated[
    Path | None, typer.Option("--ids", metavar="FILE", help="A text file with one id a line.")
]


@app.command()
def verify(
    target: Target,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compute a sample of rows again (CONFIG only).")
    ] = False,
    sample: Annotated[int, typer.Option(min=1, help="Examples of --deep.")] = 64,
    seed: Annotated[int, typer.Option(help="Which examples --deep draws.")] = 0,
    set_: Overrides = None,
) -> None:
    """Read the whole store; name each chunk that is missing, torn or altered.

    Checksums say that a run is as it was written. --deep says that it was written of this model
    and these data: it computes rows of examples drawn at random, and names those that differ.

    Exit code 1 if anything is found.
    """
    from tda import upkeep
    from tda.cli import tables
    from tda.cli.workload import find_path, open_workload, train_of

    path = find_path(target, set_ or ())
    faults = upkeep.verify(path)
    if faults:
        tables.show(tables.faults(path, faults))
        raise typer.Exit(1)
    typer.echo(f"{path}: no faults")
    if not deep:
        return
    opened = open_workload(target, set_ or ())
    found = upkeep.deep(opened.run, train_of(opened.configuration("--deep")), sample, seed)
    train = opened.run.store.stored("train")
    count = min(sample, train.num_rows)
    if found:
        tables.show(tables.differences(path, found))
        typer.echo(upkeep.meaning(found, count, train.num_checkpoints))
        raise typer.Exit(1)
    typer.echo(
        f"{path}: {count} examples computed again at {train.num_checkpoints} checkpoints, "
        "all as stored"
    )


@app.command()
def repair(config: ConfigFile, set_: Overrides = None) -> None:
    """Compute again exactly what is damaged or missing.

    What `tda verify` finds is withdrawn and computed by the configuration's model of its data:
    rows, curvature, query sets, bases. The rest stays as it is. Says what was done.

    Exit code 1 if something is left that cannot be computed.
    """
    from tda import repair as repairing
    from tda.cli import tables
    from tda.cli.workload import open_workload, queries_of, train_of

    opened = open_workload(str(config), set_ or ())
    given = opened.configuration("repair")
    queries = {name: queries_of(given, name) for name in given.workload.queries}
    done = repairing.repair(opened.run, train_of(given), queries, progress=True)
    path = opened.run.path
    if not done.before:
        typer.echo(f"{path}: no faults")
        return
    tables.show(tables.faults(path, done.before))
    for table, checkpoint, chunk in done.computed:
        typer.echo(f"computed again: {table}, checkpoint {checkpoint}, chunk {chunk}")
    for name in done.written:
        typer.echo(f"put right: {name}")
    if done.after:
        tables.show(tables.faults(path, done.after))
        raise typer.Exit(1)
    typer.echo(f"{path}: no faults any more")


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


@app.command()
def relabel(config: ConfigFile, set_: Overrides = None) -> None:
    """Take over a training set in which some examples have changed: a label, say.

    The configuration's data are compared with those indexed, example by example in their places;
    only chunks that hold a changed one are computed again. More than half changed is refused.
    """
    from tda import growing
    from tda.cli.workload import open_workload, train_of

    opened = open_workload(str(config), set_ or ())
    data = train_of(opened.configuration("relabel"))
    done = growing.relabel(opened.run, data, progress=True)
    named = ", ".join(done.ids[:10].tolist()) + (" …" if len(done.ids) > 10 else "")
    typer.echo(f"{opened.run.path}: {len(done.ids)} examples changed {named}".rstrip())
    typer.echo(f"{len(done.computed)} chunks computed again")


@app.command()
def compact(
    target: Target,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="A new folder.")],
    set_: Overrides = None,
) -> None:
    """Copy a run without its deleted examples into a new folder.

    Then they are gone for good: delete the old folder. No row is computed. The training set of the
    new run is the old one without them; ground truths, being of the old one, are not taken along.
    """
    from tda import growing
    from tda.cli.workload import find_path

    store = growing.compact(find_path(target, set_ or ()), new, progress=True)
    typer.echo(f"{store.path}: {store.table('train').num_rows} examples")


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
