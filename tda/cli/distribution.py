"""``--workers`` and ``--scheduler``: where a command's work runs, and how it leaves early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tda.cluster import Cluster

if TYPE_CHECKING:
    from tda.config import Config

Workers = Annotated[
    int | None,
    typer.Option("--workers", metavar="N", min=0, help="Processes of this machine; or [cluster]."),
]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", metavar="ADDRESS", help="A Dask scheduler, or its file."),
]


@contextmanager
def working(
    config: Config | None, workers: int | None = None, scheduler: str | None = None
) -> Iterator[None]:
    """Where the command line says, else where [cluster] does, else in this process.

    Raises ConfigError, ClusterError.
    """
    with _chosen(config, workers, scheduler).open(show=True):
        yield


def _chosen(config: Config | None, workers: int | None, scheduler: str | None) -> Cluster:
    if workers is not None or scheduler is not None:
        return Cluster(workers=workers, scheduler=scheduler)
    return Cluster() if config is None else Cluster(**config.cluster.model_dump())
