"""The Gauss–Newton (Fisher) matrix of an example, where ℓ = −log p(y | x), in two ways:

    G(z; θ) = Jᵀ ∇²ℓ J = E_{y ~ p(· | x)} ∇ℓ ∇ℓᵀ,    J the Jacobian of the model's outputs

draw_…: ``(model, batch, generator) -> batch`` with targets drawn from the model's prediction.
…_hessian: ``(outputs, batch, u) -> ∇²ℓ u`` of each example; u is ``[..., *outputs.shape]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda.data import Batch
from tda.measurements.outputs import predict
from tda.measurements.targets import next_tokens, target, with_target


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
