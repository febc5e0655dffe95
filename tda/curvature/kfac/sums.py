"""The sums of K-FAC and of EK-FAC, and the factored curvature they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda.curvature import EXACT_FLOPS
from tda.errors import GradientError
from tda.gradients import Factor, Lookup, Outer
from tda.projection.eigenbasis import Side, example_tiles, onto, rotated
from tda.projection.kronecker import oriented
from tda.projection.outer import rank_one

MAX_EIGEN = 4096  # a side wider than this keeps its coordinate axes
_TILE_FLOATS = 2**22


@dataclass(frozen=True)
class Block:
    """(U ⊗ V) diag(Λ) (U ⊗ V)ᵀ of a parameter [O, I].

    left [O, O], right [I, I]: eigenvectors as rows, float32; None: the coordinate axes.
    eigenvalues: Λ [O, I] float64 ≥ 0.
    """

    left: Side
    right: Side
    eigenvalues: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Uᵀ x V of every x ``[m, O, I]``."""
        return onto(onto(x, self.right).mT, self.left).mT

    def apply(self, values: Tensor, x: Tensor) -> Tensor:
        """U (values ⊙ Uᵀ x V) Vᵀ of every x ``[m, O, I]``, with values = F(Λ)."""
        inside = self.rotate(x) * values.to(x)
        back = [None if side is None else side.T for side in (self.left, self.right)]
        return onto(onto(inside, back[1]).mT, back[0]).mT


@dataclass(frozen=True)
class EkFac:
    """A factored curvature of a model: a `Block` a parameter, a mean over ``count`` gradients.

    gauss_newton: whether the likelihood was known (else it is that of the data's own targets).
    """

    blocks: Mapping[str, Block]
    count: int
    gauss_newton: bool

    @property
    def trace(self) -> float:
        """tr(F): the mean squared norm of the gradient."""
        return sum(float(block.eigenvalues.sum()) for block in self.blocks.values())

    @property
    def dim(self) -> int:
        """The number of parameters."""
        return sum(block.eigenvalues.numel() for block in self.blocks.values())


@dataclass(frozen=True)
class Moment:
    """Σ over examples and positions of l lᵀ and r rᵀ, float64; only diagonals on wide sides.

    mass: the number of positions, so that F ≈ left ⊗ right / (mass · examples). For gradients that
    come whole (`Dense`) l lᵀ is G Gᵀ, r rᵀ is GᵀG and the mass ‖G‖²: exact where G has one column.
    """

    left: Tensor
    right: Tensor
    mass: float

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.left + other.left, self.right + other.right, self.mass + other.mass)


class Moments:
    """The sums that K-FAC is made of: those of batches, workers and machines ``merge``."""

    def __init__(self) -> None:
        self.count = 0
        self.parts: dict[str, dict[type, Moment]] = {}  # by parameter and form of its factors
        self.shapes: dict[str, tuple[int, int]] = {}

    def add(self, name: str, factors: list[Factor]) -> None:
        """Consume one batch's factors of one parameter."""
        self.shapes[name] = factors[0].shape
        parts = self.parts.setdefault(name, {})
        for factor in factors:
            moment, form = _moment(factor), type(factor)
            parts[form] = parts[form] + moment if form in parts else moment

    def add_examples(self, count: int) -> None:
        """Every example counts, also where it has no gradient."""
        self.count += count

    def merge(self, other: Moments) -> Moments:
        merged = Moments()
        merged.count = self.count + other.count
        merged.shapes = {**self.shapes, **other.shapes}
        merged.parts = {name: dict(parts) for name, parts in self.parts.items()}
        for name, parts in other.parts.items():
            own = merged.parts.setdefault(name, {})
            for form, moment in parts.items():
                own[form] = own[form] + moment if form in own else moment
        return merged

    def kfac(self, gauss_newton: bool) -> EkFac:
        """K-FAC: eigenvectors, and Λ = (Uᵀ L U) ⊗ (Vᵀ R V). Raises GradientError if not finite."""
        blocks = {name: self._block(name) for name in self.parts}
        return EkFac(blocks, self.count, gauss_newton)

    def _block(self, name: str) -> Block:
        parts = [moment for moment in self.parts[name].values() if moment.mass > 0]
        if not all(
            bool(side.isfinite().all()) for part in parts for side in (part.left, part.right)
        ):
            raise GradientError(
                "the gradients of a parameter are not finite, so they have no curvature",
                where=name,
                do="index the data first: that names the example",
            )
        rows, width = self.shapes[name]
        eigenvalues = torch.zeros(rows, width, dtype=torch.float64)
        if not parts:
            return Block(None, None, eigenvalues)
        left = _basis(_sum([p.left * float(_trace(p.right) / p.mass) for p in parts]))
        right = _basis(_sum([p.right * float(_trace(p.left) / p.mass) for p in parts]))
        for part in parts:
            sides = _along(part.left, left), _along(part.right, right)
            eigenvalues += torch.outer(*sides) / (part.mass * self.count)
        return Block(left, right, eigenvalues)


class Corrections:
    """The sums that EK-FAC's eigenvalues are made of, for bases that are known."""

    def __init__(self, bases: EkFac) -> None:
        self.bases = bases
        self.count = 0
        self.totals: dict[str, Tensor] = {}

    def add(self, name: str, factors: list[Factor]) -> None:
        """Consume one batch's factors of one parameter."""
        block = self.bases.blocks.get(name)
        if block is None:
            return  # it had no gradient when the bases were fitted
        if name not in self.totals:
            self.totals[name] = torch.zeros_like(block.eigenvalues)
        _add_squares(self.totals[name], block, factors)

    def add_examples(self, count: int) -> None:
        self.count += count

    def merge(self, other: Corrections) -> Corrections:
        """With the sums of other examples in the same bases."""
        merged = Corrections(self.bases)
        merged.count = self.count + other.count
        merged.totals = dict(self.totals)
        for name, sums in other.totals.items():
            merged.totals[name] = merged.totals[name] + sums if name in merged.totals else sums
        return merged

    def ekfac(self) -> EkFac:
        """EK-FAC: the same eigenvectors with Λ = E (Uᵀ G V)²."""
        blocks = {}
        for name, block in self.bases.blocks.items():
            sums = self.totals.get(name, torch.zeros_like(block.eigenvalues))
            blocks[name] = replace(block, eigenvalues=sums / max(1, self.count))
        return replace(self.bases, blocks=blocks, count=self.count)


def _moment(factor: Factor) -> Moment:
    if isinstance(factor, Lookup):
        used = factor.value.any(-1)
        rows = torch.bincount(factor.index[used], minlength=factor.num_rows).double().cpu()
        return Moment(rows, _second_moment(factor.value[used]), float(used.sum()))
    if isinstance(factor, Outer):
        left, right = factor.left, factor.right
        used = left.any(-1) & right.any(-1)
        left = (left * used[..., None]).flatten(2).flatten(0, 1)
        return Moment(_second_moment(left), _second_moment(right[used]), float(used.sum()))
    grad = factor.rows(0, factor.shape[0])
    sides = grad.mT.flatten(0, 1), grad.flatten(0, 1)
    mass = float(grad.double().square().sum())
    return Moment(_second_moment(sides[0]), _second_moment(sides[1]), mass)


def _second_moment(x: Tensor) -> Tensor:
    """Σ x xᵀ of vectors ``[number, d]``, float64: [d, d], or its diagonal [d] if d is large."""
    if x.shape[1] > MAX_EIGEN:
        rows = max(1, _TILE_FLOATS // x.shape[1])
        return torch.stack([part.double().square().sum(0) for part in x.split(rows)]).sum(0).cpu()
    if x.numel() * x.shape[1] < EXACT_FLOPS:
        x = x.double()
        return (x.T @ x).cpu()
    x = x.float()
    largest = x.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # squares may leave float32
    x = x / largest
    return (x.T @ x).double().mul_(largest.double() ** 2).cpu()


def _trace(moment: Tensor) -> Tensor:
    return moment.sum() if moment.ndim == 1 else moment.trace()


def _sum(moments: list[Tensor]) -> Tensor:
    """Of second moments of one side; a diagonal among whole ones is made whole."""
    if any(m.ndim == 2 for m in moments):
        moments = [torch.diag(m) if m.ndim == 1 else m for m in moments]
    return torch.stack(moments).sum(0)


def _basis(moment: Tensor) -> Side:
    """Eigenvectors as rows, the largest eigenvalue first; axes where the moment is diagonal."""
    if moment.ndim == 1:
        return None
    return oriented(torch.linalg.eigh(moment)[1].flip(1).T).float().contiguous()


def _along(moment: Tensor, basis: Side) -> Tensor:
    """uᵀ M u of every basis vector u, [d] float64 ≥ 0."""
    if basis is None:
        return moment if moment.ndim == 1 else moment.diagonal()
    vectors = basis.double()
    if moment.ndim == 1:
        return vectors.square() @ moment
    return ((vectors @ moment) * vectors).sum(1).clamp(min=0)


def _add_squares(sums: Tensor, block: Block, factors: list[Factor]) -> None:
    """sums += Σ_example (Uᵀ G V)², [O, I] float64."""
    outer, first = rank_one(factors), factors[0]
    device = first.device
    left, right = (None if s is None else s.to(device) for s in (block.left, block.right))
    if outer is not None:
        sides = onto(outer.left[:, 0, 0].float(), left), onto(outer.right[:, 0, 0].float(), right)
        squares = [side.double().square() for side in sides]
        sums += (squares[0].T @ squares[1]).cpu()
    elif len(factors) == 1 and isinstance(first, Lookup) and left is None:
        # A row of the table is in use at few examples: add up its positions at each of them.
        example = torch.arange(len(first.index), device=device)[:, None] * first.num_rows
        pairs, place = torch.unique(example + first.index, return_inverse=True)
        value = onto(first.value.float(), right).flatten(0, 1)
        rows = value.new_zeros(len(pairs), value.shape[1]).index_add_(0, place.flatten(), value)
        sums.index_add_(0, (pairs % first.num_rows).cpu(), rows.double().square().cpu())
    else:
        for _, some in example_tiles(factors, sums.numel()):
            sums += rotated(some, left, right).double().square().sum(0).cpu()
