"""From what the command line names, a configuration or a folder, to a run that answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import tda
from tda.cli.exits import until_the_end
from tda.cluster import remade
from tda.code import load_code
from tda.config import Config, QuerySection, ValueSection, load_config
from tda.errors import ConfigError, StoreError
from tda.store.files import Place, Remote, as_place, stat_file
from tda.store.lock import waiting
from tda.store.manifest import NAME, TRAIN
from tda.store.remote import traffic, traffic_said

if TYPE_CHECKING:
    from tda.data import Dataset
    from tda.recipe import Recipe
    from tda.run import Run
    from tda.task import Task


@dataclass(frozen=True)
class Opened:
    """A run, and the configuration it was named by, if it was."""

    run: Run
    config: Config | None

    @property
    def defaults(self) -> QuerySection:
        """What is asked when the command line does not say."""
        return self.config.query if self.config else QuerySection()

    @property
    def valuation(self) -> ValueSection:
        return self.config.value if self.config else ValueSection()

    def configuration(self, what: str) -> Config:
        """Of the model and data that ``what`` needs. Raises ConfigError where a run was named."""
        if self.config is None:
            raise ConfigError(
                f"{what} needs the model and the data",
                found=f"the run {self.run.path}",
                do="name the configuration it was made by: a TOML file, see configs/",
            )
        return self.config

    def recipe(self, name: str | None, layers_for: str | None = None) -> Recipe:
        """The recipe that is meant, with layer weights learned for the query set ``layers_for``.

        Says on the error stream which recipe "auto" is, and why, and what was learned.
        """
        asked = name or self.defaults.recipe
        chosen = self.run.recipe(asked)
        if asked != chosen.name:
            typer.echo(f"{asked}: {chosen.name}. {chosen.summary}", err=True)
        if layers_for is not None:
            chosen = self.run.learn_layer_weights(layers_for, chosen)
            learned = ", ".join(f"{layer} {weight:.2f}" for layer, weight in chosen.layer_weights)
            typer.echo(f"layer weights: {learned}", err=True)
        return chosen

    def query_set(self, name: str | None) -> str:
        """The query set that is meant, stored in the run.

        One that the configuration names is featurized now if the run does not hold it yet.
        Raises ConfigError when ``name`` is None and there is not exactly one, and StoreError before
        it computes anything if the training set is not indexed to the end.
        """
        configured = list(self.config.workload.queries) if self.config else []
        known = list(dict.fromkeys([*configured, *self.run.queries]))
        if name is None:
            if len(known) != 1:
                raise ConfigError(
                    "which query set?" if known else "this run has no query set",
                    where=self.run.path,
                    found=", ".join(known) or None,
                    do="name one with --queries" if known else self._how_to_ask,
                )
            name = known[0]
        if self.config is not None and name in configured:
            self.run.store.table(TRAIN).require_complete()  # before queries are computed
            return _add_queries(self.run, self.config, name)
        if name not in known:
            raise ConfigError(
                f"the run has no query set {name!r}",
                where=self.run.path,
                found=name,
                wanted=", ".join(known) or "there is none",
                do=self._how_to_ask,
            )
        return name

    @property
    def _how_to_ask(self) -> str:
        """What stores a query set."""
        if self.config is not None:
            return "add it to [workload] queries"
        return (
            "name its configuration in place of the run, with the queries in [workload]; or in "
            "Python: tda.open(path, task).add_queries(dataset, name)"
        )


def open_workload(target: str, overrides: Sequence[str]) -> Opened:
    """Open the run of a configuration (with its task: it can featurize) or of a folder."""
    config = _config(target, overrides)
    if config is None:
        return Opened(tda.open(target), None)
    return open_config(config, target)


def open_config(config: Config, target: object = "CONFIG") -> Opened:
    """Open the run of a configuration. Raises StoreError if it has none yet."""
    if stat_file(config.path / NAME) is None:
        raise StoreError(
            "this workload has no run yet", where=config.path, do=f"tda index {target}"
        )
    return Opened(tda.open(config.path, task=task_of(config)), config)


def find_path(target: str, overrides: Sequence[str]) -> Place:
    """The run's folder, without running the configuration's code."""
    config = _config(target, overrides)
    return as_place(target) if config is None else config.path


def task_of(config: Config) -> Task:
    """The task that the configuration's code builds; workers build their own.

    With a sharded model the command goes on in the process that leads (`tda.lead`); the others
    follow until it ends. Raises ConfigError if it is something else.
    """
    from tda.gradients.sharded.leading import leading
    from tda.layout import is_sharded
    from tda.task import Task

    task = config.build_task()
    if not isinstance(task, Task):
        raise ConfigError(
            f"{config.workload.task} did not build a task",
            where="[workload] task",
            found=type(task).__name__,
            wanted="a function that returns a tda.Task",
        )
    if is_sharded(task.model) and not until_the_end(leading(task.model)):
        raise typer.Exit
    return remade(task, partial(task_of, config))


def train_of(config: Config) -> Dataset:
    """The training set that the configuration's code builds; workers build their own."""
    from tda.data import as_dataset

    return remade(as_dataset(config.build_train()), partial(train_of, config))


def queries_of(config: Config, name: str) -> Dataset:
    """The query set ``name`` that the configuration's code builds; workers build their own."""
    from tda.data import as_dataset

    return remade(as_dataset(config.build_queries(name)), partial(queries_of, config, name))


def index_workload(config: Config, wait: bool = False) -> Place:
    """Index the training set and every query set of ``config``; the run's place.

    wait: for another process that is writing the run. Of a run in object storage says on the error
    stream what this process asked of it.
    """
    before = Counter(traffic)
    with waiting() if wait else nullcontext():
        task, train = task_of(config), train_of(config)
        run = tda.index(task, train, config.path, **config.index_arguments())
        for name in config.workload.queries:
            _add_queries(run, config, name)
    if isinstance(run.path, Remote):
        typer.echo(f"{run.path}: {traffic_said(before)}", err=True)
    return run.path


def digits_demo() -> Callable[[Path], Path]:
    """``demo`` of jobs/digits.py: the checkout's, or the one a wheel installs as share/tda/jobs."""
    job = next((path for path in _digits_jobs() if path.is_file()), None)
    if job is None:
        raise ConfigError(
            "the demo's job is not part of this installation",
            wanted=" or ".join(map(str, _digits_jobs())),
            do="reinstall tda-engine",
        )
    return load_code(f"{job.resolve()}:demo", job.parent)


def _digits_jobs() -> list[Path]:
    checkout = Path(tda.__file__).parents[1] / "jobs" / "digits.py"
    try:
        shipped = files("tda-engine") or []
    except PackageNotFoundError:  # a checkout on the path, never installed
        shipped = []
    return [checkout, *(Path(str(f.locate())) for f in shipped if f.match("tda/jobs/digits.py"))]


def _add_queries(run: Run, config: Config, name: str) -> str:
    """Featurize the query set ``name`` of ``config``, unless the run holds it already."""
    size = config.index.batch_size
    batch = {} if size is None else {"batch_size": size}
    return run.add_queries(queries_of(config, name), name, progress=True, **batch)


def _config(target: str, overrides: Sequence[str]) -> Config | None:
    if target.endswith(".toml"):
        return load_config(target, overrides)
    if overrides:
        raise ConfigError(
            "only a configuration can be overridden",
            where="--set",
            found=target,
            wanted="a .toml file in place of the run's folder",
        )
    return None
