"""A model as a function of one flat vector of weights: its losses, and what is linear in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tda.errors import TaskError
from tda.gradients.exact import differentiable
from tda.layout import copied, require_whole

Loss = Callable[[Tensor, Tensor], Tensor]
Pull = Callable[[Tensor], tuple[Tensor, Tensor]]


def example_losses(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of batches, taken of every example as a batch of one: ``[example]``."""
    return vmap(lambda output, target: loss(output[None], target[None]))(outputs, targets)


class Network:
    """ℓ_i(θ) of a model's own loss, for θ = its trained parameters end to end ``[parameter]``.

    The model is copied; buffers and frozen parameters are constants. It computes in the mode
    (train or eval) it is given in. Raises TaskError where no parameter is trained, where they are
    not of one type, or where an example's loss would depend on its batch (batch norm).
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        require_whole(model)
        self.model = copied(model)
        self.loss = loss
        trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        _check(self.model, trained)
        self._shapes = {name: value.shape for name, value in trained.items()}
        self._sizes = [value.numel() for value in trained.values()]
        self.initial = torch.cat([value.reshape(-1) for value in trained.values()])

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """The flat vector, cut and named as the model's parameters (views)."""
        parts = zip(self._shapes.items(), weights.split(self._sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def flat(self, named: Mapping[str, Tensor]) -> Tensor:
        """The flat vector of a state dict. Raises TaskError where it is another model's."""
        absent = [
            n for n, shape in self._shapes.items() if n not in named or named[n].shape != shape
        ]
        if absent:
            raise TaskError("these are not weights of this model", where=", ".join(absent[:5]))
        parts = [named[name].detach().to(self.initial).reshape(-1) for name in self._shapes]
        return torch.cat(parts)

    def module(self, weights: Tensor) -> nn.Module:
        """A copy of the model with these weights."""
        model = copied(self.model)
        model.load_state_dict(self.named(weights), strict=False)
        return model

    def losses(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """ℓ_i of a batch ``[example]``."""
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH), differentiable(self.model):
            outputs = functional_call(self.model, self.named(weights), (x,))
        return example_losses(self.loss, outputs, y)

    @torch.enable_grad()
    def gradient(self, weights: Tensor, counts: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Σ_i c_i ∇ℓ_i ``[parameter]``."""
        w = weights.detach().requires_grad_()
        return torch.autograd.grad(counts @ self.losses(w, x, y), w)[0]

    @torch.enable_grad()
    def linearize(
        self, weights: Tensor, counts: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Pull]:
        """g = Σ_i c_i ∇ℓ_i, and u [query, parameter] ↦ (Hu, ⟨∇ℓ_i, u⟩), H = Σ_i c_i ∇²ℓ_i.

        Both are the transposed derivative of g(θ, c): by θ it is H, by c_i it is ∇ℓ_iᵀ. One
        second backward pass gives them for the whole batch: ``[query, parameter]`` and
        ``[query, example]``.
        """
        w, c = weights.detach().requires_grad_(), counts.detach().requires_grad_()
        gradient = torch.autograd.grad(c @ self.losses(w, x, y), w, create_graph=True)[0]

        def pull(u: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.autograd.grad(
                gradient, (w, c), u, is_grads_batched=True, materialize_grads=True
            )
            return found[0], found[1]

        return gradient.detach(), pull

    def check_loss(self, x: Tensor, y: Tensor) -> None:
        """Raises TaskError unless a batch's loss repeats, and is the mean of its examples'."""
        with torch.no_grad():
            given = [self.loss(self.model(x), y) for _ in range(2)]
            mean = self.losses(self.initial, x, y).mean()
        if not torch.equal(given[0], given[1]):
            raise TaskError(
                "this training cannot be replayed: the same batch has another loss each time",
                found=f"{given[0].item():.9g} and {given[1].item():.9g}",
                do="leave out dropout and other randomness (model.eval() before training it)",
            )
        if not torch.allclose(given[0], mean, rtol=1e-3, atol=1e-6):
            raise TaskError(
                "the loss of a batch is not the mean of the losses of its examples",
                found=f"{given[0].item():.6g} for the batch, {mean.item():.6g} for the mean",
                do="give a loss (output, target) -> mean over examples, without class weights",
            )

    @torch.enable_grad()
    def saved_elements(self, x: Tensor, y: Tensor) -> int:
        """Numbers a backward pass over a batch keeps."""
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        weights = self.initial.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss(functional_call(self.model, self.named(weights), (x,)), y)
        return count


def _check(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    kinds = {value.dtype for value in trained.values()}
    if len(kinds) != 1 or not next(iter(kinds)).is_floating_point:
        raise TaskError(
            "a replay needs trained parameters of one type",
            found=", ".join(sorted(map(str, kinds))) or "no parameter that requires a gradient",
        )
    for name, module in model.named_modules():
        of_batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training and (of_batch or getattr(module, "track_running_stats", False)):
            raise TaskError(
                "batch norm makes an example's loss depend on its batch: it has no influence alone",
                where=f"{name} ({type(module).__name__})",
                do="train with group or layer norm, or with the batch norm in eval mode",
            )
