"""Conjugate gradients: (H + λI) x = b for many b at once, H known by its products only.

Preconditioned by M ≈ (H + λI)⁻¹ (Saad 2003, algorithm 9.1), for each column b on its own:

    α = ⟨r,z⟩/⟨p,Ap⟩    x += αp    r −= αAp    z = Mr    β = ⟨r,z⟩_new/⟨r,z⟩    p = z + βp

The columns share the products, which are what costs. A column that is solved takes no further part:
its α would be 0/0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tda.errors import GradientError

Directions = Mapping[str, Tensor]  # parameter name → [m, …] of its size: m vectors of R^P
Linear = Callable[[Directions], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Solution:
    """What `solve` found.

    x: as the right-hand sides; residuals: ``[m]`` ‖b − (H+λI)x‖/‖b‖, computed anew from x;
    iterations: ``[m]`` products that the column took part in; converged: ``[m]`` bool, whether it
    stopped because the residual carried along was within the tolerance.
    """

    x: dict[str, Tensor]
    residuals: Tensor
    iterations: Tensor
    converged: Tensor


def solve(
    product: Linear,
    right: Directions,
    *,
    damping: float,
    precondition: Linear | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> Solution:
    """x = (H + λI)⁻¹ b for each of the m right-hand sides.

    product: v ↦ Hv for any number of columns (`GaussNewton.product`), H positive semidefinite.
    right: b, parameter name → ``[m, …]``; for influence, the gradients of m queries.
    damping: λ ≥ 0, absolute, in the unit of the eigenvalues of H.
    precondition: v ↦ Mv with M symmetric and positive, such as EK-FAC's U(Λ+λ)⁻¹Uᵀ; it changes
    the number of iterations and not the solution.
    tolerance: a column is done at ‖b − (H+λI)x‖ ≤ tolerance·‖b‖, or after ``max_iterations``;
    with tolerance 0 that many are made whatever the residual.

    A column in which rounding leaves a direction without curvature stops where it is; its residual
    tells. Raises GradientError if a right-hand side is not finite.
    """
    _check_finite(right)
    m = len(next(iter(right.values())))
    names = list(right)
    norms = _dot(right, right).sqrt()
    x = {name: torch.zeros_like(right[name]) for name in names}
    iterations = torch.zeros(m, dtype=torch.int64)
    converged = norms == 0  # by x = 0

    def image(v: Directions) -> dict[str, Tensor]:
        hv = product(v)
        return {name: hv[name] + damping * v[name] for name in names}

    def preconditioned(v: Directions) -> Directions:
        return v if precondition is None else precondition(v)

    active = (~converged).nonzero()[:, 0]
    r = _pick(right, active)
    z = preconditioned(r) if len(active) else r
    p = dict(z)
    rz = _dot(r, z)
    for _ in range(max_iterations):
        if not len(active):
            break
        ap = image(p)
        curvature = _dot(p, ap)
        sound = (curvature > 0) & (rz > 0) & torch.isfinite(curvature) & torch.isfinite(rz)
        alpha = torch.where(sound, rz / curvature, 0.0)
        for name in names:
            x[name].index_add_(0, active.to(x[name].device), _times(alpha, p[name]))
            r[name] = r[name] - _times(alpha, ap[name])
        iterations[active] += 1
        solved = _dot(r, r).sqrt() <= tolerance * norms[active]
        converged[active] = solved
        going = sound & ~solved
        if not going.all():
            active, rz = active[going], rz[going]
            r, p = _pick(r, going), _pick(p, going)
            if not len(active):
                break
        z = preconditioned(r)
        new = _dot(r, z)
        beta = new / rz
        p = {name: z[name] + _times(beta, p[name]) for name in names}
        rz = new
    return Solution(x, _residuals(image(x), right, norms), iterations, converged)


def _residuals(image: Directions, right: Directions, norms: Tensor) -> Tensor:
    rest = {name: right[name] - image[name] for name in right}
    return torch.where(norms > 0, _dot(rest, rest).sqrt() / norms, 0.0)


def _dot(a: Directions, b: Directions) -> Tensor:
    """⟨a, b⟩ of each column ``[m]``, summed in float64."""
    parts = [
        (a[name] * b[name])
        .reshape(len(x), math.prod(x.shape[1:]))
        .sum(1, dtype=torch.float64)
        .cpu()
        for name, x in a.items()
    ]
    return torch.stack(parts).sum(0)


def _times(scale: Tensor, v: Tensor) -> Tensor:
    return scale.to(v).reshape(-1, *[1] * (v.ndim - 1)) * v


def _pick(v: Directions, columns: Tensor) -> dict[str, Tensor]:
    return {name: value[columns.to(value.device)] for name, value in v.items()}


def _check_finite(right: Directions) -> None:
    bad = ~torch.isfinite(_dot(right, right))
    if bad.any():
        raise GradientError(
            "a right-hand side is not finite",
            where=f"column {int(bad.nonzero()[0])}",
            wanted="finite gradients of the queries",
        )
