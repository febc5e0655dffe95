"""EK-FAC of a model and a data set: a pass for the bases, a pass for the eigenvalues."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tda.curvature.kfac.sums import Block, Corrections, EkFac, Moments
from tda.curvature.kfac.targets import Rows, weighted
from tda.data import Dataset, as_dataset
from tda.gradients import Gradients, shapes_of
from tda.progress import Tick, progress_bar
from tda.projection.tiles import Shapes
from tda.task import Task, require_task

BATCH_SIZE = 64


def fit_ekfac(
    task: Task,
    dataset: Any,
    checkpoint: int = -1,
    *,
    num_examples: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> EkFac:
    """EK-FAC of a model at a checkpoint, in two passes over ``num_examples`` of a data set (all).

    They are spread evenly over the data. Targets are drawn from the model's prediction by ``seed``.
    Raises GradientError where gradients are not finite.
    """
    require_task(task, "tda.fit_ekfac(tda.Task(model, checkpoints=[…]), dataset)")
    data = as_dataset(dataset)
    count = len(data) if num_examples is None else min(num_examples, len(data))
    with progress_bar("fitting EK-FAC", 2 * count, progress) as tick:
        return fit(task, data, checkpoint, count, seed, batch_size, tick)


def fit(
    task: Task,
    dataset: Dataset,
    checkpoint: int,
    count: int,
    seed: int,
    batch_size: int,
    tick: Tick,
) -> EkFac:
    """As `fit_ekfac`; ``tick(examples)`` a batch, twice ``count`` in all."""
    measurement = weighted(task.measurement)
    gradients = Gradients(task.model, measurement, task.device, task.autocast)
    gradients.load(task.weights(checkpoint))
    rows = Rows.of(task, gradients, dataset, count, seed, batch_size)
    moments = Moments()
    for batch, size in rows.batches(batch_size):
        gradients(batch, size, moments.add)
        moments.add_examples(size)
        tick(size * count // len(rows))
    corrections = Corrections(moments.kfac(task.measurement.draw is not None))
    for batch, size in rows.batches(batch_size):
        gradients(batch, size, corrections.add)
        corrections.add_examples(size)
        tick(size * count // len(rows))
    return _complete(corrections.ekfac(), shapes_of(task.model))


def _complete(fitted: EkFac, shapes: Shapes) -> EkFac:
    """With a block of every parameter, in the model's order: zero where none had a gradient."""

    def nothing(shape: tuple[int, int]) -> Block:
        return Block(None, None, torch.zeros(shape, dtype=torch.float64))

    known = fitted.blocks
    blocks = {name: known.get(name) or nothing(shape) for name, shape in shapes.items()}
    return replace(fitted, blocks=blocks)
