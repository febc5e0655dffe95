"""SOURCE against what it approximates: the exact derivative of a run that has not converged.

Odd against even digits by logistic regression, a few hundred steps of SGD. The curvature of the
log-odds is then the exact Hessian, so that what is left of the error is SOURCE's own: gradients and
curvature that stand still within a segment (Bae et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tda

NUM_TRAIN, NUM_QUERIES, STEPS, BATCH = 1000, 40, 300, 50


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output[:, 0], target)


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))[: NUM_TRAIN + NUM_QUERIES]
    inputs = (images - images.mean(0))[order] / 16
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels[order] % 2.0).float()


INPUTS, TARGETS = digits()
TRAIN = (INPUTS[:NUM_TRAIN], TARGETS[:NUM_TRAIN])
QUERIES = (INPUTS[NUM_TRAIN:], TARGETS[NUM_TRAIN:])


def training(**options: Any) -> tda.Training:
    """Unconverged: the losses still fall everywhere."""
    random = torch.Generator().manual_seed(0)
    epochs = STEPS * BATCH // NUM_TRAIN
    order = torch.cat([torch.randperm(NUM_TRAIN, generator=random) for _ in range(epochs)])
    given = {"learning_rate": 0.05, **options}
    return tda.Training(
        model=nn.Linear(64, 1),
        inputs=TRAIN[0],
        targets=TRAIN[1],
        batches=order.view(STEPS, BATCH),
        loss=loss,
        **given,
    )


@dataclass(frozen=True)
class Case:
    """A run, how each query's loss falls by the weight of each example, and its stores."""

    run: tda.Training
    truth: np.ndarray
    index: Callable[..., tda.Run]

    def error(self, num_checkpoints: int, **fields: Any) -> float:
        """‖scores − derivative‖ / ‖derivative‖ of a recipe from equally spaced checkpoints."""
        steps = [STEPS * (c + 1) // num_checkpoints for c in range(num_checkpoints)]
        task = tda.Task(self.run.model, self.run.checkpoints(steps), "binary_cross_entropy")
        stored = self.index(task, TRAIN, batch_size=NUM_TRAIN)
        recipe = replace(tda.RECIPES[fields.pop("recipe")], **fields)
        scores = np.asarray(stored.scores(QUERIES, recipe=recipe))
        return float(np.linalg.norm(scores - self.truth) / np.linalg.norm(self.truth))


@pytest.fixture(scope="module")
def case(index_exactly: Callable[..., tda.Run]) -> Callable[..., Case]:
    @cache
    def get(learning_rate: float, momentum: float, weight_decay: float) -> Case:
        run = training(learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
        truth = run.influence(QUERIES, "binary_cross_entropy", gradient="loss", progress=False)
        return Case(run, truth, index_exactly)

    return get


PLAIN = (0.05, 0.0, 0.0)


@pytest.mark.parametrize(
    ("schedule", "bound"), [(PLAIN, 0.05), ((0.05, 0.0, 0.02), 0.05), ((0.005, 0.9, 0.02), 0.06)]
)
def test_source_is_exact_unrolling_to_a_few_per_cent(case, schedule, bound):
    """6 checkpoints in 3 segments, as in the paper; (learning rate, momentum, weight decay).

    η/(1−β) for the step of momentum leaves out that the last gradients have not had their time.
    """
    assert case(*schedule).error(6, recipe="source") <= bound


def test_influence_functions_are_far_from_exact_unrolling(case):
    """They speak of the minimum, which training has not reached; with more damping, of less."""
    plain = case(*PLAIN)
    assert plain.error(1, recipe="influence", damping=1e-6) >= 0.6
    assert plain.error(1, recipe="influence") >= 0.2


def test_source_comes_closer_the_more_checkpoints_it_sees(case):
    plain = case(*PLAIN)
    few, many = (plain.error(c, recipe="source", segments=6) for c in (6, 24))
    assert many < few / 2
    assert many < 0.02
