"""Sketches of outer products, which are never formed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tda.gradients import Factor, Outer
from tda.projection.tiles import Tile, random_permutation, random_shifts, random_signs, total


def rank_one(factors: list[Factor]) -> Outer | None:
    """The outer product that a gradient is at each example: of a linear layer with one position."""
    first = factors[0]
    return first if len(factors) == 1 and isinstance(first, Outer) and first.is_rank_one else None


class OuterSketch:
    """The sketch of an outer product l ⊗ r, never formed (TensorSketch, Pham and Pagh 2013).

    Coordinate (o, i) goes to bucket (h(o) + g(i)) mod dim with the sign s(o)·t(i), so that the
    sketch of l ⊗ r is the circular convolution of the sketches of l and of r: O(dim log dim) for
    any size of layer. h scatters each run of ``dim`` coordinates by a random permutation, g shifts
    each run at random: two coordinates collide with probability at most 1/(dim−1).

    ring: less than dim where the shorter side fits. Then the buckets are rings of so many each, the
    longer side is scattered over them all, and the shorter one goes on in order from there, round
    its ring: the same probability, from shorter convolutions.
    """

    def __init__(self, dim: int, seed: int, name: str, shape: tuple[int, int], ring: int) -> None:
        self.ring = ring
        self.width = shape[1]
        self.sides = []
        scattered = 0 if ring == dim or shape[0] > shape[1] else 1
        for side, (size, role) in enumerate(zip(shape, ("/left", "/right"), strict=True)):
            signs, runs = random_signs(size, seed, name + role).float(), range(0, size, dim)
            if side == scattered:
                parts = [random_permutation(dim, seed, name, f"run{first}") for first in runs]
                self.sides.append(_Side.of(signs, torch.cat(parts)[:size], dim))
            elif ring < dim:
                self.sides.append(_Side.of(signs, torch.arange(size), ring))
            else:
                shifts = torch.tensor(random_shifts(size, dim, seed, name + role))
                places = torch.arange(size) + shifts.repeat_interleave(dim)[:size]
                self.sides.append(_Side.of(signs, places % dim, dim))

    def spectrum(self, outer: Outer) -> Tensor:
        """The Fourier transform of each ring, ``[example, dim // ring, ring // 2 + 1]`` complex."""
        left, right = self.sides
        vectors = outer.left[:, 0, 0], outer.right[:, 0, 0]
        return left.spectrum(vectors[0], self.ring) * right.spectrum(vectors[1], self.ring)

    def add_tile(self, runs: Tensor, tile: Tile) -> None:
        """The same sketch of any gradient of this shape, coordinate by coordinate: slower."""
        place = torch.arange(tile.start, tile.start + tile.values.shape[1])
        row, column = place // self.width, place % self.width
        left, right = self.sides
        signs = left.signs[row] * right.signs[column]
        first, second = left.places[row], right.places[column]
        inside = (first + second) % self.ring
        buckets = (first - first % self.ring) + (second - second % self.ring) + inside
        runs.index_add_(1, buckets.to(runs.device), tile.values.float() * signs.to(runs))


class _Side(NamedTuple):
    """Coordinate j of a vector goes to ``places[j]`` of ``length``, times ``signs[j]``.

    sources: for each run of ``length`` coordinates, the one that each place has, or the number of
    all where it has none; nothing where the places are in order.
    """

    signs: Tensor
    places: Tensor
    length: int
    sources: list[Tensor]

    @staticmethod
    def of(signs: Tensor, places: Tensor, length: int) -> _Side:
        size, sources = len(places), []
        if not torch.equal(places, torch.arange(size)):
            for first in range(0, size, length):
                run = places[first : first + length]
                source = torch.full((length,), size)
                source[run] = torch.arange(first, first + len(run))
                sources.append(source)
        return _Side(signs, places, length, sources)

    def spectrum(self, vector: Tensor, ring: int) -> Tensor:
        """Of the sketch of vectors ``[example, size]``: ``[example, ring, frequency]`` complex."""
        signed = vector.float() * self.signs.to(vector.device)
        if not self.sources:
            return torch.fft.rfft(signed[:, None], n=self.length)
        filled = F.pad(signed, (0, 1))
        sketch = total(filled.index_select(1, s.to(vector.device)) for s in self.sources)
        return torch.fft.rfft(sketch.unflatten(1, (-1, ring)))
