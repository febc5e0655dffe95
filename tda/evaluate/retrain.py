"""Ground truth: train again without some of the examples, and look at the queries.

outputs[subset, seed, query] = f(query; train(subset, seed))
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tda.cluster import run as run_pieces
from tda.cluster import working
from tda.data import Batch, as_dataset, batches, to
from tda.errors import ConfigError, DataError, TaskError
from tda.evaluate.design import Design
from tda.evaluate.record import FOLDER, GroundTruth, Record
from tda.examples import describe
from tda.gradients.exact import differentiable
from tda.identity import digest, settings_of, source_of
from tda.layout import is_spread
from tda.measurements import Measurement
from tda.progress import Tick
from tda.run import Run
from tda.store.files import Place
from tda.task import Task

Train = Callable[[np.ndarray, int], Any]
Unit = tuple[int, int]  # subset, position of the seed

_BATCH = 256  # queries measured at once
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


def ground_truth(
    run: Run,
    train: Train,
    queries: Any,
    design: Design | None = None,
    *,
    name: str | None = None,
    workers: int = 1,
    progress: bool = True,
) -> GroundTruth:
    """Retrain on the subsets of a design and keep what becomes of the queries.

    train: ``(subset, seed) -> nn.Module``, a model trained on the training examples ``subset``
    (int64 indices, ascending), in the way the run's own was; the task's measurement is taken of it
    in eval mode. It may also return the outputs themselves, ``[query]``, higher being better.
    Its randomness must follow from ``seed`` alone; torch is seeded with it before each call. One
    that has ``many(list of (subset, seed)) -> models`` and ``group``, such as `Ensemble`, is given
    ``group`` of them at a time.
    queries: the data set (not its name: the store keeps gradients, not inputs).
    name: of the folder RUN/evaluate/NAME, by default the design's kind.
    workers: 1 trains in this process; more train in as many processes of one thread each; a cluster
    that is open (`tda.Cluster`) is used in any case.

    Each retraining is kept as soon as it is done: the same call resumes, whenever it was stopped,
    and a design with more subsets or seeds trains only those. Raises MismatchError where the folder
    was made of other data, queries, measurement or source of ``train``; TaskError where outputs are
    not finite.
    """
    design = design or Design()
    data = as_dataset(queries)
    examples = describe(data)
    measurement = run.store.manifest["measurement"]
    made_of = {
        "train": run.store.manifest["data"]["train"],
        "queries": {"num_rows": len(examples), "digest": examples.digest()},
        "measurement": {"name": measurement["name"], "digest": measurement["digest"]},
        "train_function": _digest(train),
    }
    record = Record.create(_folder(run, name or design.kind), design, made_of)
    groups = _groups(record, train)
    if groups:
        measure = None if run.task is None else Measure.of(run.task, data)
        with working(workers if workers > 1 else None, progress):
            run_pieces(
                Retraining(train, measure, record), groups, None, "retraining", progress, "models"
            )
    return record.read()


def _folder(run: Run, name: str) -> Place:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "this is no name for a ground truth", found=repr(name), wanted="A–Z a–z 0–9 _ . -"
        )
    return run.path.absolute() / FOLDER / name


def _digest(train: Train) -> str:
    """Changes with the source of a function (not of what that calls) and what it was made with.

    Of an object the source alone counts, since training may change what it holds; one with a
    ``digest`` of its own is asked for it.
    """
    if hasattr(train, "digest"):
        return str(train.digest)
    made = settings_of(train) if isinstance(train, FunctionType | functools.partial) else ""
    return digest((source_of(train) + made).encode())


def _groups(record: Record, train: Train) -> list[list[Unit]]:
    """The units that are trained together, wherever one of them is missing.

    Groups do not depend on what is there already: neither do the outputs, to the last bit.
    """
    size = int(getattr(train, "group", 1))
    units, missing = record.units(), set(record.missing())
    groups = [units[i : i + size] for i in range(0, len(units), size)]
    return [group for group in groups if missing & set(group)]


@dataclass(frozen=True)
class Measure:
    """The task's measurement on the queries, in batches."""

    measurement: Measurement
    queries: list[Batch]
    device: str
    autocast: torch.dtype | None

    @staticmethod
    def of(task: Task, data: Any) -> Measure:
        read = batches(data, 0, len(data), _BATCH, task.collate)
        return Measure(task.measurement, [batch for _, batch in read], task.device, task.autocast)

    def __call__(self, model: nn.Module) -> np.ndarray:
        """f where the measurement has a margin, else −loss: ``[query]``, higher is better."""
        model = model.eval() if is_spread(model) else model.eval().to(self.device)
        return torch.cat([self._batch(model, batch) for batch in self.queries]).numpy()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """ℓ of the examples of a batch ``[example]``, differentiable."""
        return self.measurement.link(self._output(model, batch), to(batch, "cpu")).loss

    @torch.no_grad()
    def _batch(self, model: nn.Module, batch: Batch) -> Tensor:
        has_margin = self.measurement.has_margin
        return self._output(model, batch) if has_margin else -self.loss(model, batch).float()

    def _output(self, model: nn.Module, batch: Batch) -> Tensor:
        kind = torch.device(self.device).type
        precision = torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)
        with precision, differentiable(model):
            return self.measurement.output(model, to(batch, self.device)).float().cpu()


@dataclass(frozen=True)
class Retraining:
    """Trains the models of one group and keeps their outputs; goes to workers as it is."""

    train: Train
    measure: Measure | None
    record: Record

    def __call__(self, group: Sequence[Unit], tick: Tick) -> None:
        missing = set(self.record.missing(group))
        for unit, result in zip(group, self._trained(group), strict=True):
            if unit in missing:
                self.record.write(*unit, self._outputs(unit, result))

    def _trained(self, group: Sequence[Unit]) -> Iterator[Any]:
        given = [self._arguments(unit) for unit in group]
        subset, position = group[0]
        with _explained(f"while training on subset {subset}, seed {self._seeds[position]}"):
            if hasattr(self.train, "many"):
                yield from self.train.many(given)
                return
            for indices, seed in given:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    yield self.train(indices, seed)

    @property
    def _seeds(self) -> tuple[int, ...]:
        return self.record.design.seeds

    def _arguments(self, unit: Unit) -> tuple[np.ndarray, int]:
        subset, position = unit
        return self.record.subset(subset), self.record.design.seed(subset, position)

    def _outputs(self, unit: Unit, result: Any) -> np.ndarray:
        if isinstance(result, nn.Module):
            if self.measure is None:
                raise TaskError(
                    "measuring a retrained model needs the task",
                    do="open the run with tda.open(path, task=task), or let train return the "
                    "outputs [query] themselves",
                )
            result = self.measure(result)
        outputs = np.asarray(result, np.float32)
        if outputs.shape != (self.record.num_queries,):
            raise DataError(
                "a retraining did not give one output a query",
                found=f"{type(result).__name__} {list(outputs.shape)}",
                wanted=f"an nn.Module, or numbers [{self.record.num_queries}]",
            )
        wrong = np.flatnonzero(~np.isfinite(outputs))
        if len(wrong):
            raise TaskError(
                "a retrained model gives an output that is not finite",
                where=f"subset {unit[0]}, seed {self._seeds[unit[1]]}, query {wrong[0]}",
                found=outputs[wrong[0]],
                do="let train converge (a smaller learning rate, say) and call again: what is "
                "finished is kept",
            )
        return outputs


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise
