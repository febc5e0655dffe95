"""Measurements: the scalar of an example that is differentiated, and the loss as its function.

    f(z; θ)            the output, one scalar an example: its gradient is what a store holds
    ℓ(z; θ) = ℓ(f)     the loss, through a link, so that ∇ℓ = ℓ'(f)·∇f and both need one backward

For cross-entropy f is the log-odds log(p/(1−p)) of the label and ℓ = softplus(−f), so that
ℓ' = −(1−p) and ℓ'' = p(1−p): TRAK's gradients (Park et al. 2023, §3.2) and those of the loss are
the same rows. Where no such link is known, f = ℓ.

Where the loss is −log p(y | x), a measurement also knows the Gauss–Newton (Fisher) matrix

    G(z; θ) = Jᵀ ∇²ℓ J = E_{y ~ p(· | x)} ∇ℓ ∇ℓᵀ,    J the Jacobian of the model's outputs

in two ways: ``hessian`` is ∇²ℓ at the outputs, and ``draw`` replaces targets by draws from the
model's own prediction.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda.data import NUMBERED, Batch
from tda.errors import DataError, TaskError
from tda.identity import digest, settings_of, source_of

Places = Sequence[int] | np.ndarray


class Link(NamedTuple):
    """The loss as a function of the output, at each example: all ``[example]``.

    slope is ℓ'(f). curvature is ℓ''(f) where the link is known, else ℓ'(f)² (empirical Fisher).
    p is the probability the model gives the label; NaN where that means nothing.
    """

    loss: Tensor
    slope: Tensor
    curvature: Tensor
    p: Tensor


def any_target(batch: Batch, places: Places) -> None:
    """Every target has a meaning."""


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
    digest: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        text = "".join(source_of(f) + settings_of(f) for f in (self.output, self.link))
        object.__setattr__(self, "digest", digest(text.encode()))

    @property
    def scalar(self) -> bool:
        """Whether a run needs no table for its Gauss–Newton matrix: see `is_scalar`."""
        return is_scalar({"name": self.name, "digest": self.digest})


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
    """The target of a batch. Raises TaskError if it has none, DataError if it is text."""
    if isinstance(batch, tuple) and len(batch) > 1:
        return _no_text(batch[-1])
    if isinstance(batch, dict):
        for name in _TARGETS:
            if name in batch:
                return _no_text(batch[name])
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
    name = next((name for name in _TARGETS if name in batch), "labels")
    return {**batch, name: values}


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


def next_tokens(batch: Batch) -> Tensor:
    """The targets of `next_token_loss` ``[example, token]``, with −100 where there is none."""
    if isinstance(batch, dict) and not any(name in batch for name in _TARGETS):
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        return labels
    return target(batch)


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


def num_tokens(batch: Batch) -> Tensor:
    """Number of predicted tokens of each example, at least 1.

    The loss is a mean over T tokens, so for tokens drawn independently E∇ℓ∇ℓᵀ = (1/T²) Σ_t G_t,
    and its Gauss–Newton matrix (1/T) Σ_t G_t is T times that.
    """
    return (next_tokens(batch)[:, 1:] != -100).sum(1).clamp(min=1)


def _probabilities(logits: Tensor) -> Tensor:
    """softmax over the last axis, in float32 or better."""
    return (logits.float() if logits.element_size() < 4 else logits).softmax(-1)


def _categorical(p: Tensor, generator: torch.Generator) -> Tensor:
    """One class of each row of probabilities ``[..., class]``."""
    rows = p.detach().to(generator.device).flatten(0, -2)
    drawn = torch.multinomial(rows, 1, replacement=True, generator=generator)
    return drawn.reshape(p.shape[:-1]).to(p.device)


def _noise(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the outputs' shape."""
    drawn = torch.randn(outputs.shape, generator=generator, device=generator.device)
    return drawn.to(outputs)


@torch.no_grad()
def draw_class(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """y ~ softmax(z)."""
    drawn = _categorical(_probabilities(predict(model, batch)), generator)
    return with_target(batch, drawn.to(target(batch)))


@torch.no_grad()
def draw_binary(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """y ~ Bernoulli(σ(z)), each output on its own."""
    logits, labels = predict(model, batch), target(batch)
    p = torch.sigmoid(logits.float()).to(generator.device)
    drawn = torch.bernoulli(p, generator=generator)
    return with_target(batch, drawn.reshape(labels.shape).to(labels))


@torch.no_grad()
def draw_normal(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """y ~ N(ŷ, 1)."""
    outputs = predict(model, batch)
    drawn = outputs + _noise(outputs, generator)
    return with_target(batch, drawn.reshape(target(batch).shape))


@torch.no_grad()
def draw_normals(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """y ~ N(ŷ, O) for a mean over O outputs: ∇ℓ = Jᵀ(ŷ−y)/O, so E∇ℓ∇ℓᵀ = JᵀJ/O."""
    outputs = predict(model, batch)
    drawn = outputs + outputs[0].numel() ** 0.5 * _noise(outputs, generator)
    return with_target(batch, drawn.reshape(target(batch).shape))


@torch.no_grad()
def draw_tokens(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """Each token ~ p(token | those before it in the data); those left out stay so."""
    labels = next_tokens(batch)
    drawn = _categorical(_probabilities(predict(model, batch)[:, :-1]), generator).to(labels)
    kept = labels[:, 1:] == -100
    drawn = torch.where(kept, labels[:, 1:], drawn)
    return with_target(batch, torch.cat([labels[:, :1], drawn], 1))


def softmax_hessian(outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
    """(diag p − ppᵀ) u over the last axis; u is ``[..., *outputs.shape]``, as below."""
    p = _probabilities(outputs)
    return p * (u - (p * u).sum(-1, keepdim=True))


def sigmoid_hessian(outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
    """p(1−p) u."""
    return torch.sigmoid(outputs) * torch.sigmoid(-outputs) * u


def unit_hessian(outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
    """u."""
    return u


def mean_hessian(outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
    """u / O for a mean over O outputs."""
    return u / outputs[0].numel()


def tokens_hessian(outputs: Tensor, batch: Batch, u: Tensor) -> Tensor:
    """(diag p_t − p_t p_tᵀ) u_t / T at each of the T tokens that are predicted, else 0."""
    predicted = F.pad(next_tokens(batch)[:, 1:] != -100, (0, 1))  # the last predicts nothing
    weight = predicted / num_tokens(batch)[:, None]
    return softmax_hessian(outputs, batch, u) * weight[..., None].to(outputs.device)


_KNOWN = (
    Measurement("cross_entropy", log_odds, logistic, True, draw_class, None, softmax_hessian),
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
        draw_tokens, num_tokens, tokens_hessian, unmoved,
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
        return Measurement(name, given, identity, has_margin=False)
    if given in MEASUREMENTS:
        return MEASUREMENTS[given]
    close = difflib.get_close_matches(str(given), MEASUREMENTS, n=1)
    raise TaskError(
        f"unknown measurement {given!r}",
        wanted=", ".join(MEASUREMENTS) + ", or a callable (model, batch) -> loss [example]",
        do=f"did you mean {close[0]!r}?" if close else None,
    )
