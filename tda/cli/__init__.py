"""The command line: ``tda demo | index | query | score | value | report | …``.

Nothing heavy is imported before a command needs it, so that ``tda --help`` is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tda
from tda.cli.arguments import (
    ConfigFile,
    GroupsFile,
    LearnLayers,
    Overrides,
    QuerySet,
    RecipeName,
    Target,
)
from tda.cli.distribution import Scheduler, Workers, working
from tda.cli.exits import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    add_completion=False,
    epilog="Exit codes: 0 done, 1 an error or a fault found, 2 wrong usage, 75 stopped by SIGTERM "
    "(run it again), 130 interrupted.",
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
def index(
    config: ConfigFile,
    workers: Workers = None,
    scheduler: Scheduler = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="For whoever is writing this run, and then go on.")
    ] = False,
    set_: Overrides = None,
) -> None:
    """Featurize the training set and the queries, and store them.

    Every training example's gradient at every checkpoint is projected and written once; recipes
    are chosen later, by `query`, `score` and `report`. Interrupted, the same command resumes; a
    finished run is left as it is; a run made from another model, data set or projection is
    refused with the field that differs. The store does not depend on where it is computed.
    """
    from tda.cli.workload import index_workload
    from tda.config import load_config

    loaded = load_config(config, set_ or ())
    with working(loaded, workers, scheduler):
        typer.echo(index_workload(loaded, wait))


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
    learn_layers: LearnLayers = False,
    workers: Workers = None,
    scheduler: Scheduler = None,
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
        answers.check_out(out)
    opened = open_workload(target, set_ or ())
    with working(opened.config, workers, scheduler):
        name = opened.query_set(queries)
        chosen, depth = (
            opened.recipe(recipe, name if learn_layers else None),
            k or opened.defaults.k,
        )
        prepared = opened.run.prepare(name, chosen)
        top = opened.run.top_k(prepared, k=depth, approximate=approximate)
    answer = answers.collect(opened.run, name, prepared, top, ids or ())
    for table in answer.tables(show):
        tables.show(table)
    if show and answer.rule:
        typer.echo(f"★ {answer.rule}: a screen, not a proof.")
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
    learn_layers: LearnLayers = False,
    workers: Workers = None,
    scheduler: Scheduler = None,
    set_: Overrides = None,
) -> None:
    """The full matrix of scores [query, train], written to Zarr.

    float32, computed and written block by block: memory stays bounded however large the matrix
    is. An earlier matrix of that name is replaced.
    """
    from tda.cli.answers import write_scores
    from tda.cli.workload import open_workload

    opened = open_workload(target, set_ or ())
    with working(opened.config, workers, scheduler):
        name = opened.query_set(queries)
        chosen = opened.recipe(recipe, name if learn_layers else None)
        from tda.store.files import beside

        where = out or beside(opened.run.path) / "scores" / f"{name}-{chosen.name}.zarr"
        scores = opened.run.scores(name, recipe=chosen)
        write_scores(scores, where, queries=name, recipe=chosen.name)
    typer.echo(where)


@app.command()
def evaluate(
    config: ConfigFile,
    queries: QuerySet = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", metavar="NAME", help="Only this method; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the ground truth; default: its kind.")
    ] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
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

    loaded = load_config(config, set_ or ())
    with working(loaded, workers, scheduler):
        compared = evaluation.evaluate(loaded, recipe or (), name, queries)
    tables.show(evaluation.table(compared))
    typer.echo(compared.write())


@app.command()
def value(
    target: Target,
    queries: QuerySet = None,
    recipe: RecipeName = None,
    by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="For slices of the queries: label, source, group."),
    ] = None,
    slice_: Annotated[
        str | None,
        typer.Option("--slice", metavar="COLUMN=NAME", help="For these queries only."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="loss, margin or accuracy; default: the recipe's."),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="Another training on the same data; repeatable."),
    ] = None,
    groups: GroupsFile = None,
    bags: Annotated[int | None, typer.Option(min=0, help="Also Data-OOB, with so many.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="Default: in RUN/value.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Examples to print of each end.")] = 5,
    set_: Overrides = None,
) -> None:
    """What each training example is worth, and how sure that is.

    For a query set, or slices of it: value, 95 % interval, p and q (false discovery rate) of every
    training example, and roll-ups by label, source, group and the columns of --groups; beside them
    KNN-Shapley values.
    Intervals need replicates: runs of other seeds (--run), or checkpoints, which of one training
    depend on each other. Written to values.parquet and groups.parquet.

    Example: `tda value stores/digits --by label`
    """
    from tda.cli import tables, valuing
    from tda.cli.workload import open_workload

    opened = open_workload(target, set_ or ())
    section = opened.valuation
    valued = valuing.value(
        opened.run,
        opened.query_set(queries),
        recipe or opened.defaults.recipe,
        by=by,
        only=slice_,
        others=run or section.runs,
        bags=section.bags if bags is None else bags,
        groups=groups or section.groups,
        metric=metric,
    )
    for table in valued.tables(show):
        tables.show(table)
    typer.echo(f"{valued.found.verdict}.\nThe intervals cover {valued.found.covers}.")
    typer.echo("\n".join(valued.why_not), nl=bool(valued.why_not))
    from tda.store.files import beside

    for path in valued.write(out or valuing.place(beside(opened.run.path), by, slice_)):
        typer.echo(path)


@app.command()
def report(
    target: Target,
    queries: QuerySet = None,
    recipe: RecipeName = None,
    diff: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Say what changed since the report of another run."),
    ] = None,
    groups: GroupsFile = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Do what it proposes, measure.")
    ] = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'KEY OP NUMBER'",
            help="Exit 1 if this holds in summary.json, e.g. 'trust.num_failed > 0'; repeatable.",
        ),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write RUN/report.html and the files beside it.

    One page, without network or JavaScript: whether to trust it; what to relabel, remove or review;
    what each example, source and class is worth; what spoke for and against each query. Beside it
    summary.json, values.parquet, top_k.parquet and actions.csv.

    Example: `tda report stores/digits --fail-if 'decisions.share_mislabelled > 5%'`
    """
    from tda.cli import reporting
    from tda.cli.workload import open_workload
    from tda.report import gates

    wanted = [gates.parse(text) for text in fail_if or ()]
    opened = open_workload(target, set_ or ())
    named = groups or opened.valuation.groups
    page = reporting.report(opened, opened.query_set(queries), recipe, diff, retrain, named)
    typer.echo(page)
    fired = gates.fired(wanted, reporting.summary_of(page))
    for gate, found in fired:
        typer.secho(f"gate: {gate.text} (it is {found:.6g})", fg="red", err=True)
    if fired:
        raise typer.Exit(1)


@app.command()
def serve(
    target: Target,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8765,
    token: Annotated[
        str | None,
        typer.Option(envvar="TDA_TOKEN", help="Asked of everyone; random if others can connect."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name the server is reached by; repeatable."),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Explore a run in the browser.

    Pick a query and see what spoke for and against it; switch recipe and damping live; compare
    recipes; mark examples to relabel, remove or keep. Served from a CONFIG, new queries can be
    uploaded. Only this machine is listened to, unless --host says otherwise: then the address
    printed holds a token. Needs `pip install 'tda-engine[serve]'`.

    Example: `tda serve stores/digits`
    """
    from tda.cli import serving
    from tda.cli.workload import open_workload

    serving.require_extra()
    opened = open_workload(target, set_ or ())
    serving.serve(opened, host, port, token, name or (), typer.echo)


@app.command()
def recipes() -> None:
    """The methods there are, each with its formula and its paper."""
    from tda.cli import tables
    from tda.recipes import RECIPES

    tables.show(tables.recipes(RECIPES.values()))


from tda.cli import games, upkeep  # noqa: E402, F401 – their commands use the names above
