"""What a training schedule says about scores: how far training went, and the damping it implies.

`checkpoints` are the checkpoint records of a manifest, in order: dicts with ``step``,
``learning_rate`` and, where known, ``learning_rate_sum``, ``momentum``, ``weight_decay`` and
``optimizer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Record = Mapping[str, Any]


def learning_rate_sums(checkpoints: Sequence[Record]) -> list[float] | None:
    """Σ_t η_t of all steps up to each checkpoint; None where that of any is unknown.

    A stated ``learning_rate_sum`` is taken as it is. Else a checkpoint's learning rate is that of
    all steps since the checkpoint before it,  S_c = S_{c−1} + (step_c − step_{c−1})·η_c,  and a
    step that does not grow begins an independent run,  S_c = step_c·η_c.
    """
    sums = _sums(checkpoints)
    known = [total for total in sums if total is not None]
    return known if len(known) == len(sums) else None


def by_training(checkpoints: Sequence[Record]) -> list[list[int]]:
    """The checkpoints of each training, by their places.

    A step that does not grow begins another training; but copies of checkpoints, with noise on
    their weights, are of the same.
    """
    steps = [checkpoint.get("step") for checkpoint in checkpoints]
    groups = [[0]]
    for index, (before, after) in enumerate(pairwise(steps), start=1):
        if before is not None and after is not None and after <= before:
            groups.append([index])
        else:
            groups[-1].append(index)
    merged: dict[Any, list[int]] = {}
    for group in groups:
        merged.setdefault(tuple(_source(checkpoints[index]) for index in group), []).extend(group)
    return list(merged.values())


def trained_to(checkpoints: Sequence[Record]) -> frozenset[Any]:
    """What tells trainings apart: the weights each of them ended with, before noise."""
    return frozenset(_source(checkpoints[group[-1]]) for group in by_training(checkpoints))


def _source(checkpoint: Record) -> Any:
    """The digest of a checkpoint's weights before there was noise on them."""
    return checkpoint.get("noise_of", checkpoint["digest"])


def implied_damping(checkpoints: Sequence[Record], index: int) -> float | None:
    """λ = weight decay + (1 − β)/Σ_t η_t of checkpoint ``index``, in units of the mean curvature.

    Training for τ = Σ_t η_t/(1−β) multiplies a gradient along a direction of curvature σ by
    (1−e^{−τσ})/σ (Bae et al. 2024, SOURCE); the inverse 1/(σ + 1/τ) agrees with it at both ends,
    τ where σ is small and 1/σ where it is large. Weight decay adds to every σ. β is the momentum
    of SGD; Adam averages its gradients with weights that sum to one, so that β = 0. A weight decay
    that is not known counts as none.

    None where the momentum or the sum is unknown, or the sum is not positive.
    """
    record = checkpoints[index]
    momentum = 0.0 if record.get("optimizer") == "adam" else record.get("momentum")
    total = _sums(checkpoints[: index + 1])[index]
    if momentum is None or total is None or total <= 0:
        return None
    return (record.get("weight_decay") or 0.0) + (1 - momentum) / total


def _sums(checkpoints: Sequence[Record]) -> list[float | None]:
    """Σ_t η_t of each checkpoint, None where it is unknown."""
    sums: list[float | None] = []
    last_step: int | None = None  # of the run this checkpoint belongs to
    for record in checkpoints:
        step, rate = record.get("step"), record.get("learning_rate")
        total: float | None = record.get("learning_rate_sum")
        if total is None and step is not None and rate is not None:
            goes_on = bool(sums) and last_step is not None and step > last_step
            if not goes_on:
                total = step * rate
            elif sums[-1] is not None and last_step is not None:
                total = sums[-1] + (step - last_step) * rate
        sums.append(total)
        last_step = step
    return sums
