"""The Gauss–Newton matrix of a training loss, known by its products with vectors only.

    G v = (1/n) Σ_i J_iᵀ (∇²ℓ_i) J_i v,    J_i = ∂z_i/∂θ, the Jacobian of the model's outputs

∇²ℓ_i is exact where the measurement knows its likelihood (`Measurement.hessian`); then G is also
the Fisher matrix with targets drawn from the model (Martens 2020, §9). Elsewhere J_i is the
gradient of the one output f and ∇²ℓ_i is its link's ``curvature``.

Jᵀu is one backward pass, and J v is the backward pass of that one (it is linear in u, with the
transpose J): a matrix of P² numbers is never formed. Forward-mode tangents would be cheaper, but
not every operation has them, and those of an embedding's padding row are not zero as its gradient
is. Sums run over examples, so the result does not depend on the batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tda.data import Batch, Collate, Dataset, collate, evenly, read, to
from tda.errors import TaskError
from tda.gradients import Gradients
from tda.gradients.exact import differentiable
from tda.layout import require_whole
from tda.measurements import Measurement, predict

Directions = Mapping[str, Tensor]  # parameter name → [m, …] of its size: m vectors of R^P

_AT_ONCE = 16  # vectors whose tangents are in memory together


class _Outputs(nn.Module):
    """What ∇²ℓ is taken of, as a module, so that torch can call it with other parameters."""

    def __init__(self, model: nn.Module, measurement: Measurement) -> None:
        super().__init__()
        self.model = model
        self.function = predict if measurement.hessian is not None else measurement.output

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.model, batch)


@dataclass(frozen=True)
class GaussNewton:
    """G at the weights a model has now. Made by `of`.

    ``product(v)`` takes and returns `Directions`: one or many vectors at once, in the model's
    dtype. ``batches`` are pairs (batch, number of its examples).
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    measurement: Measurement
    batches: Sequence[tuple[Batch, int]]

    @staticmethod
    def of(
        gradients: Gradients,
        dataset: Dataset,
        *,
        batch_size: int = 64,
        num_examples: int | None = None,
        collate_with: Collate | None = None,
    ) -> GaussNewton:
        """G over a data set at the weights ``gradients`` has loaded (and sees change).

        num_examples: of them, spread evenly over the data, make the mean; by default all. The
        batches stay in memory. Raises TaskError for a model that is sharded.
        """
        require_whole(gradients.model)
        n = len(dataset)
        count = n if num_examples is None else num_examples
        if not 1 <= count <= n:
            raise TaskError(
                "the Gauss–Newton matrix cannot be a mean over so many examples",
                found=f"num_examples = {count}",
                wanted=f"1 … {n}",
            )
        picked = evenly(n, count).tolist()
        groups = [picked[i : i + batch_size] for i in range(0, count, batch_size)]
        batches = [
            (
                to(collate([read(dataset, i) for i in group], collate_with), gradients.device),
                len(group),
            )
            for group in groups
        ]
        return GaussNewton(gradients.model, gradients.parameters, gradients.measurement, batches)

    @property
    def num_examples(self) -> int:
        return sum(count for _, count in self.batches)

    def product(self, v: Directions) -> dict[str, Tensor]:
        """G v for each of m vectors, in the shapes they have: ``[m, *shape]`` or ``[m, O, I]``.

        Raises TaskError if a vector lacks a parameter or has one of another size.
        """
        self._check(v)
        total = {name: torch.zeros_like(value) for name, value in v.items()}
        m = len(next(iter(v.values())))
        with _twice_differentiable(self.model), torch.no_grad():
            for batch, _ in self.batches:
                for start in range(0, m, _AT_ONCE):
                    stop = min(start + _AT_ONCE, m)
                    part = {
                        name: v[name][start:stop].reshape(stop - start, *p.shape).to(p.device)
                        for name, p in self.parameters.items()
                    }
                    for name, value in self._sum_over(batch, part).items():
                        some = total[name][start:stop]
                        some += value.reshape(some.shape).to(some.device)
        return {name: value / self.num_examples for name, value in total.items()}

    def mean_diagonal(self, num_probes: int = 16) -> float:
        """tr(G)/P, estimated without bias by vᵀGv over random signs v (Hutchinson 1990)."""
        generator = torch.Generator().manual_seed(0)
        probes = {
            name: (2 * torch.randint(2, (num_probes, *p.shape), generator=generator) - 1).to(p)
            for name, p in self.parameters.items()
        }
        image = self.product(probes)
        trace = sum(float((probes[name] * image[name]).sum(dtype=torch.float64)) for name in image)
        return trace / num_probes / sum(p.numel() for p in self.parameters.values())

    def _sum_over(self, batch: Batch, v: Directions) -> dict[str, Tensor]:
        """Σ_i J_iᵀ ∇²ℓ_i J_i v over the examples of one batch."""
        net = _Outputs(self.model, self.measurement)
        at = [p.detach().requires_grad_() for p in self.parameters.values()]
        named = {f"model.{name}": p for name, p in zip(self.parameters, at, strict=True)}
        with torch.enable_grad():
            z = functional_call(net, named, (batch,))
            w = torch.zeros_like(z, requires_grad=True)
            slopes = grad(z, at, w, create_graph=True, materialize_grads=True)
        used = [(s, v[name]) for name, s in zip(self.parameters, slopes, strict=True) if s.grad_fn]
        if not used:
            return {name: torch.zeros_like(v[name]) for name in self.parameters}
        outputs, tangents = zip(*used, strict=True)
        many = {"is_grads_batched": True, "materialize_grads": True}
        (u,) = grad(outputs, w, tangents, retain_graph=True, **many)
        image = grad(z, at, self._hessian(z.detach(), batch, u).to(z.dtype), **many)
        return dict(zip(self.parameters, image, strict=True))

    def _hessian(self, z: Tensor, batch: Batch, u: Tensor) -> Tensor:
        if self.measurement.hessian is not None:
            return self.measurement.hessian(z, batch, u)
        return self.measurement.link(z, batch).curvature * u

    def _check(self, v: Directions) -> None:
        found = {name: value[0].numel() for name, value in v.items()}
        wanted = {name: p.numel() for name, p in self.parameters.items()}
        if found != wanted:
            name = next(n for n in {**wanted, **found} if found.get(n) != wanted.get(n))
            raise TaskError(
                "a vector does not fit the model",
                where=name,
                found=f"{found.get(name, 'no')} numbers",
                wanted=f"{wanted.get(name, 'no')} numbers",
            )


@contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Without fused kernels that are not differentiable twice, and without a note on speed."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), differentiable(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
