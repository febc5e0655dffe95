"""Kronecker projections: a basis for each side of each parameter, fitted on a pilot."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda.errors import StoreError
from tda.gradients import Factor, Lookup, Outer, materialise
from tda.npz import read_npz
from tda.products import fast_products
from tda.projection.sketches import CountSketch, Identity
from tda.projection.tiles import Shapes, Tile, random_signs, square_norm, total

_MAX_EIGEN = 4096  # a side wider than this gets a random basis
_SUBSPACE_STEPS = 4
_LARGE = 2**22  # numbers of a gradient of several factors: formed for one example at a time
# parameter -> left [m, O], right [r, I]; of an eigenbasis, also the row and column of coordinates.
Bases = dict[str, tuple[Tensor, ...]]
Counts = Mapping[str, int]  # parameter -> numbers it has in a row
_PARTS = ("left", "right", "row", "column")


class Kronecker:
    """L·G·Rᵀ a parameter: kept as a block of the row, or count-sketched to one row (two_stage)."""

    def __init__(self, bases: Bases, mixed_dim: int | None, seed: int) -> None:
        self.bases = bases
        blocks = {name: (len(left), len(right)) for name, (left, right, *_) in bases.items()}
        # All of a side is I, never multiplied: biases and small layers are taken as they are.
        self.whole = {
            name
            for name, (left, right, *_) in bases.items()
            if blocks[name] == (left.shape[1], right.shape[1])
        }
        inner: Identity | CountSketch = Identity(blocks)
        if mixed_dim is not None and mixed_dim < inner.dim:
            inner = CountSketch(mixed_dim, seed, blocks)
        self.inner = inner
        self.dim = inner.dim
        self.layers = inner.layers

    def zeros(self, num_examples: int) -> Any:
        return self.inner.zeros(num_examples)

    def add(self, buffer: Any, name: str, factors: list[Factor]) -> Tensor:
        if name in self.whole:
            return self.inner.add(buffer, name, factors)
        if name not in self.bases:
            return square_norm(factors)
        left, right = (basis.to(factors[0].device) for basis in self.bases[name])
        block = total([factor.compress(left, right) for factor in factors]).flatten(1)
        if isinstance(self.inner, Identity):
            first = self.inner.offsets[name]
            buffer[:, first : first + block.shape[1]] += block
        else:
            self.inner.add_tile(buffer.runs, Tile(0, block), name)
        return square_norm(factors)

    def rows(self, buffer: Any) -> Tensor:
        return self.inner.rows(buffer)


class Pilot:
    """Second moments E[G Gᵀ] and E[Gᵀ G] of a few examples' gradients, parameter by parameter."""

    def __init__(self) -> None:
        self.left: dict[str, Tensor] = {}
        self.right: dict[str, Tensor] = {}
        self.energy: dict[str, float] = {}

    def add(self, name: str, factors: list[Factor]) -> None:
        """Consume one batch's factors of one parameter."""
        num_rows, width = factors[0].shape
        left = self.left.setdefault(name, torch.zeros(_side(num_rows), _side(num_rows)).double())
        right = self.right.setdefault(name, torch.zeros(_side(width), _side(width)).double())
        for some in _few(factors):
            if len(left):
                left += _left_moment(some).cpu()
            if len(right):
                right += _right_moment(some).cpu()
        if len(left) or len(right):
            self.energy[name] = float((left if len(left) else right).trace())
        else:
            square = float(square_norm(factors).double().sum())
            self.energy[name] = self.energy.get(name, 0.0) + square

    def bases(self, shapes: Shapes, counts: Counts, random: bool, seed: int) -> Bases:
        """Bases with ``counts`` numbers a parameter, or a few less where they are no product of two
        sides; given what came out, the same. A parameter without any has no bases.
        """
        return {
            name: self._pair(name, shape, counts[name], random, seed)
            for name, shape in shapes.items()
            if counts.get(name)
        }

    def shares(self, dim: int, shapes: Shapes) -> Counts:
        """min(dim, all sizes) numbers, by largest remainders.

        A parameter's share of ``dim`` is its share of the gradient norm, and at most its size: what
        it cannot take goes to the others.
        """
        sizes = {name: rows * width for name, (rows, width) in shapes.items()}
        norms = {name: self.energy.get(name, 0.0) ** 0.5 for name in shapes}
        left, found, shares = dim, dict.fromkeys(shapes, 0), _divided(dim, norms)
        while full := [name for name, share in shares.items() if share >= sizes[name]]:
            for name in full:
                found[name] = sizes[name]
                left -= sizes[name]
                del norms[name]
            shares = _divided(left, norms)
        found |= {name: int(share) for name, share in shares.items()}
        by_rest = sorted(shares, key=lambda name: found[name] - shares[name])
        for name in by_rest[: dim - sum(found.values())]:
            found[name] += 1
        return found

    def _pair(
        self, name: str, shape: tuple[int, int], budget: int, random: bool, seed: int
    ) -> tuple[Tensor, Tensor]:
        rows, width = shape
        left = min(rows, max(1, int(budget**0.5)))
        right = min(width, max(1, budget // left))
        left = min(rows, max(1, budget // right))
        return (
            _basis(self.left.get(name), rows, left, random, seed, name + "/left"),
            _basis(self.right.get(name), width, right, random, seed, name + "/right"),
        )


def _divided(number: int, norms: Mapping[str, float]) -> dict[str, float]:
    """A number in proportion to norms; in equal parts where all are 0."""
    whole = sum(norms.values())
    return {n: number * norm / whole if whole else number / len(norms) for n, norm in norms.items()}


def _left_moment(factors: list[Factor]) -> Tensor:
    """Σ G Gᵀ over a batch: of a short outer product LᵀR by its positions, Σ Lᵀ(R Rᵀ)L."""
    sides = _short(factors)
    if sides is None:
        grad = materialise(factors)
        return torch.einsum("boi,bpi->op", grad, grad)
    left, right = sides
    return _weighted(left, torch.bmm(right, right.mT))


def _right_moment(factors: list[Factor]) -> Tensor:
    """Σ Gᵀ G over a batch: of a short outer product Σ Rᵀ(L Lᵀ)R, and of a lookup, too."""
    (first, *more), sides = factors, _short(factors)
    if isinstance(first, Lookup) and not more:
        same = first.index[:, :, None] == first.index[:, None, :]
        return _weighted(first.value.float(), same.float())
    if sides is None:
        grad = materialise(factors)
        return torch.einsum("boi,boj->ij", grad, grad)
    left, right = sides
    return _weighted(right, torch.bmm(left, left.mT))


def _weighted(vectors: Tensor, gram: Tensor) -> Tensor:
    """Σ Vᵀ W V of vectors V ``[example, position, size]``, W ``[example, position, position]``."""
    return (vectors.flatten(0, 1).T @ torch.bmm(gram, vectors).flatten(0, 1)).float()


def _short(factors: list[Factor]) -> tuple[Tensor, Tensor] | None:
    """The sides of an outer product of fewer positions than either has numbers."""
    (first, *more) = factors
    if more or not isinstance(first, Outer) or first.left.shape[2] > 1:
        return None
    if first.left.shape[1] >= min(first.shape):
        return None
    left, right = (side[:, :, 0] for side in first.alike())
    return left, right


def _few(factors: list[Factor]) -> Iterator[list[Factor]]:
    """All examples at once, unless that forms large gradients of each."""
    rows, width = factors[0].shape
    if len(factors) > 1 and rows * width > _LARGE:
        for number in range(factors[0].num_examples):
            yield [factor.examples(slice(number, number + 1)) for factor in factors]
    else:
        yield factors


def _side(size: int) -> int:
    return size if size <= _MAX_EIGEN else 0


def _basis(
    moment: Tensor | None, size: int, rank: int, random: bool, seed: int, name: str
) -> Tensor:
    """``[rank, size]``: leading eigenvectors, or random signs / √rank; all of a full side is I."""
    if rank == size:
        return torch.eye(size)
    if random or moment is None or len(moment) == 0:
        return random_signs(rank * size, seed, name).reshape(rank, size).float() / rank**0.5
    return oriented(_leading(moment, rank, seed, name).T).float().contiguous()


def _leading(moment: Tensor, rank: int, seed: int, name: str) -> Tensor:
    """``[size, rank]``: leading eigenvectors, the largest eigenvalue first.

    Of few by subspace iteration from random signs (Halko et al. 2011, algorithm 4.4): what it
    confuses are neighbours of like eigenvalues, which serve as well. In float32 but for the last
    step, which takes out what rounding has put in.
    """
    size, more = len(moment), 2 * rank
    if 4 * more > size:
        return torch.linalg.eigh(moment)[1][:, -rank:].flip(1)
    span = random_signs(size * more, seed, name + "/start").reshape(size, more).float()
    rounded = (moment / moment.abs().max().clamp(min=torch.finfo(moment.dtype).tiny)).float()
    with fast_products():
        for _ in range(_SUBSPACE_STEPS):
            span = torch.linalg.qr(rounded @ span)[0]
    span = torch.linalg.qr(moment @ span.to(moment))[0]
    turn = torch.linalg.eigh(span.T @ moment @ span)[1]
    return span @ turn[:, -rank:].flip(1)


def oriented(vectors: Tensor) -> Tensor:
    """With signs that make each row's largest entry positive: eigenvectors come without one."""
    largest = vectors.abs().argmax(1, keepdim=True)
    return vectors * torch.where(vectors.gather(1, largest) < 0, -1.0, 1.0).to(vectors)


def bases_to_bytes(bases: Bases) -> bytes:
    """A projection's bases as the bytes of an ``.npz``, the same for the same bases."""
    arrays: dict[str, Any] = {}
    for name, parts in bases.items():
        for part, values in zip(_PARTS, parts, strict=False):
            arrays[f"{name}/{part}"] = values.numpy()
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def bases_from_bytes(data: bytes, shapes: Shapes) -> Bases:
    """The inverse of `bases_to_bytes`. Raises StoreError."""
    try:
        arrays = read_npz(io.BytesIO(data))
        bases = {
            name: tuple(
                torch.from_numpy(arrays[f"{name}/{part}"])
                for part in _PARTS
                if f"{name}/{part}" in arrays
            )
            for name in shapes
        }
    except (ValueError, TypeError) as error:  # TypeError: numbers that torch does not have
        raise StoreError("the bases of the projection cannot be read", found=error) from error
    return {name: parts for name, parts in bases.items() if parts}
