"""One TOML file a workload: what to index, with which projection, and which questions to ask.

    [run]         path
    [workload]    task, train, queries = {name = ...}, options = {...}
    [projection]  kind, dim, seed
    [index]       dtype, batch_size, chunk_rows, gauss_newton
    [query]       recipe, k
    [evaluate]    train, queries, kind, num_subsets, fraction, seeds, workers
    [value]       runs, bags
    [serve]       example
    [cluster]     workers, scheduler, kind, threads, options

``task``, both ``train`` and every entry of ``queries`` name Python code that builds the thing:
``module:function`` or ``file.py:function``, a file relative to the configuration's own folder or to
the current directory. **Using a configuration therefore runs code**; read one before you use it.
``options`` are keyword arguments: each function is given those it has a parameter for, and the
run's path when it has a parameter ``run_path`` (to keep its checkpoints with the run, say).
"""

from __future__ import annotations

import functools
import inspect
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from tda.code import CODE, accepted, did_you_mean, load_code
from tda.errors import ConfigError

if TYPE_CHECKING:
    from tda.store.files import Place


def _code(value: str) -> str:
    module, _, function = value.rpartition(":")
    if not module or not function.isidentifier():
        raise ValueError(f"wanted code as {CODE}")
    return value


def _query_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ValueError("a query set's name becomes a folder: letters, digits, '_', '.', '-'")
    return value


Code = Annotated[str, AfterValidator(_code)]
QueryName = Annotated[str, AfterValidator(_query_name)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunSection(_Section):
    """Where the finished run is written, relative to the current directory."""

    path: str = Field(min_length=1)


class WorkloadSection(_Section):
    """The code that builds the task and the data sets."""

    task: Code
    train: Code
    queries: dict[QueryName, Code] = {}
    options: dict[str, Any] = {}


class ProjectionSection(_Section):
    """How per-example gradients become rows: proj_dim numbers, the same for the same seed."""

    kind: str = "count_sketch"
    dim: PositiveInt = 2048
    seed: NonNegativeInt = 0


class IndexSection(_Section):
    """How rows are computed and stored; none of it changes a score beyond rounding.

    ``gauss_newton`` adds the table that recipe influence_gn needs (see ``Run.add_curvature``).
    """

    dtype: Literal["bfloat16", "float32", "int8", "int4", "ternary"] = "bfloat16"
    batch_size: PositiveInt | None = None
    chunk_rows: PositiveInt | None = None
    gauss_newton: bool | None = None


class QuerySection(_Section):
    """What is asked when the command line does not say."""

    recipe: str = "influence"
    k: PositiveInt = 10


class EvaluateSection(_Section):
    """Ground truth by retraining (see ``tda.evaluate.Design``).

    ``train`` is called as ``train(subset, seed)`` and returns a model trained on the training
    examples ``subset``; several ``workers`` train in as many processes.
    """

    train: Code | None = None
    queries: QueryName | None = None
    kind: Literal["half", "removal", "leave_one_out"] = "half"
    num_subsets: PositiveInt = 64
    fraction: float | None = Field(default=None, gt=0, lt=1)
    seeds: list[NonNegativeInt] = Field(default=[0, 1], min_length=1)
    workers: PositiveInt = 1


class ValueSection(_Section):
    """What ``tda value`` is told besides.

    ``runs``: folders of runs of independent trainings (seeds) on the same data, each a replicate of
    every value. ``groups``: a CSV file of columns id and any others, to roll values up by.
    ``bags``: of Data-OOB, 0 for none. For ``tda report --retrain``, the ``train`` of
    [evaluate] may also take ``relabel``, a dict from training index to the label to train on.
    """

    runs: list[str] = []
    groups: Path | None = None
    bags: NonNegativeInt = 0


class ServeSection(_Section):
    """How ``tda serve`` makes an example of what is uploaded.

    ``example`` is called as ``example(label, image=…)``, ``example(label, text=…)`` or
    ``example(label, row=…)``, whichever of the three it has a parameter for, and returns an example
    like those of the query sets. An image is uint8 ``[height, width]`` or ``[height, width, 3]``.
    """

    example: Code | None = None


class ClusterSection(_Section):
    """Where the work runs (see ``tda.cluster.Cluster``); nothing here: in the command's process.

    ``workers`` processes of this machine, or as many jobs or pods where ``kind`` is "slurm" or
    "kubernetes" and ``options`` are what dask-jobqueue or dask-kubernetes ask for; or the address
    or the file of a ``scheduler`` that is there already. ``threads``: of PyTorch in each worker.
    """

    workers: NonNegativeInt | None = None
    scheduler: str | None = None
    kind: Literal["local", "slurm", "kubernetes"] = "local"
    threads: PositiveInt = 1
    options: dict[str, Any] = {}


class Config(_Section):
    """A validated workload. ``folder`` is where its file lies: code files are looked up there."""

    run: RunSection
    workload: WorkloadSection
    projection: ProjectionSection = ProjectionSection()
    index: IndexSection = IndexSection()
    query: QuerySection = QuerySection()
    evaluate: EvaluateSection = EvaluateSection()
    value: ValueSection = ValueSection()
    serve: ServeSection = ServeSection()
    cluster: ClusterSection = ClusterSection()
    folder: Path = Field(default=Path(), exclude=True)

    @property
    def path(self) -> Place:
        from tda.store.files import as_place  # torch comes with it

        return as_place(self.run.path)

    def index_arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``tda.index`` that this configuration decides."""
        return {
            "projection": self.projection.kind,
            "proj_dim": self.projection.dim,
            "seed": self.projection.seed,
            **self.index.model_dump(exclude_none=True),
        }

    def build_task(self) -> Any:
        return self._build(self.workload.task)

    def build_train(self) -> Any:
        return self._build(self.workload.train)

    def build_queries(self, name: str) -> Any:
        """The query set ``name``. Raises ConfigError, with the names there are, for another."""
        if name not in self.workload.queries:
            known = list(self.workload.queries)
            raise ConfigError(
                f"no query set is called {name!r}",
                where="[workload] queries",
                found=name,
                wanted=", ".join(known) or "none is named in the configuration",
                do=did_you_mean(name, known),
            )
        return self._build(self.workload.queries[name])

    def build_retraining(self) -> Callable[[Any, int], Any]:
        """``train(subset, seed)`` of [evaluate], given the options. Raises ConfigError if none."""
        if self.evaluate.train is None:
            raise ConfigError(
                "the configuration does not say how to train again",
                where="[evaluate] train",
                wanted=f"a function (subset, seed) -> model, as {CODE}",
            )
        return self._given(self.evaluate.train)

    def build_example(self) -> Callable[..., Any] | None:
        """``example(label, …)`` of [serve], given the options; None if there is none."""
        return None if self.serve.example is None else self._given(self.serve.example)

    def _given(self, reference: str) -> Callable[..., Any]:
        """A function with its options, if it takes any."""
        function, options = self._function(reference)
        return functools.partial(function, **options) if options else function

    def _build(self, reference: str) -> Any:
        function, options = self._function(reference)
        return function(**options)

    def _function(self, reference: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        self._check_options()
        function = load_code(reference, self.folder)
        from tda.store.files import beside

        options = {"run_path": str(beside(self.path)), **self.workload.options}
        return function, accepted(function, options)

    @property
    def code(self) -> list[str]:
        """Every reference to code."""
        work, others = self.workload, (self.evaluate.train, self.serve.example)
        return sorted({work.task, work.train, *work.queries.values(), *filter(None, others)})

    def _check_options(self) -> None:
        """Every option must reach some function: one that none takes is a spelling mistake."""
        if not self.workload.options:
            return
        options = self.workload.options
        functions = [load_code(reference, self.folder) for reference in self.code]
        taken = {name for f in functions for name in accepted(f, options)}
        for name in options:
            if name not in taken:
                known = sorted({p for f in functions for p in inspect.signature(f).parameters})
                raise ConfigError(
                    f"no function of this workload takes the option {name!r}",
                    where=f"[workload] options.{name}",
                    wanted=", ".join(known) or "no option: the functions take no arguments",
                    do=did_you_mean(name, known),
                )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and validate the TOML file ``path``; each override is ``"section.key=value"``.

    Raises ConfigError that names the file, line and key of the first fault.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(
            "the configuration cannot be read", where=file, found=error.strerror
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the configuration is not TOML", where=file, found=error) from error
    overridden = {_override(data, override) for override in overrides}
    if "folder" in data:  # a field of ours, not a key of the file
        raise _unknown_key(file, ("folder",))
    try:
        return Config.model_validate({**data, "folder": file.resolve().parent})
    except ValidationError as error:
        raise _explain(error, file, text, overridden) from error


def _override(data: dict[str, Any], override: str) -> tuple[str, ...]:
    """Put ``a.b=value`` into ``data``; a value that is not TOML is taken as a string."""
    key, equals, value = override.partition("=")
    parts = tuple(part.strip() for part in key.split("."))
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(
            "an override could not be read",
            where="--set",
            found=override,
            wanted="section.key=value, for example projection.dim=4096",
        )
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    table = data
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{part!r} is not a section", where="--set", found=override)
    table[parts[-1]] = parsed
    return parts


def _explain(
    error: ValidationError, file: Path, text: str, overridden: set[tuple[str, ...]]
) -> ConfigError:
    fault = error.errors(include_url=False)[0]
    location = tuple(str(part) for part in fault["loc"] if part != "[key]")
    where = "--set" if location in overridden else _place(file, text, location)
    dotted = ".".join(location)
    if fault["type"] == "extra_forbidden":
        return _unknown_key(where, location)
    if fault["type"] == "missing":
        return ConfigError(f"the configuration lacks {dotted}", where=where, wanted=dotted)
    return ConfigError(
        f"the configuration's {dotted} is not valid",
        where=where,
        found=repr(fault["input"]),
        wanted=fault["msg"].removeprefix("Value error, "),
    )


def _unknown_key(where: object, location: tuple[str, ...]) -> ConfigError:
    *sections, key = location
    model: type[BaseModel] = Config
    for section in sections:
        annotation = model.model_fields[section].annotation
        assert isinstance(annotation, type), location
        model = annotation
    known = [name for name in model.model_fields if name != "folder"]
    return ConfigError(
        f"the configuration has an unknown {'key' if sections else 'section'} {'.'.join(location)}",
        where=where,
        found=key,
        wanted=", ".join(known),
        do=did_you_mean(key, known),
    )


def _place(file: Path, text: str, location: tuple[str, ...]) -> str:
    """``file:line`` of the key, found by reading the TOML line by line; ``file`` when not found."""
    section: tuple[str, ...] = ()
    best = None
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[([^\[\]]+)\]", line)
        key = re.match(r"\s*([\w.\"'-]+)\s*=", line)
        if header:
            section = _split(header[1])
            here = section
        elif key:
            here = (*section, *_split(key[1]))
        else:
            continue
        if here[: len(location)] == location:  # also a dotted key that opens the table meant
            return f"{file}:{number}"
        if here and here == location[: len(here)]:
            best = number  # the section, or the inline table, that holds the key
    return f"{file}:{best}" if best else str(file)


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
