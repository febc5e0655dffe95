"""Measurements: the scalar of an example that is differentiated, and the loss as its function.

    f(z; θ)            the output, one scalar an example: its gradient is what a store holds
    ℓ(z; θ) = ℓ(f)     the loss, through a link, so that ∇ℓ = ℓ'(f)·∇f and both need one backward

For cross-entropy f is the log-odds log(p/(1−p)) of the label and ℓ = softplus(−f), so that
ℓ' = −(1−p) and ℓ'' = p(1−p): TRAK's gradients (Park et al. 2023, §3.2) and those of the loss are
the same rows. Where no such link is known, f = ℓ.

    targets.py    the targets of a batch: found, replaced, refused
    outputs.py    f and its link ℓ(f)
    fisher.py     the Gauss–Newton matrix: targets drawn from the model, and ∇²ℓ at its outputs
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tda.data import Batch
from tda.errors import TaskError
from tda.identity import digest, settings_of, source_of
from tda.measurements.fisher import (
    draw_binary,
    draw_class,
    draw_normal,
    draw_normals,
    draw_tokens,
    mean_hessian,
    num_tokens,
    sigmoid_hessian,
    softmax_hessian,
    tokens_hessian,
    unit_hessian,
)
from tda.measurements.outputs import (
    Link,
    binary,
    binary_log_odds,
    binary_losses,
    half_square,
    identity,
    log_odds,
    logistic,
    next_token_loss,
    predict,
    prediction,
    squared_errors,
)
from tda.measurements.targets import (
    Places,
    any_target,
    predicted_tokens,
    probabilities,
    require_classes,
    target,
    unmoved,
    with_target,
)

__all__ = [
    "MEASUREMENTS",
    "Link",
    "Measurement",
    "Places",
    "as_measurement",
    "has_link",
    "identity",
    "is_scalar",
    "log_odds",
    "next_token_loss",
    "predict",
    "require_classes",
    "target",
    "with_target",
]


@dataclass(frozen=True)
class Measurement:
    """A scalar of each example.

    output: ``(model, batch) -> f [example]``, differentiable; link: ``(f, batch) -> Link``.
    has_margin: whether a larger f is better for the example; else only a lower loss is.
    draw: ``(model, batch, generator) -> batch`` with targets drawn from the model's prediction.
    draw_weight: ``batch -> w [example]`` such that E w ∇ℓ∇ℓᵀ over draws is the Gauss–Newton
    matrix of ℓ; None where that is 1.
    hessian: ``(outputs, batch, u) -> ∇²ℓ u`` of each example, at the outputs of `predict`.
    These three are None where the likelihood is not known.
    check: ``(batch, places)`` raises DataError for targets without a meaning; places: of the
    examples in their data set, to name them by.
    classes: ``batch -> y [example, …]``, each a place on the last axis of the outputs of `predict`
    (see `require_classes`); None where targets are no classes.
    digest: changes when the code of ``output`` or ``link`` does, or what they were made with: what
    a partial, a closure, a default or a callable object held when the measurement was made.
    """

    name: str
    output: Callable[[nn.Module, Batch], Tensor]
    link: Callable[[Tensor, Batch], Link]
    has_margin: bool
    draw: Callable[[nn.Module, Batch, torch.Generator], Batch] | None = None
    draw_weight: Callable[[Batch], Tensor] | None = None
    hessian: Callable[[Tensor, Batch, Tensor], Tensor] | None = None
    check: Callable[[Batch, Places], None] = any_target
    classes: Callable[[Batch], Tensor] | None = None
    digest: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        text = "".join(source_of(f) + settings_of(f) for f in (self.output, self.link))
        object.__setattr__(self, "digest", digest(text.encode()))

    @property
    def scalar(self) -> bool:
        """Whether a run needs no table for its Gauss–Newton matrix: see `is_scalar`."""
        return is_scalar({"name": self.name, "digest": self.digest})


_LOSSES = ("torch.nn.functional", "torch.nn.modules.loss")
_KNOWN = (
    Measurement(
        "cross_entropy", log_odds, logistic, True,
        draw_class, None, softmax_hessian, classes=target,
    ),
    Measurement(
        "binary_cross_entropy", binary_log_odds, binary, True,
        draw_binary, None, sigmoid_hessian, probabilities,
    ),
    Measurement("squared_error", prediction, half_square, False, draw_normal, None, unit_hessian),
    Measurement(
        "mean_squared_error", squared_errors, identity, False, draw_normals, None, mean_hessian
    ),
    Measurement(
        "multi_label", binary_losses, identity, False,
        draw_binary, None, sigmoid_hessian, probabilities,
    ),
    Measurement(
        "causal_lm", next_token_loss, identity, False,
        draw_tokens, num_tokens, tokens_hessian, unmoved, predicted_tokens,
    ),
)  # fmt: skip
MEASUREMENTS: dict[str, Measurement] = {m.name: m for m in _KNOWN}


def is_scalar(record: Mapping[str, Any]) -> bool:
    """Whether a manifest's measurement is one of ours of one output an example: ℓ''(f)·∇f∇fᵀ is
    then the whole Gauss–Newton matrix of the example. What the link of another says is not known.
    """
    known = MEASUREMENTS.get(record["name"])
    if known is None or known.digest != record.get("digest"):
        return False
    return known.output in (binary_log_odds, prediction)


def has_link(record: Mapping[str, Any]) -> bool:
    """Whether a manifest's measurement tells ℓ as a function of f, as far as that is known. If not,
    the curvature ℓ''(f)·∇f∇fᵀ is ∇ℓ∇ℓᵀ, the empirical Fisher matrix: its scores only rank."""
    known = MEASUREMENTS.get(record.get("name", ""))
    return bool(record.get("has_margin")) or (known is not None and known.link is not identity)


def as_measurement(given: Any) -> Measurement:
    """A Measurement from its name, itself, or a callable ``(model, batch) -> loss [example]``."""
    if isinstance(given, Measurement):
        return given
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        if given.__module__ in _LOSSES:  # which take (output, target)
            raise TaskError(
                "a loss of torch is no measurement",
                found=name,
                wanted="a name, such as 'cross_entropy', or a callable (model, batch) -> "
                "loss [example]",
                do='lambda model, batch: loss(model(batch[0]), batch[1]), with reduction="none"',
            )
        return Measurement(name, given, identity, has_margin=False)
    if given in MEASUREMENTS:
        return MEASUREMENTS[given]
    close = difflib.get_close_matches(str(given), MEASUREMENTS, n=1)
    raise TaskError(
        f"unknown measurement {given!r}",
        wanted=", ".join(MEASUREMENTS) + ", or a callable (model, batch) -> loss [example]",
        do=f"did you mean {close[0]!r}?" if close else None,
    )
