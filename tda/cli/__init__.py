"""The command line: ``tda demo | index | query | score | evaluate | report | verify | …``.

Nothing heavy is imported before a command needs it, so that ``tda --help`` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import tda
from tda.errors import TdaError

INTERRUPTED = 130  # the shell's convention for a process ended by Ctrl-C

Target = Annotated[
    str, typer.Argument(metavar="CONFIG|RUN", help="A configuration (.toml) or a run's folder.")
]
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A workload's TOML file; it names code that runs.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override one value of the configuration, e.g. projection.dim=4096; repeatable.",
    ),
]
QuerySet = Annotated[
    str | None,
    typer.Option("--queries", metavar="NAME", help="The query set; needed when there are several."),
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME", help="The method; `tda recipes` lists them."),
]


class Commands(TyperGroup):
    """Every command ends in an exit code: errors made on purpose are shown without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TdaError as error:
            typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo(
                "\ninterrupted. What is finished is kept; the same command resumes.", err=True
            )
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    add_completion=False,
    epilog="Exit codes: 0 done, 1 an error or a fault found, 2 wrong usage, 130 interrupted.",
)


def main() -> None:
    app(prog_name="tda")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tda {tda.__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Which training examples made a model do that, and what is each of them worth?

    Try it: **tda demo** trains a small network on real digits and writes a report.

    Your own workload is one TOML file (see configs/). **tda plan** says what it will cost,
    **tda index** stores every training example's projected gradients once, and **tda query**,
    **tda score** and **tda report** then answer with any recipe, without touching the model again.
    """


@app.command()
def demo(
    path: Annotated[Path, typer.Option(help="Where the run is written.")] = Path("stores/demo"),
) -> None:
    """Train on real digits, index, ask, write a report.

    A small network is trained on scikit-learn's handwritten digits with three checkpoints along
    training; the 1,437 training images are indexed, the 360 test images are asked about, and
    report.html in the run's folder, whose path is printed last, shows which training images spoke
    for and against each prediction. Under two minutes on two cores. Interrupted, it resumes.
    """
    from tda.cli.workload import digits_demo

    typer.echo(digits_demo()(path))


@app.command()
def plan(config: ConfigFile, set_: Overrides = None) -> None:
    """What `tda index` would cost: rows, bytes, memory, time.

    Counted where it can be, and measured by a probe of a few seconds where it cannot.
    Nothing of the run is written: the probe indexes a few examples into a temporary store.
    """
    from tda.cli import planning, tables
    from tda.config import load_config

    tables.show(planning.plan(load_config(config, set_ or ())).table())


@app.command()
def index(config: ConfigFile, set_: Overrides = None) -> None:
    """Featurize the training set and the queries, and store them.

    Every training example's gradient at every checkpoint is projected and written once; recipes
    are chosen later, by `query`, `score` and `report`. Interrupted, the same command resumes; a
    finished run is left as it is; a run made from another model, data set or projection is
    refused with the field that differs.
    """
    from tda.cli.workload import index_workload
    from tda.config import load_config

    typer.echo(index_workload(load_config(config, set_ or ())))


@app.command()
def query(
    target: Target,
    queries: QuerySet = None,
    recipe: RecipeName = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="Examples per side.")] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", metavar="ID", help="Only this query; repeatable."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the answers to this .json or .parquet file."),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Queries to print.")] = 5,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="FAISS candidates, then exact re-rank.")
    ] = False,
    set_: Overrides = None,
) -> None:
    """The training examples most for and most against each query.

    A positive score: training on that example is predicted to help the query (proponents);
    a negative one: to harm it (opponents). Beside them the nearest examples by the last hidden
    layer, which needs no gradient. A CONFIG's query sets are featurized when the run does
    not hold them yet; a RUN answers from what it holds, without the model or the data.

    Example: `tda query stores/digits --recipe trak -k 5 --out answers.parquet`
    """
    from tda.cli import answers, tables
    from tda.cli.workload import open_workload

    if out is not None:
        answers.check_format(out)
    opened = open_workload(target, set_ or ())
    name = opened.query_set(queries)
    chosen, depth = recipe or opened.defaults.recipe, k or opened.defaults.k
    top = opened.run.top_k(name, k=depth, recipe=chosen, approximate=approximate)
    answer = answers.collect(opened.run, name, chosen, top, ids or ())
    for table in answer.tables(show):
        tables.show(table)
    if answer.num_queries > show and out is None:
        typer.echo(f"{answer.num_queries - show} more queries: --show, --id or --out")
    if out is not None:
        answer.write(out)
        typer.echo(out)


@app.command()
def score(
    target: Target,
    queries: QuerySet = None,
    recipe: RecipeName = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Default: RUN/scores/QUERIES-RECIPE.zarr."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """The full matrix of scores [query, train], written to Zarr.

    float32, computed and written block by block: memory stays bounded however large the matrix
    is. An earlier matrix of that name is replaced.
    """
    from tda.cli.answers import write_scores
    from tda.cli.workload import open_workload

    opened = open_workload(target, set_ or ())
    name, chosen = opened.query_set(queries), recipe or opened.defaults.recipe
    where = out or opened.run.path / "scores" / f"{name}-{chosen}.zarr"
    write_scores(opened.run.scores(name, recipe=chosen), where, queries=name, recipe=chosen)
    typer.echo(where)


@app.command()
def evaluate(
    config: ConfigFile,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", metavar="NAME", help="Only this method; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the ground truth; default: its kind.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """How well each method foretells what retraining does.

    Trains again, as \\[evaluate] in the configuration says, without some of the training examples,
    and compares what became of the queries with what the scores foretold: the linear datamodeling
    score with its 95 % interval over queries and subsets, beside the score that noise allows.
    Interrupted, the same command resumes. Retrainings and results are kept in RUN/evaluate/NAME.

    Example: `tda evaluate configs/digits.toml --recipe influence --recipe trak`
    """
    from tda.cli import evaluation, tables
    from tda.config import load_config

    compared = evaluation.evaluate(load_config(config, set_ or ()), recipe or (), name)
    tables.show(evaluation.table(compared))
    typer.echo(compared.write())


@app.command()
def report(
    target: Target,
    queries: QuerySet = None,
    recipe: RecipeName = None,
    set_: Overrides = None,
) -> None:
    """Write RUN/report.html.

    One page that needs no network and no JavaScript: the queries with the training examples that
    spoke for and against them, the suspects, the values, and the card of how it was computed.

    Example: `tda report stores/digits`
    """
    from tda.cli.workload import open_workload
    from tda.report import write_report

    opened = open_workload(target, set_ or ())
    name = opened.query_set(queries)
    typer.echo(write_report(opened.run, query_name=name, recipe=recipe or opened.defaults.recipe))


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
def recipes() -> None:
    """The methods there are, each with its formula and its paper."""
    from tda.cli import tables
    from tda.recipes import RECIPES

    tables.show(tables.recipes(RECIPES.values()))
