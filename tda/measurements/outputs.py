"""f(z; θ), the scalar of an example that is differentiated, and its link ℓ(f).

A stored run knows its measurement by the text of these functions (`Measurement.digest`): with
another letter it is another measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda.data import TARGETS as _TARGETS  # as the text of `next_token_loss` has it
from tda.data import Batch
from tda.errors import TaskError
from tda.measurements.targets import target


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output on a batch: ``model(input)``, or Hugging Face's ``model(**batch).logits``.

    The last entry of a tuple is the target; in a dict it is ``target``, ``labels`` or ``label``.
    Raises TaskError where the output is no tensor.
    """
    if isinstance(batch, tuple):
        result = model(*(batch[:-1] if len(batch) > 1 else batch))
    elif "input" in batch:
        given = batch["input"]
        result = model(**given) if isinstance(given, Mapping) else model(given)
    else:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        result = model(**{k: v for k, v in tensors.items() if k not in _TARGETS})
    outputs = getattr(result, "logits", result)
    if not isinstance(outputs, Tensor):
        raise TaskError(
            "the model's output is no tensor",
            found=type(outputs).__name__,
            wanted="a tensor, or an object that has one as `logits`",
            do="give a module that returns the one tensor of what the model returns, or a "
            "measurement of your own: a callable (model, batch) -> loss [example]",
        )
    return outputs


class Link(NamedTuple):
    """The loss as a function of the output, at each example: all ``[example]``.

    slope is ℓ'(f). curvature is ℓ''(f) where the link is known, else ℓ'(f)² (empirical Fisher).
    p is the probability the model gives the label; NaN where that means nothing.
    """

    loss: Tensor
    slope: Tensor
    curvature: Tensor
    p: Tensor


def _nan(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


def logistic(f: Tensor, batch: Batch) -> Link:
    """ℓ = log(1+e^{−f}), p = σ(f), ℓ' = −(1−p), ℓ'' = p(1−p)."""
    p, q = torch.sigmoid(f), torch.sigmoid(-f)  # q = 1−p without cancellation
    return Link(F.softplus(-f), -q, p * q, p)


def binary(f: Tensor, batch: Batch) -> Link:
    """ℓ = log(1+e^{−f}) + s·f, ℓ' = s − (1−p), s = min(y, 1−y) the share of the other label."""
    y = target(batch).to(f).reshape(f.shape)
    hard, share = logistic(f, batch), torch.minimum(y, 1 - y)
    return hard._replace(loss=hard.loss + share * f, slope=hard.slope + share)


def identity(f: Tensor, batch: Batch) -> Link:
    """ℓ = f."""
    one = torch.ones_like(f)
    return Link(f, one, one, _nan(f))


def half_square(f: Tensor, batch: Batch) -> Link:
    """ℓ = ½(f − y)²."""
    residual = f - target(batch).to(f.dtype).reshape(f.shape)
    return Link(residual**2 / 2, residual, torch.ones_like(f), _nan(f))


def log_odds(model: nn.Module, batch: Batch) -> Tensor:
    """log(p_y/(1−p_y)) = z_y − logsumexp_{j≠y} z_j, from logits ``[example, class]``."""
    logits, label = predict(model, batch), target(batch)
    if logits.ndim != 2 or label.shape != logits.shape[:1] or label.is_floating_point():
        raise TaskError(
            "cross_entropy does not fit these shapes",
            found=f"logits {list(logits.shape)}, target {label.dtype} {list(label.shape)}",
            wanted="logits [example, class], integer target [example]",
            do="use another measurement: binary_cross_entropy, squared_error, multi_label, "
            "causal_lm, or a callable (model, batch) -> [example]",
        )
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    own = logits.gather(1, label[:, None].long())
    others = logits.scatter(1, label[:, None].long(), float("-inf"))
    return own[:, 0] - others.logsumexp(1)


def binary_log_odds(model: nn.Module, batch: Batch) -> Tensor:
    """±z from one logit an example: the log-odds of the label that y in [0, 1] is nearer to."""
    logit, label = predict(model, batch), target(batch)
    _check_scalar("binary_cross_entropy", logit, label)
    sign = 2 * (label >= 0.5).to(logit.dtype) - 1
    return sign.reshape(len(logit)) * logit.reshape(len(logit))


def prediction(model: nn.Module, batch: Batch) -> Tensor:
    """The model's one output an example."""
    value = predict(model, batch)
    _check_scalar("squared_error", value, target(batch))
    return value.reshape(len(value))


def _check_scalar(name: str, value: Tensor, label: Tensor) -> None:
    if value.numel() != len(value) or label.numel() != len(value):
        raise TaskError(
            f"{name} does not fit these shapes",
            found=f"output {list(value.shape)}, target {list(label.shape)}",
            wanted="one number an example in each",
            do="use multi_label or mean_squared_error for several outputs, or a callable",
        )


def binary_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Σ_class binary cross-entropy of logits ``[example, class]``."""
    logits, labels = predict(model, batch), target(batch)
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), labels.to(torch.float32).reshape(logits.shape), reduction="none"
    )
    return losses.flatten(1).sum(1)


def squared_errors(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over outputs of ½(ŷ − y)²."""
    outputs = predict(model, batch)
    error = outputs - target(batch).to(outputs.dtype).reshape(outputs.shape)
    return error.flatten(1).square().mean(1) / 2


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over an example's tokens of −log p(token | those before); target −100 is left out.

    Without ``labels`` the inputs are the labels, padding (``attention_mask`` 0) left out.
    """
    logits = predict(model, batch)
    if isinstance(batch, dict) and not any(name in batch for name in _TARGETS):
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    else:
        labels = target(batch)
    next_ones = F.pad(labels[:, 1:], (0, 1), value=-100)  # the last predicts nothing
    losses = F.cross_entropy(  # tokens flat: four times faster than classes on the second axis
        logits.flatten(0, 1).float(), next_ones.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view(next_ones.shape).sum(1) / (next_ones != -100).sum(1).clamp(min=1)
