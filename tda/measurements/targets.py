"""The targets of a batch: found, replaced, and refused where they have no meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda.data import NUMBERED, Batch, target_of
from tda.errors import DataError, TaskError

Places = Sequence[int] | np.ndarray


def target(batch: Batch) -> Tensor:
    """The target of a batch. Raises TaskError if it has none, DataError if it is text."""
    place = target_of(batch) if isinstance(batch, tuple | dict) else None
    if place is not None:
        return _no_text(batch[place])
    raise TaskError(
        "the examples have no target",
        found=sorted(batch) if isinstance(batch, dict) else "tuples of one",
        wanted="tuples (input, target), or dicts with `target`, `labels` or `label`",
        do="add a target, or give a measurement that needs none",
    )


def _no_text(values: Any) -> Any:
    if isinstance(values, list | tuple) and any(isinstance(v, str | bytes) for v in values):
        raise DataError(
            "the targets are text",
            found=", ".join(map(repr, values[:4])),
            wanted="numbers, whole ones for classes",
            do=NUMBERED,
        )
    return values


def with_target(batch: Batch, values: Tensor) -> Batch:
    """The batch with another target; a dict without one gets ``labels``."""
    if isinstance(batch, tuple):
        return (*batch[:-1], values)
    return {**batch, target_of(batch) or "labels": values}


def next_tokens(batch: Batch) -> Tensor:
    """The targets of `next_token_loss` ``[example, token]``, with −100 where there is none."""
    if isinstance(batch, dict) and target_of(batch) is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        return labels
    return target(batch)


def predicted_tokens(batch: Batch) -> Tensor:
    """`next_tokens`, with 0 where there is none."""
    labels = next_tokens(batch)
    return labels.masked_fill(labels == -100, 0)


def any_target(batch: Batch, places: Places) -> None:
    """Every target has a meaning."""


def probabilities(batch: Batch, places: Places) -> None:
    """Raises DataError for a target outside [0, 1]: a soft label is one, −1 for "no" is not."""
    y = target(batch)
    wrong = (~((y >= 0) & (y <= 1))).nonzero().tolist()  # NaN, too
    if wrong:
        raise DataError(
            "a target of binary cross-entropy is no probability",
            where=f"example {places[wrong[0][0]]}",
            found=y[tuple(wrong[0])].item(),
            wanted="0 or 1, or what is between for a soft label",
            do="give (y + 1) / 2 of targets that are ±1",
        )


def unmoved(batch: Batch, places: Places) -> None:
    """Raises DataError where every target is the next token already, and would be moved twice."""
    given = batch[0] if isinstance(batch, tuple) else batch.get("input", batch)
    tokens = given.get("input_ids") if isinstance(given, Mapping) else given
    labels = next_tokens(batch)
    if not isinstance(tokens, Tensor) or tokens.shape != labels.shape:
        return
    counts = labels[:, :-1] != -100
    here, following, own = labels[:, :-1][counts], tokens[:, 1:][counts], tokens[:, :-1][counts]
    if torch.equal(here, following) and not torch.equal(here, own):
        raise DataError(
            "the targets of causal_lm are those of the next token already",
            where=f"example {places[0]}",
            found="target[i] = input[i+1]",
            wanted="target[i] = input[i], or −100 where left out: causal_lm moves them itself",
            do="give the tokens as their own target, (tokens, tokens), or a batch without labels",
        )


def require_classes(y: Tensor, places: Places, outputs: Sequence[int]) -> None:
    """Raises DataError for y ``[example, …]`` of which one is no class of ``outputs``, the shape
    ``[example, …, class]``. Where types or shapes do not fit, the measurement says so itself."""
    if y.is_floating_point() or len(outputs) != y.ndim + 1:
        return
    wrong = ((y < 0) | (y >= outputs[-1])).nonzero().tolist()
    if wrong:
        raise DataError(
            "a target is no class that the model has",
            where=f"example {places[wrong[0][0]]}",
            found=y[tuple(wrong[0])].item(),
            wanted=f"0 … {outputs[-1] - 1}: the model has {outputs[-1]} outputs",
            do="number the classes from 0 as in training, and leave out examples without one",
        )
