"""Where work runs: here, or on a Dask cluster. Nothing outside this package knows how one starts.

Cluster()                                  here, one piece after the other (the default)
Cluster(workers=4)                         processes of this machine, one a GPU if it has some
Cluster(scheduler="tcp://10.0.0.1:8786")   whoever is connected there; or a scheduler file
Cluster(workers=64, kind="slurm", options={"queue": "gpu", "cores": 4, "memory": "32GB"})
Cluster(workers=64, kind="kubernetes", options={"image": "registry/tda:1"})

with Cluster(workers=4).open():
    run = tda.index(task, data, path)      # the same bytes, whoever computes them
    run.top_k(queries)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tda.cluster.delivery import remade
from tda.cluster.leaving import PreemptedError, on_sigterm
from tda.cluster.pool import Workers, is_open, run, shares
from tda.errors import ConfigError
from tda.malloc import KEPT

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "Cluster",
    "PreemptedError",
    "is_open",
    "on_sigterm",
    "remade",
    "run",
    "shares",
    "working",
]

KINDS = ("local", "slurm", "kubernetes")

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SETTINGS = {
    # Pieces leave nothing in a worker, so there is nothing to spill and no use in waiting.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.scheduler.allowed-failures": 9,
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.worker.profile.enabled": False,  # a look at every thread each 10 ms
    # A score matrix travels with its queries, once a worker.
    "distributed.admin.large-graph-warning-threshold": "1GiB",
}


@dataclass(frozen=True)
class Cluster:
    """A place to run, as a value.

    workers: processes of this machine, or jobs, or pods; None or 0: no cluster.
    scheduler: address or scheduler file of a Dask scheduler that is there already.
    kind: local, slurm or kubernetes: who starts the workers.
    threads: of PyTorch in each worker.
    options: arguments of ``dask_jobqueue.SLURMCluster`` or ``dask_kubernetes``'s ``KubeCluster``.
    Raises ConfigError for what contradicts itself.
    """

    workers: int | None = None
    scheduler: str | None = None
    kind: Literal["local", "slurm", "kubernetes"] = "local"
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"{name} is not a count", found=repr(value), wanted=f"≥ {least}")
        if self.kind not in KINDS:
            raise ConfigError(f"unknown kind of cluster {self.kind!r}", wanted=", ".join(KINDS))
        if self.scheduler is not None and (self.workers or self.kind != "local"):
            raise ConfigError(
                "a scheduler that is there already has its workers",
                found=f"scheduler={self.scheduler!r}, workers={self.workers}, kind={self.kind!r}",
                do="give either the scheduler, or how many workers to start",
            )
        if self.kind != "local" and not self.workers:
            raise ConfigError(f"how many workers shall {self.kind} start?", wanted="workers ≥ 1")
        if self.options and self.kind == "local":
            raise ConfigError(
                "options are those of SLURM or Kubernetes",
                found=", ".join(self.options),
                do='say which: kind = "slurm" or kind = "kubernetes"',
            )

    @staticmethod
    def of(given: int | str | Cluster | None) -> Cluster:
        """From a number of workers, a scheduler's address, or a Cluster."""
        if isinstance(given, Cluster):
            return given
        return Cluster(scheduler=given) if isinstance(given, str) else Cluster(workers=given)

    @property
    def environment(self) -> dict[str, str]:
        """What workers find in theirs.

        Dask's own trim threshold (64 KiB) would be 1.4 to 2.1 times the cost of a scan.
        """
        return KEPT | dict.fromkeys(_THREADS, str(self.threads))

    @contextmanager
    def open(self, show: bool = False) -> Iterator[None]:
        """Start or reach it; work that is done inside goes there. Raises ClusterError.

        show: print the dashboard's address, if there is one.
        """
        if not self.workers and self.scheduler is None:
            yield
            return
        with self.started() as workers, workers.taking_work():
            if show:
                _announce(workers.client)
            yield

    @contextmanager
    def started(self) -> Iterator[Workers]:
        """Its workers. Raises ClusterError."""
        import dask
        import distributed  # noqa: F401  (its defaults must be there before they are changed)

        from tda.cluster import start

        settings = _SETTINGS | {"distributed.nanny.pre-spawn-environ": self.environment}
        with ExitStack() as stack:
            stack.enter_context(start.environment(self.environment))
            stack.enter_context(dask.config.set(settings))
            client = stack.enter_context(start.client_of(self, stack))
            from tda.cluster.worker import Settling

            client.register_plugin(Settling(self.threads))
            yield Workers(client)


@contextmanager
def working(given: int | str | Cluster | None, show: bool = False) -> Iterator[None]:
    """As ``Cluster.of(given).open()``; but a cluster that is open already serves."""
    if is_open():
        yield
        return
    with Cluster.of(given).open(show):
        yield


def _announce(client: Client) -> None:
    """The address of Dask's own pages about the scheduler and its workers, if it serves them."""
    from importlib.util import find_spec

    if "dashboard" in client.scheduler_info(n_workers=0)["services"]:
        needs = "" if find_spec("bokeh") else " (to see it: pip install 'tda-engine[dashboard]')"
        print(f"dashboard: {client.dashboard_link}{needs}", file=sys.stderr)
