"""Whose gradients make the curvature: examples, each with a target and a weight.

several classes         √(w p_c)·∇ℓ_c     pairs (example, class) drawn by what they add to F
another likelihood      √w·∇ℓ             a target an example, drawn from the model
one output an example   √ℓ''(f)·∇f        exact; and where no likelihood is known, which is the
                                          empirical Fisher matrix if all that is known is a loss
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tda.curvature.sampling import MOST_CLASSES, draw, generator_of, none_out_of_reach, pair_traces
from tda.data import Batch, Dataset, collate, evenly, read
from tda.gradients import Gradients
from tda.gradients.exact import example_of
from tda.measurements import (
    Measurement,
    binary_log_odds,
    identity,
    log_odds,
    predict,
    prediction,
    target,
    with_target,
)
from tda.task import Task

_PAIRS = 2  # drawn an example


def weighted(measurement: Measurement) -> Measurement:
    """On batches (batch, w): w E∇∇ᵀ of its gradients is the curvature."""

    def output(model: nn.Module, pair: Any) -> Tensor:
        batch, weight = pair
        f = measurement.output(model, batch)
        if _by_link(measurement):
            curvature = measurement.link(f.detach(), batch).curvature
            return f * (weight.to(f) * curvature).sqrt()
        return measurement.link(f, batch).loss * weight.to(f).sqrt()

    return Measurement(f"curvature of {measurement.name}", output, identity, has_margin=False)


def _by_link(measurement: Measurement) -> bool:
    return measurement.draw is None or measurement.output in (binary_log_odds, prediction)


@dataclass(frozen=True)
class Rows:
    """Places in a data set, the class of each (None: not chosen here) and its weight."""

    task: Task
    gradients: Gradients
    data: Dataset
    seed: int
    example: list[int]
    label: Tensor | None = None
    weight: Tensor | None = None
    _drawn: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        task: Task, gradients: Gradients, data: Dataset, count: int, seed: int, batch_size: int
    ) -> Rows:
        """Of ``count`` examples spread evenly; ``gradients`` has the weights of the model."""
        picked = evenly(len(data), count).tolist()
        rows = Rows(task, gradients, data, seed, picked)
        if _by_link(task.measurement) or task.measurement.output is not log_odds:
            return rows
        p = torch.cat([gradients.apply(predict, b).cpu() for b in rows._plain(batch_size)])
        if p.shape[1] > MOST_CLASSES:
            return rows
        p = p.double().softmax(1)
        share = pair_traces(p).clamp(min=0)  # at the outputs: it stands for what a pair adds to F
        share = share / share.sum().clamp(min=torch.finfo(torch.float64).tiny)
        sample = draw(none_out_of_reach(share.numpy()), _PAIRS * count, seed)
        weight = torch.from_numpy(sample.weight) * p[sample.example, sample.label]
        return replace(
            rows,
            example=[picked[place] for place in sample.example],
            label=torch.from_numpy(sample.label),
            weight=weight,
        )

    def __len__(self) -> int:
        return len(self.example)

    def batches(self, batch_size: int) -> Iterator[tuple[tuple[Batch, Tensor], int]]:
        """((batch, weights), number of rows)."""
        for start, batch in zip(
            range(0, len(self), batch_size), self._plain(batch_size), strict=True
        ):
            span = range(start, min(start + batch_size, len(self)))
            if self.label is not None and self.weight is not None:
                given = target(batch)
                labels = self.label[start : span.stop].to(given).reshape(given.shape)
                weight = self.weight[start : span.stop]
                yield (with_target(batch, labels), weight.float()), len(span)
                continue
            weight = torch.ones(len(span))
            if not _by_link(self.task.measurement):
                batch = self._with_drawn_targets(batch, span)
                if self.task.measurement.draw_weight is not None:
                    weight = self.task.measurement.draw_weight(batch).float()
            yield (batch, weight), len(span)

    def _plain(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self), batch_size):
            group = self.example[start : start + batch_size]
            yield collate([read(self.data, i) for i in group], self.task.collate)

    def _with_drawn_targets(self, batch: Batch, span: range) -> Batch:
        """A draw is made once, and depends on the seed and the example, not on its batch."""
        for place, row in enumerate(span):
            if row not in self._drawn:
                self._drawn[row] = self._draw(example_of(batch, place, len(span)), row)
        return with_target(batch, torch.cat([self._drawn[row] for row in span]))

    def _draw(self, one: Batch, row: int) -> Tensor:
        function = self.task.measurement.draw
        assert function is not None
        generator = generator_of(f"{self.seed}/{self.example[row]}")
        drawn = self.gradients.apply(lambda model, batch: function(model, batch, generator), one)
        return target(drawn).cpu()
