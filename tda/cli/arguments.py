"""What several commands take: a workload or a run, what to ask of it, and with what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG|RUN", help="A configuration (.toml), a run's folder or its s3://…"
    ),
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
GroupsFile = Annotated[
    Path | None,
    typer.Option(
        "--groups",
        metavar="FILE.csv",
        help="Columns id and any others (licence, annotator, date, …): values by each of them.",
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME", help="`tda recipes` lists them; or auto."),
]
LearnLayers = Annotated[
    bool,
    typer.Option(
        "--learn-layer-weights",
        help="Weigh the layers so that each query's best examples stand out from all others.",
    ),
]
