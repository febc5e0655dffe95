"""Tail patch: train one step more on what a method found, and see whether the query gains."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tda.data import as_dataset, collate, read
from tda.errors import DataError
from tda.evaluate.intervals import Estimate, over
from tda.evaluate.retrain import Measure
from tda.gradients import Gradients
from tda.layout import require_whole
from tda.task import Task


def tail_patch(
    task: Task, train: Any, queries: Any, proponents: np.ndarray, learning_rate: float
) -> Estimate:
    """mean_q f(q; θ − η·∇_θ mean_{i∈top(q)} ℓ_i) − f(q; θ), θ the last checkpoint.

    After the tail-patch score of Chang et al. 2024, Scalable Influence and Fact Tracing for Large
    Language Model Pretraining, section 5, which steps on one proponent at a time. Cheap: one step
    a query; but it shows what one step adds, not what is lost without the examples.
    proponents ``[query, k]``: indices of training examples, as ``run.top_k(…).proponents.indices``.
    f is higher for better, as in a `GroundTruth`. The interval is over queries.
    """
    data, asked = as_dataset(train), as_dataset(queries)
    if np.ndim(proponents) != 2 or len(proponents) != len(asked):
        raise DataError(
            "the proponents are not those of these queries",
            found=list(np.shape(proponents)),
            wanted=f"[query, k] with {len(asked)} queries",
        )
    require_whole(task.model)
    own = Gradients(task.model, task.measurement, task.device, task.autocast)
    own.load(task.weights(-1))
    model, weights = own.model, [p.requires_grad_() for p in own.parameters.values()]
    before = [p.detach().clone() for p in weights]
    gains = []
    for query, indices in enumerate(np.asarray(proponents).tolist()):
        batch = collate([read(data, i) for i in indices], task.collate)
        one = collate([read(asked, query)], task.collate)
        measure = Measure(task.measurement, [one], task.device, task.autocast)
        first = measure(model)
        slopes = torch.autograd.grad(measure.loss(model, batch).mean(), weights, allow_unused=True)
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                weight.sub_(0 if slope is None else learning_rate * slope)
            gains.append((measure(model) - first).item())
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
    return over(np.array(gains))
