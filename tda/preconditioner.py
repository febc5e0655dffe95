"""Functions of a curvature's eigenvalues, applied to the queries.

One float64 eigendecomposition H = V diag(σ) Vᵀ serves every damping and every spectral function F:
F(H) x = V F(σ) Vᵀx + F(0) (x − VVᵀx). The last term is the null space, exact and never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tda.curvature import Diagonal, Gram, WeightedRows
from tda.errors import RecipeError

SpectralFunction = Callable[[Tensor], Tensor]  # σ [r] -> F(σ) [r], also at σ = 0


def identity(eigenvalues: Tensor) -> Tensor:
    """F(σ) = 1."""
    return torch.ones_like(eigenvalues)


def inverse(damping: float) -> SpectralFunction:
    """F(σ) = 1/(σ + λ), λ in units of σ."""
    return lambda eigenvalues: 1 / (eigenvalues + damping)


def complement(damping: float) -> SpectralFunction:
    """F(σ) = (1 − σ)/λ: of mean_i h_i/(λ + h_i‖x_i‖²) x_i x_iᵀ it is mean_i (h_i x_i x_iᵀ + λI)⁻¹.

    Sherman and Morrison 1950, term by term (DataInf: Kwon et al. 2024, eq. 5). σ never passes 1.
    """
    return lambda eigenvalues: (1 - eigenvalues).clamp(min=0) / damping


def elapsed(time: float, damping: float = 0.0) -> SpectralFunction:
    """F(σ) = ∫₀^τ e^{−sσ} ds = (1 − e^{−τσ})/σ, τ at σ = 0; σ stands for σ + λ."""

    def function(eigenvalues: Tensor) -> Tensor:
        x = time * (eigenvalues + damping)
        zero = x == 0
        return time * torch.where(zero, 1, -torch.expm1(-x) / x.masked_fill(zero, 1))

    return function


def decay(time: float, damping: float = 0.0) -> SpectralFunction:
    """F(σ) = e^{−τ(σ + λ)}."""
    return lambda eigenvalues: torch.exp(-time * (eigenvalues + damping))


def above(cut: float, function: SpectralFunction) -> SpectralFunction:
    """F(σ) where σ ≥ cut > 0, else 0."""

    def truncated(eigenvalues: Tensor) -> Tensor:
        inside = eigenvalues >= cut
        return torch.where(inside, function(eigenvalues.clamp(min=cut)), 0)

    return truncated


def nowhere(eigenvalues: Tensor) -> Tensor:
    """F(σ) = 0."""
    return torch.zeros_like(eigenvalues)


def squared(function: SpectralFunction) -> SpectralFunction:
    """F(σ)²."""
    return lambda eigenvalues: function(eigenvalues).square()


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues σ [r] ≥ 0 and vectors V [k, r] of a curvature over n = ``count`` rows, float64.

    ``vectors`` None: the coordinate axes (a diagonal curvature). Directions outside V have the
    eigenvalue 0. Eigenvalues below ``resolution`` cannot be told from 0. ``inside``: the c
    coordinates that V [c, c] mixes, where all others are axes; theirs are the last eigenvalues.
    """

    eigenvalues: Tensor
    vectors: Tensor | None
    dim: int
    count: int
    resolution: float = 0.0
    inside: Tensor | None = None

    @property
    def trace(self) -> float:
        return float(self.eigenvalues.sum())

    @property
    def full_rank(self) -> bool:
        """Whether H can be inverted without damping."""
        smallest = float(self.eigenvalues.min()) if len(self.eigenvalues) else 0.0
        return len(self.eigenvalues) == self.dim and smallest > self.resolution

    def cut(self, rank: int) -> float:
        """The smallest of the ``rank`` largest eigenvalues that can be told from 0; inf if none.

        Equal eigenvalues are taken together: which of them came first depends on the basis.
        """
        resolved = self.eigenvalues[self.eigenvalues > self.resolution].sort(descending=True).values
        return float(resolved[min(rank, len(resolved)) - 1]) if len(resolved) else float("inf")

    def apply(self, function: SpectralFunction, x: Tensor) -> Tensor:
        """F(H) x for every row of x [m, k], in x's dtype."""
        values = function(self.eigenvalues).to(x.dtype)
        if self.vectors is None:
            return x * values
        vectors = self.vectors.to(x.dtype)
        if self.inside is not None:
            out, core = x * self._on_axes(values), len(self.inside)
            out[:, self.inside] = (x[:, self.inside] @ vectors * values[:core]) @ vectors.T
            return out
        inside = x @ vectors
        out = (inside * values) @ vectors.T
        if len(values) < self.dim:
            out += self._outside(function, x.dtype) * (x - inside @ vectors.T)
        return out

    def quadratic(self, function: SpectralFunction, x: Tensor) -> Tensor:
        """xᵀF(H)x [m] float64 ≥ 0 for every row of x [m, k]; a sum of positive terms.

        Products are in x's dtype, sums in float64: F of a small curvature leaves float32.
        """
        values = function(self.eigenvalues)
        if self.vectors is None:
            return x.square().double() @ values
        vectors = self.vectors.to(x.dtype)
        if self.inside is not None:
            mixed, core = x[:, self.inside] @ vectors, len(self.inside)
            return (
                x.square().double() @ self._on_axes(values)
                + mixed.square().double() @ values[:core]
            )
        inside = x @ vectors
        out = inside.square().double() @ values
        if len(values) < self.dim:
            rest = x - inside @ vectors.T
            out += self._outside(function, torch.float64) * rest.square().sum(1).double()
        return out

    def _on_axes(self, values: Tensor) -> Tensor:
        """``values`` of the coordinates that are axes [k], 0 at those inside."""
        assert self.inside is not None
        axes = torch.ones(self.dim, dtype=torch.bool)
        axes[self.inside] = False
        each = values.new_zeros(self.dim)
        each[axes] = values[len(self.inside) :]
        return each

    def with_axes(self, diagonal: Tensor, inside: Tensor) -> Spectrum:
        """This spectrum on the coordinates ``inside``, and ``diagonal`` [k] on all others."""
        axes = torch.ones(len(diagonal), dtype=torch.bool)
        axes[inside] = False
        eigenvalues = torch.cat([self.eigenvalues, diagonal[axes]])
        return replace(self, eigenvalues=eigenvalues, dim=len(diagonal), inside=inside)

    def _outside(self, function: SpectralFunction, dtype: torch.dtype) -> Tensor:
        return function(self.eigenvalues.new_zeros(1)).to(dtype)

    def arrays(self) -> dict[str, np.ndarray]:
        """For a cache; ``from_arrays`` is the way back."""
        numbers = np.array([self.dim, self.count, self.resolution], np.float64)
        arrays = {"eigenvalues": self.eigenvalues.numpy(), "numbers": numbers}
        parts = {"vectors": self.vectors, "inside": self.inside}
        return arrays | {n: part.numpy() for n, part in parts.items() if part is not None}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> Spectrum:
        dim, count, resolution = arrays["numbers"].tolist()
        parts = ("eigenvalues", "vectors", "inside")
        eigenvalues, vectors, inside = (
            torch.from_numpy(arrays[name]) if name in arrays else None for name in parts
        )
        assert eigenvalues is not None
        return Spectrum(eigenvalues, vectors, int(dim), int(count), resolution, inside)


def nothing(dim: int) -> Spectrum:
    """The spectrum of H = 0: F(H) = F(0)·I, which for the identity function is I."""
    empty = torch.zeros(0, dtype=torch.float64)
    return Spectrum(empty, torch.zeros(dim, 0, dtype=torch.float64), dim, count=0)


@dataclass(frozen=True)
class Block:
    """F of one block of a curvature: x ↦ F(H) x on these columns, H damped by λ."""

    columns: slice
    spectrum: Spectrum
    function: SpectralFunction
    damping: float = 0.0

    @property
    def width(self) -> int:
        return self.columns.stop - self.columns.start

    @property
    def spread(self) -> float:
        """How many times larger F is somewhere than at the mean eigenvalue."""
        known = self.spectrum.eigenvalues
        mean = known.new_tensor([self.spectrum.trace / self.spectrum.dim, 0.0])
        values = self.function(torch.cat([mean, known]))
        return float(values.max() / values[0]) if values[0] > 0 else 1.0


@dataclass(frozen=True)
class Operator:
    """A function of a curvature that is whole, or a block a layer."""

    blocks: tuple[Block, ...]

    def apply(self, x: Tensor) -> Tensor:
        """F x for every row of x [m, k], in x's dtype."""
        return torch.cat([b.spectrum.apply(b.function, x[:, b.columns]) for b in self.blocks], 1)

    def quadratic(self, x: Tensor) -> Tensor:
        """xᵀF x [m] float64 ≥ 0 for every row of x [m, k]."""
        parts = [b.spectrum.quadratic(b.function, x[:, b.columns]) for b in self.blocks]
        return torch.stack(parts).sum(0)

    def with_functions(self, change: Callable[[Block], SpectralFunction]) -> Operator:
        """Another function of each block."""
        return Operator(tuple(replace(block, function=change(block)) for block in self.blocks))

    @property
    def damping(self) -> float:
        """λ; its mean over dimensions where blocks have their own."""
        total = sum(block.width * block.damping for block in self.blocks)
        return total / sum(block.width for block in self.blocks)


def decompose(moment: Gram | WeightedRows | Diagonal) -> Spectrum:
    """The spectrum of a finished second moment; O(min(n, k)³)."""
    if isinstance(moment, Diagonal):
        return Spectrum(moment.mean(), None, len(moment.total), moment.count)
    if isinstance(moment, WeightedRows):
        return _decompose_dual(moment)
    dim = len(moment.total)
    eigenvalues, vectors = torch.linalg.eigh(moment.mean())
    eigenvalues = eigenvalues.clamp_(min=0)
    resolution = max(moment.eps * 8, _EPS * dim) * float(eigenvalues.sum())
    return Spectrum(eigenvalues, vectors, dim, moment.count, resolution)


def _decompose_dual(moment: WeightedRows) -> Spectrum:
    """From XXᵀ/n = U diag(σ) Uᵀ: V = XᵀU/√(nσ); directions that σ does not resolve are left out."""
    X, n = moment.rows, moment.count
    eigenvalues, U = torch.linalg.eigh(X @ X.T / n)
    resolution = _EPS * n * float(eigenvalues.clamp(min=0).sum())
    kept = eigenvalues > resolution
    eigenvalues, U = eigenvalues[kept], U[:, kept]
    vectors = (X.T @ U) / (n * eigenvalues).sqrt()
    return Spectrum(eigenvalues, vectors.contiguous(), X.shape[1], n, resolution)


_EPS = torch.finfo(torch.float64).eps


def require_curvature(trace: float, where: str) -> None:
    """Raises RecipeError if H = 0."""
    if trace == 0:
        raise RecipeError(
            "the curvature is zero: no training example has a gradient at this checkpoint",
            where=where,
            do="use a recipe without curvature (grad_dot, grad_cos), or an earlier checkpoint",
        )


def require_invertible(spectrum: Spectrum, damping: float, where: str) -> None:
    """Raises RecipeError if λ = 0 and H has no inverse."""
    if damping > 0 or spectrum.full_rank:
        return
    rank = int((spectrum.eigenvalues > spectrum.resolution).sum())
    raise RecipeError(
        "damping=0 asks for the inverse of a curvature that has none",
        where=where,
        found=f"rank {rank} of {spectrum.dim} dimensions, {spectrum.count} training examples",
        do="use damping='auto' or a positive multiple of the mean eigenvalue such as 0.1, or "
        "rank for the pseudo-inverse",
    )
