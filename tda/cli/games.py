"""``tda game`` and ``tda shift``: who contributed what to a result, and why a result changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tda.cli import app
from tda.cli.distribution import Scheduler, Workers, working


@app.command()
def game(
    utility: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION", help="Or file.py:function; `function(members) -> float`."
        ),
    ],
    player: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A player; repeatable.")
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="CONFIG|RUN", help="Groups of its training examples are the players."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Of --run: label, source, group, or of --groups."),
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Columns id and any others.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="shapley, banzhaf, leave_one_out, or beta:16,1 (alpha, beta).")
    ] = "shapley",
    samples: Annotated[
        int, typer.Option(min=8, help="Permutations; coalitions for banzhaf.")
    ] = 256,
    truncation: Annotated[
        float | None,
        typer.Option(min=0, help="A permutation ends this close to the utility of all."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which coalitions are drawn.")] = 0,
    out: Annotated[Path, typer.Option(metavar="FILE.parquet")] = Path("game.parquet"),
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """What each player adds to a result: sources, annotators, shards, parts of a model.

    The function says what a coalition of players achieves, e.g. the accuracy of a model trained on
    their examples: it is given the names of its members and, if it has a parameter `indices`, the
    positions of their training examples in --run. Few players are enumerated, and the answer is
    exact; of many, coalitions are drawn, and r_hat and split_half say whether that was enough.
    Utilities are kept in FILE-….jsonl as they come: interrupted, or with more --samples, the same
    command goes on.

    Example: `tda game job.py:accuracy --run my_run --by source --kind banzhaf --workers 4`
    """
    from tda.cli import playing, tables

    with working(None, workers, scheduler):
        found = playing.play(
            utility,
            playing.players_of(player or (), run, by, groups),
            kind,
            out=out,
            samples=samples,
            truncation=truncation,
            seed=seed,
        )
    tables.show(playing.table(found))
    typer.echo(playing.verdict(found))
    typer.echo(out)


@app.command()
def shift(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A .csv or .parquet file.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another, of the same columns.")],
    metric: Annotated[
        str,
        typer.Option(metavar="COLUMN", help="What is averaged: each example's loss, or 0 and 1."),
    ],
    mechanism: Annotated[
        list[str],
        typer.Option(metavar="'A, B | C'", help="What may have moved: P(A, B | C); repeatable."),
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE.parquet")] = None,
    seed: Annotated[int, typer.Option(help="Of the folds of the classifiers.")] = 0,
) -> None:
    """Why did a metric change between two data sets, of one model?

    The difference of the means is shared out, by Shapley values, over the distributions that may
    have moved, as importance weighting tells them apart. Text and whole numbers are categories,
    other numbers quantities.

    Example: `tda shift old.csv new.csv --metric loss --mechanism source --mechanism 'x | source'`
    """
    from tda.cli import playing, tables

    found = playing.shifted(before, after, metric, mechanism, seed)
    tables.show(playing.shift_table(found, metric))
    typer.echo(f"{found.verdict}.")
    if out is not None:
        playing.write_shift(found, out)
        typer.echo(out)
