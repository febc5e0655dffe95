"""Identity, dense signs and the count sketch: one row from all parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tda.gradients import Factor, Outer
from tda.projection.tiles import (
    Shapes,
    Tile,
    known_square_norm,
    random_integers,
    random_permutation,
    random_signs,
    square_norm,
    tiles,
    total,
)


def _each_tile(factors: list[Factor], buffer: Tensor, use: Callable[[Tile], None]) -> Tensor:
    """Hand every tile of a gradient to ``use``; returns ‖G‖² ``[example]``."""
    known = known_square_norm(factors)
    square = torch.zeros(len(buffer), device=buffer.device)
    for tile in tiles(factors):
        use(tile)
        if known is None:
            square += tile.values.square().sum(1)
    return square if known is None else known


class Identity:
    """The gradient itself: parameters in the model's order, each row-major."""

    layers: Sequence[tuple[str, int, int]]

    def __init__(self, shapes: Shapes) -> None:
        self.offsets: dict[str, int] = {}
        self.dim = 0
        for name, (rows, columns) in shapes.items():
            self.offsets[name] = self.dim
            self.dim += rows * columns
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        self.layers = [(name, offset, sizes[name]) for name, offset in self.offsets.items()]

    def zeros(self, num_examples: int) -> Tensor:
        return torch.zeros(num_examples, self.dim)

    def add(self, buffer: Tensor, name: str, factors: list[Factor]) -> Tensor:
        def use(tile: Tile) -> None:
            first = self.offsets[name] + tile.start
            buffer[:, first : first + tile.values.shape[1]] += tile.values

        return _each_tile(factors, buffer, use)

    def rows(self, buffer: Tensor) -> Tensor:
        return buffer


class Rademacher:
    """Dense random signs / √dim. Holds [parameters, dim] signs: for small models."""

    layers: Sequence[tuple[str, int, int]] = ()

    def __init__(self, dim: int, seed: int, shapes: Shapes) -> None:
        self.dim = dim
        self.signs = {
            name: random_signs(rows * columns * self.dim, seed, name).reshape(-1, self.dim)
            for name, (rows, columns) in shapes.items()
        }

    def zeros(self, num_examples: int) -> Tensor:
        return torch.zeros(num_examples, self.dim)

    def add(self, buffer: Tensor, name: str, factors: list[Factor]) -> Tensor:
        def use(tile: Tile) -> None:
            signs = self.signs[name][tile.start : tile.start + tile.values.shape[1]]
            buffer.addmm_(tile.values, signs.to(buffer))

        return _each_tile(factors, buffer, use)

    def rows(self, buffer: Tensor) -> Tensor:
        return buffer / self.dim**0.5


class CountSketch:
    """Signed sums of runs of ``dim`` coordinates, each run shifted at random.

    rank_one: parameters whose gradient at an example is one outer product; see `OuterSketch`.
    """

    layers: Sequence[tuple[str, int, int]] = ()

    def __init__(self, dim: int, seed: int, shapes: Shapes, rank_one: Sequence[str] = ()) -> None:
        self.dim = dim
        self.outer = {name: OuterSketch(dim, seed, name, shapes[name]) for name in rank_one}
        sizes = {n: rows * columns for n, (rows, columns) in shapes.items() if n not in rank_one}
        self.signs = {name: random_signs(size, seed, name) for name, size in sizes.items()}
        self.shifts = {
            name: random_integers(-(-size // dim), dim, seed, name, "shift").tolist()
            for name, size in sizes.items()
        }

    def zeros(self, num_examples: int) -> Tensor:
        # Twice as wide: a shifted run is added without wrapping, and wraps once, at the end.
        # Behind it, if there are outer products, what is summed in the frequency domain.
        width = 2 * self.dim + (2 * (self.dim // 2 + 1) if self.outer else 0)
        return torch.zeros(num_examples, width)

    def add(self, buffer: Tensor, name: str, factors: list[Factor]) -> Tensor:
        sketch = self.outer.get(name)
        if sketch is None:
            return _each_tile(factors, buffer, partial(self.add_tile, buffer, name))
        outer = rank_one(factors)
        if outer is not None:
            self._frequencies(buffer).add_(sketch.spectrum(outer))
            return square_norm(factors)
        return _each_tile(factors, buffer, partial(sketch.add_tile, buffer))

    def add_tile(self, buffer: Tensor, name: str, tile: Tile) -> None:
        size = tile.values.shape[1]
        signs = self.signs[name][tile.start : tile.start + size].to(buffer)
        done = 0
        while done < size:
            run, inside = divmod(tile.start + done, self.dim)
            length = min(self.dim - inside, size - done)
            first = self.shifts[name][run] + inside
            part = slice(done, done + length)
            buffer[:, first : first + length].addcmul_(tile.values[:, part], signs[part])
            done += length

    def rows(self, buffer: Tensor) -> Tensor:
        rows = buffer[:, : self.dim] + buffer[:, self.dim : 2 * self.dim]
        if self.outer:
            rows += torch.fft.irfft(self._frequencies(buffer), n=self.dim)
        return rows

    def _frequencies(self, buffer: Tensor) -> Tensor:
        return torch.view_as_complex(buffer[:, 2 * self.dim :].unflatten(1, (-1, 2)))


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
    """

    def __init__(self, dim: int, seed: int, name: str, shape: tuple[int, int]) -> None:
        rows, self.width = shape
        self.dim = dim
        self.left_signs = random_signs(rows, seed, name + "/left")
        self.right = CountSketch(dim, seed, {name + "/right": (1, self.width)})
        self.right_name = name + "/right"
        runs = range(0, rows, dim)
        # Of a run: the bucket of each coordinate, and the coordinate in each bucket.
        self.buckets = [random_permutation(dim, seed, name, f"run{first}") for first in runs]
        self.coordinates = [buckets.argsort() for buckets in self.buckets]

    def spectrum(self, outer: Outer) -> Tensor:
        """Fourier transform of the sketch, ``[example, dim // 2 + 1]`` complex."""
        left, right = outer.left[:, 0, 0].float(), outer.right[:, 0, 0].float()
        buffer = self.right.zeros(len(right)).to(right)
        self.right.add_tile(buffer, self.right_name, Tile(0, right))
        return torch.fft.rfft(self._scattered(left)).mul_(torch.fft.rfft(self.right.rows(buffer)))

    def _scattered(self, left: Tensor) -> Tensor:
        signed = left * self.left_signs.to(left)
        parts = []
        for run, coordinates in enumerate(self.coordinates):
            part = signed[:, run * self.dim : (run + 1) * self.dim]
            padded = F.pad(part, (0, self.dim - part.shape[1]))
            parts.append(padded.index_select(1, coordinates.to(left.device)))
        return total(parts)

    def add_tile(self, buffer: Tensor, tile: Tile) -> None:
        """The same sketch of any gradient of this shape, coordinate by coordinate: slower."""
        place = torch.arange(tile.start, tile.start + tile.values.shape[1])
        row, column = place // self.width, place % self.width
        h = torch.cat(self.buckets)[row]
        g = column + torch.tensor(self.right.shifts[self.right_name])[column // self.dim]
        signs = self.left_signs[row] * self.right.signs[self.right_name][column]
        buckets = ((h + g) % self.dim).to(buffer.device)
        buffer.index_add_(1, buckets, tile.values * signs.to(buffer))
