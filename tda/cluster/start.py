"""How each kind of Dask cluster is started, and reached."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tda.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from distributed import Client

    from tda.cluster import Cluster

_EXTRAS = {"slurm": "dask_jobqueue", "kubernetes": "dask_kubernetes"}
_TIMEOUT = 30  # seconds to reach a scheduler


def client_of(cluster: Cluster, stack: ExitStack) -> Client:
    """A client of the cluster, started first where that is to be done. Raises ClusterError."""
    if cluster.scheduler is not None:
        return _reach(cluster.scheduler)
    started = {"local": local, "slurm": slurm, "kubernetes": kubernetes}[cluster.kind](cluster)
    return _client(address=stack.enter_context(started))


def _client(**where: Any) -> Client:
    from distributed import Client

    return Client(**where, timeout=_TIMEOUT, set_as_default=True)


def _reach(scheduler: str) -> Client:
    where = {"address": scheduler} if ":" in scheduler else {"scheduler_file": scheduler}
    if "scheduler_file" in where and not Path(scheduler).is_file():
        raise ClusterError(
            "there is no such scheduler file",
            where=scheduler,
            wanted="an address such as tcp://host:8786, or the file of `dask scheduler "
            "--scheduler-file`",
        )
    try:
        return _client(**where)
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(
            "the scheduler cannot be reached",
            where=scheduler,
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do="check the address, and that `dask scheduler` runs there",
        ) from error


def local(cluster: Cluster) -> Any:
    """Processes of this machine, each on a GPU of its own where there are some."""
    import torch
    from distributed import Nanny, Scheduler, SpecCluster
    from distributed.system import MEMORY_LIMIT

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise _UNGUARDED
    count, gpus = cluster.workers or 0, torch.cuda.device_count()
    common = {
        "nthreads": 1,
        "memory_limit": MEMORY_LIMIT // count,
        "host": "127.0.0.1",
        "silence_logs": logging.ERROR,
        "dashboard": False,
    }
    workers = {}
    for number in range(count):
        own = {"CUDA_VISIBLE_DEVICES": _device(number % gpus)} if gpus else {}
        workers[number] = {"cls": Nanny, "options": {**common, "env": own}}
    options = {"host": "127.0.0.1", "port": 0, "dashboard": True, "dashboard_address": ":0"}
    try:
        return SpecCluster(
            workers=workers,
            scheduler={"cls": Scheduler, "options": options},
            silence_logs=logging.ERROR,
            shutdown_on_close=True,
        )
    except RuntimeError as error:
        raise _UNGUARDED from error


_UNGUARDED = ClusterError(
    "the workers' processes cannot start",
    where=getattr(sys.modules.get("__main__"), "__file__", None),
    found="most likely a script that starts them wherever it is imported: each process imports it",
    do='put what the script does under `if __name__ == "__main__":`',
)


def _device(number: int) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[number] if visible else str(number)


def slurm(cluster: Cluster) -> Any:
    """One job a worker, submitted by dask-jobqueue from here."""
    _require("slurm", cluster.options, ("memory",))
    from dask_jobqueue import SLURMCluster

    started = SLURMCluster(**slurm_options(cluster))
    started.scale(jobs=cluster.workers)
    return started


def slurm_options(cluster: Cluster) -> dict[str, Any]:
    """Arguments of SLURMCluster: those given, over what suits one piece at a time a job."""
    given = dict(cluster.options)
    exports = [f"export {name}={value}" for name, value in cluster.environment.items()]
    return {
        "cores": 1,  # pieces at a time: a worker holds one model …
        "job_cpu": cluster.threads,  # … and PyTorch has these
        "processes": 1,
        "job_name": "tda-worker",
        **given,
        "job_script_prologue": [*exports, *given.get("job_script_prologue", ())],
        "job_extra_directives": ["--requeue", *given.get("job_extra_directives", ())],
    }


def kubernetes(cluster: Cluster) -> Any:
    """One pod a worker, made by the Dask operator of the cluster that kubectl talks to."""
    _require("kubernetes", cluster.options, ("image",))
    from dask_kubernetes.operator import KubeCluster

    return KubeCluster(**kubernetes_options(cluster))


def kubernetes_options(cluster: Cluster) -> dict[str, Any]:
    """Arguments of KubeCluster: those given, and the workers' environment."""
    given = dict(cluster.options)
    return {
        "name": "tda",
        "worker_command": "dask-worker --nthreads 1",  # one piece at a time
        "n_workers": cluster.workers,
        **given,
        "env": {**cluster.environment, **given.get("env", {})},
    }


def _require(kind: str, options: Mapping[str, Any], wanted: tuple[str, ...]) -> None:
    from importlib.util import find_spec

    if find_spec(_EXTRAS[kind]) is None:
        raise ClusterError(
            f"{kind} needs a package that is not installed",
            found=f"no {_EXTRAS[kind]}",
            do=f"pip install 'tda-engine[{kind}]'",
        )
    missing = [name for name in wanted if name not in options]
    if missing:
        raise ConfigError(
            f"{kind} has to be told {' and '.join(missing)}",
            where="[cluster] options",
            found=", ".join(options) or "no options",
            do="options = { " + ", ".join(f"{name} = …" for name in missing) + " }",
        )


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """This process's environment, which children inherit, with the variables inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
