"""Measurements: the scalar of an example that is differentiated, and the loss as its function.

    f(z; θ)            the output, one scalar an example: its gradient is what a store holds
    ℓ(z; θ) = ℓ(f)     the loss, through a link, so that ∇ℓ = ℓ'(f)·∇f and both need one backward

For cross-entropy f is the log-odds log(p/(1−p)) of the label and ℓ = softplus(−f), so that
ℓ' = −(1−p) and ℓ'' = p(1−p): TRAK's gradients (Park et al. 2023, §3.2) and those of the loss are
the same rows. Where no such link is known, f = ℓ.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda.data import Batch
from tda.errors import TaskError


class Link(NamedTuple):
    """The loss as a function of the output, at each example: all ``[example]``.

    slope is ℓ'(f). curvature is ℓ''(f) where the link is known, else ℓ'(f)² (empirical Fisher).
    p is the probability the model gives the label; NaN where that means nothing.
    """

    loss: Tensor
    slope: Tensor
    curvature: Tensor
    p: Tensor


@dataclass(frozen=True)
class Measurement:
    """A scalar of each example.

    output: ``(model, batch) -> f [example]``, differentiable; link: ``(f, batch) -> Link``.
    has_margin: whether a larger f is better for the example; else only a lower loss is.
    """

    name: str
    output: Callable[[nn.Module, Batch], Tensor]
    link: Callable[[Tensor, Batch], Link]
    has_margin: bool

    @property
    def digest(self) -> str:
        """Changes when the code of ``output`` or ``link`` does."""
        state = hashlib.blake2b(digest_size=16)
        for function in (self.output, self.link):
            state.update(_source(function).encode())
        return state.hexdigest()


def _source(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # defined at a prompt, or a callable object
        code = getattr(function, "__code__", None)
        if code is None:
            return f"{type(function).__module__}.{type(function).__qualname__}"
        return f"{code.co_code.hex()}{code.co_consts!r}{code.co_names!r}"


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output on a batch: ``model(input)``, or Hugging Face's ``model(**batch).logits``.

    The last entry of a tuple is the target; in a dict it is ``target``, ``labels`` or ``label``.
    """
    if isinstance(batch, tuple):
        result = model(*(batch[:-1] if len(batch) > 1 else batch))
    elif "input" in batch:
        given = batch["input"]
        result = model(**given) if isinstance(given, Mapping) else model(given)
    else:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        result = model(**{k: v for k, v in tensors.items() if k not in _TARGETS})
    return getattr(result, "logits", result)


_TARGETS = ("target", "labels", "label")


def target(batch: Batch) -> Tensor:
    """The target of a batch. Raises TaskError if it has none."""
    if isinstance(batch, tuple) and len(batch) > 1:
        return batch[-1]
    if isinstance(batch, dict):
        for name in _TARGETS:
            if name in batch:
                return batch[name]
    raise TaskError(
        "the examples have no target",
        found=sorted(batch) if isinstance(batch, dict) else "tuples of one",
        wanted="tuples (input, target), or dicts with `target`, `labels` or `label`",
        do="add a target, or give a measurement that needs none",
    )


def _nan(like: Tensor) -> Tensor:
    return torch.full_like(like, float("nan"))


def logistic(f: Tensor, batch: Batch) -> Link:
    """ℓ = log(1+e^{−f}), p = σ(f), ℓ' = −(1−p), ℓ'' = p(1−p)."""
    p, q = torch.sigmoid(f), torch.sigmoid(-f)  # q = 1−p without cancellation
    return Link(F.softplus(-f), -q, p * q, p)


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
    """(2y−1)·z from one logit an example and y in {0, 1}."""
    logit, label = predict(model, batch), target(batch)
    _check_scalar("binary_cross_entropy", logit, label)
    sign = 2 * label.to(logit.dtype) - 1
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
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return losses.sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)


MEASUREMENTS: dict[str, Measurement] = {
    m.name: m
    for m in (
        Measurement("cross_entropy", log_odds, logistic, has_margin=True),
        Measurement("binary_cross_entropy", binary_log_odds, logistic, has_margin=True),
        Measurement("squared_error", prediction, half_square, has_margin=False),
        Measurement("mean_squared_error", squared_errors, identity, has_margin=False),
        Measurement("multi_label", binary_losses, identity, has_margin=False),
        Measurement("causal_lm", next_token_loss, identity, has_margin=False),
    )
}


def as_measurement(given: Any) -> Measurement:
    """A Measurement from its name, itself, or a callable ``(model, batch) -> loss [example]``."""
    if isinstance(given, Measurement):
        return given
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        return Measurement(name, given, identity, has_margin=False)
    if given in MEASUREMENTS:
        return MEASUREMENTS[given]
    close = difflib.get_close_matches(str(given), MEASUREMENTS, n=1)
    raise TaskError(
        f"unknown measurement {given!r}",
        wanted=", ".join(MEASUREMENTS) + ", or a callable (model, batch) -> loss [example]",
        do=f"did you mean {close[0]!r}?" if close else None,
    )
