"""The featurizer: gradients → projection → rows, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda.batch_size import PROBES, BatchSize, automatic
from tda.curvature import kfac
from tda.data import Batch, Dataset, arriving, collate, evenly, read
from tda.gradients import Audit, Consume, Convolved, Dense, Factor, Gradients, shapes_of
from tda.malloc import give_back
from tda.progress import progress_bar
from tda.projection import Bases, Counts, Pilot, Projection, Projector, Shapes, rank_one
from tda.projection.tiles import square_norm
from tda.reading import Rows
from tda.task import Task
from tda.training.metric import Transform, Update, as_matrices, scaling
from tda.training.optimizer import Moments

Later = Callable[[], "Features"]  # waits for what was begun
_PILOT_EXAMPLES = 64
_PILOT_BATCH = 16  # always: its moments are the same whatever else a run is given


@dataclass(frozen=True)
class Features:
    """What a store keeps of a batch at one checkpoint.

    rows: ``[example, proj]``; columns: loss, p, slope, curvature, grad_norm, each ``[example]``;
    embedding: ``[example, hidden]``, of width 0 where there is none. All float32, but rows and
    embeddings that are collected for a chunk may be bfloat16.
    """

    rows: Tensor
    columns: dict[str, Tensor]
    embedding: Tensor

    @staticmethod
    def concatenate(parts: list[Features]) -> Features:
        """The features of several batches, in order."""
        return Features(
            torch.cat([p.rows for p in parts]),
            {name: torch.cat([p.columns[name] for p in parts]) for name in parts[0].columns},
            torch.cat([p.embedding for p in parts]),
        )

    def room(self, count: int, dtype: torch.dtype) -> Features:
        """Features like these of ``count`` examples, still to be put in; dtype: of the rows."""
        return Features(
            self.rows.new_empty(count, self.rows.shape[1], dtype=dtype),
            {name: values.new_empty(count) for name, values in self.columns.items()},
            self.embedding.new_empty(count, self.embedding.shape[1], dtype=torch.bfloat16),
        )

    def put(self, places: Rows, part: Features) -> None:
        """Put in the features of the examples at these places."""
        first, last = int(places[0]), int(places[-1]) + 1
        in_order = last - first == len(places) and bool((np.diff(places) == 1).all())
        where = slice(first, last) if in_order else torch.from_numpy(places)
        self.rows[where] = part.rows.to(self.rows.dtype)
        self.embedding[where] = part.embedding.to(self.embedding.dtype)
        for name, values in part.columns.items():
            self.columns[name][where] = values

    def with_embedding(self, width: int) -> Features:
        """With an embedding of this width: zeros if the batch did not show one like it.

        A layer that sees part of a batch (a mixture of experts, say) has none for the examples.
        """
        if self.embedding.shape[1] == width:
            return self
        return replace(self, embedding=torch.zeros(len(self.rows), width))


@dataclass(frozen=True)
class Probe:
    """What a few examples show: the hidden layer's width (None without one), the parameters whose
    gradient at an example is one outer product, and those of convolutions of many channels with
    the size of their kernel."""

    hidden: int | None
    rank_one: list[str]
    filters: dict[str, int]


@dataclass(frozen=True)
class Projecting:
    """Factors of a batch to P∇f ``[example, proj]`` and ‖∇f‖² ``[example]``.

    A `tda.gradients.passes.Reduction`; pickles as what the projection is made of.
    """

    projection: Projection
    shapes: Shapes
    bases: Bases | None

    @cached_property
    def projector(self) -> Projector:
        return self.projection.bind(self.shapes, self.bases)

    def __reduce__(self) -> tuple:
        return Projecting, (self.projection, self.shapes, self.bases)

    def __call__(
        self, num_examples: int, device: torch.device, transform: Transform | None = None
    ) -> tuple[Consume, Callable[[], tuple[Tensor, Tensor]]]:
        """``transform``: of every gradient before it is projected."""
        projector = self.projector
        buffer = projector.zeros(num_examples).to(device)
        square = torch.zeros(num_examples, device=device)
        visited = set()

        def consume(name: str, factors: list[Factor]) -> None:
            if transform is None:
                square.add_(projector.add(buffer, name, factors))
                return
            visited.add(name)
            projector.add(buffer, name, transform(name, factors))
            square.add_(square_norm(factors))

        def result() -> tuple[Tensor, Tensor]:
            if isinstance(transform, Update):
                # Adam moves on by its mean where the gradient is zero, whatever the batch.
                for name, shape in self.shapes.items():
                    if name not in visited:
                        consume(name, [Dense(square.new_zeros(()).expand(num_examples, *shape))])
            return projector.rows(buffer), square

        return consume, result


class Featurizer:
    """Turns batches into features, for one task and one projection.

    ``at(checkpoint)`` loads the weights; then calling it on a batch gives `Features`.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._projecting: list[Projecting] = []  # of every checkpoint
        self._checkpoint: int | None = None
        self._scaling: Transform | None = None  # of every gradient, in the task's metric
        self._moments: dict[str, Moments] = {}  # what `Update` needs of the loaded checkpoint
        self._probe: Probe | None = None
        self.room: int | None = None  # examples the device has memory for, once that was found out
        self._sized: tuple[Dataset, int] | None = None  # data, and what "auto" is for them

    @cached_property
    def gradients(self) -> Gradients:
        """The task's own copy of the model; made when first needed."""
        task = self.task
        return Gradients(task.model, task.measurement, task.device, task.autocast)

    @property
    def audit(self) -> Audit | None:
        """How the gradients are taken, once a first batch has shown it."""
        return self.gradients.audited if "gradients" in vars(self) else None

    @property
    def num_shares(self) -> int:
        """Processes that a batch is divided among."""
        return self.gradients.num_shares if self.task.metric == "euclidean" else 1

    def at(self, checkpoint: int) -> None:
        """Load the weights of a checkpoint, unless they are there already."""
        if self._checkpoint != checkpoint:
            self.gradients.load(self.task.weights(checkpoint))
            if self.task.metric != "euclidean":
                self._load_moments(checkpoint)
            self._checkpoint = checkpoint

    def _load_moments(self, checkpoint: int) -> None:
        metric, state = self.task.metric, self.task.optimizer_state(checkpoint)
        assert state is not None, "a Task checks this"
        shapes, device = shapes_of(self.task.model), self.gradients.device
        if metric == "adam_update":
            self._moments = as_matrices(state.moments, shapes, device)
        else:
            self._scaling = scaling(metric, state.moments, shapes, device)

    def probe(self, dataset: Dataset) -> Probe:
        """Audit the gradients on a few examples at the last checkpoint; once is enough."""
        if self._probe is not None:
            return self._probe
        names: list[str] = []
        filters: dict[str, int] = {}

        def consume(name: str, factors: list[Factor]) -> None:
            if self.task.metric != "euclidean":
                return  # what a metric has scaled is an outer product no more
            if rank_one(factors) is not None:
                names.append(name)
            elif kernel := _many_channels(factors):
                filters[name] = kernel

        count = self.gradients.num_audited
        ((_, hidden),) = self._sample(dataset, count, count, consume)
        give_back()  # what these examples left would lie between the tensors of larger batches
        self._probe = Probe(None if hidden is None else hidden.shape[1], names, filters)
        return self._probe

    def pilot(self, dataset: Dataset) -> Pilot:
        """Gradient moments of a few examples at the last checkpoint."""
        pilot = Pilot()
        self.probe(dataset)

        def consume(name: str, factors: list[Factor]) -> None:
            pilot.add(name, self._scaling(name, factors) if self._scaling else factors)

        self._sample(dataset, _PILOT_EXAMPLES, _PILOT_BATCH, consume)
        return pilot

    def fit(
        self,
        projection: Projection,
        dataset: Dataset,
        batch_size: BatchSize,
        progress: bool,
        checkpoint: int = -1,
        counts: Counts | None = None,
    ) -> Bases:
        """The bases a projection takes from some of the data, at a checkpoint or the last one.

        counts: the numbers of each parameter, where rows have a layout already.
        Here, also where a cluster is open: of ``num_fit`` examples (4,096) whatever the number of
        all, and its sums are as large as the model's layers squared, too much to send about.
        """
        if projection.kind != "eigenbasis":
            return projection.fit(self.pilot(dataset), shapes_of(self.task.model), counts)
        count = min(projection.num_fit, len(dataset))
        size = self.batch_size(batch_size, dataset)
        with progress_bar("fitting the eigenbasis", 2 * count, progress) as tick:
            fitted = kfac.fit(self.task, dataset, checkpoint, count, projection.seed, size, tick)
        return projection.select(fitted.blocks, counts)

    def _sample(self, dataset: Dataset, count: int, size: int, consume: Consume) -> list[Any]:
        """Gradients of examples spread evenly over the data, ``size`` at a time."""
        self.at(len(self.task.checkpoints) - 1)
        places = evenly(len(dataset), count).tolist()
        found = []
        for first in range(0, len(places), size):
            some = places[first : first + size]
            found.append(self.gradients(self._batch(dataset, some), len(some), consume))
        return found

    def _batch(self, dataset: Dataset, places: list[int]) -> Batch:
        batch = collate([read(dataset, i) for i in places], self.task.collate)
        self.gradients.check(batch, places)
        return batch

    def batch_size(self, given: BatchSize, dataset: Dataset) -> int:
        """``given``; for "auto" what suits the model and these data (`tda.batch_size`)."""
        if given != "auto":
            return given
        if self._sized is None or self._sized[0] is not dataset:
            if self._checkpoint is None:
                self.at(len(self.task.checkpoints) - 1)
            total, gradients = len(dataset), self.gradients
            probed = {n: self._batch(dataset, evenly(total, n).tolist()) for n in PROBES}
            size = automatic(lambda n: gradients.forward(probed[n]), total, gradients.device)
            self._sized = dataset, size
        return self._sized[1]

    def bind(self, projection: Projection, bases: Iterable[Bases] | None = None) -> Projector:
        """Take a projection (with the bases of every checkpoint, if it has any)."""
        count, shapes = len(self.task.checkpoints), shapes_of(self.task.model)
        given = [None] * count if bases is None else list(bases)
        of: dict[int, Projecting] = {}  # one for all that have the same bases
        for some in given:
            of.setdefault(id(some), Projecting(projection, shapes, some))
        self._projecting = [of[id(some)] for some in given]
        return self._projecting[-1].projector

    @property
    def projector(self) -> Projector | None:
        """The projection that was bound, if one was."""
        return self._projecting[-1].projector if self._projecting else None

    def __call__(self, batch: Any, num_examples: int, train: bool = False) -> Features:
        """Features of one batch at the loaded checkpoint.

        In the metric "adam_update" examples of ``train`` have the row −Γ and, so that −∇ℓ of other
        rows and Γ's negative are formed alike, slope −1 (and curvature 1).
        """
        return self.start(batch, num_examples, train)()

    def start(self, batch: Any, num_examples: int, train: bool = False) -> Later:
        """The same, begun: what waits for them. A GPU may be given the next batch meanwhile."""
        assert self._projecting, "bind a projection first"
        assert self._checkpoint is not None, "load a checkpoint first"
        project = self._projecting[self._checkpoint]
        transform = self._update(batch) if train and self._moments else self._scaling
        if transform is None:
            output, hidden, (rows, square) = self.gradients.reduced(batch, num_examples, project)
        else:  # by moments that only this process holds
            consume, result = project(num_examples, self.gradients.device, transform)
            output, hidden = self.gradients(batch, num_examples, consume)
            rows, square = result()
        hidden = torch.empty(num_examples, 0) if hidden is None else hidden
        arrived = arriving(output, hidden, rows, square)

        def finish() -> Features:
            output, hidden, rows, square = arrived()
            link = self.gradients.link(output, batch)
            columns = {
                "loss": link.loss,
                "p": link.p,
                "slope": link.slope,
                "curvature": link.curvature,
                "grad_norm": square.sqrt(),
            }
            if isinstance(transform, Update):
                one = torch.ones(num_examples)
                columns |= {"slope": -one, "curvature": one}
            columns = {name: values.detach().float() for name, values in columns.items()}
            return Features(rows, columns, hidden)

        return finish

    def _update(self, batch: Any) -> Update:
        """Γ is not linear in the gradient of the loss: ℓ'(f) must be known before the backward."""
        gradients = self.gradients
        slope = gradients.link(gradients.output(batch), batch).slope
        return Update(self._moments, slope.float().to(gradients.device))


def _many_channels(factors: list[Factor]) -> int:
    """Size of the kernel of a convolution in one group of many channels, or 0."""
    (first, *more) = factors
    if more or not isinstance(first, Convolved) or not first.has_long_lines:
        return 0
    kernel = math.prod(first.window.kernel)
    return kernel if kernel > 1 else 0
