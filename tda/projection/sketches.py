"""Identity, dense signs and the count sketch: one row from all parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tda.gradients import Factor
from tda.projection.tiles import (
    Shapes,
    Tile,
    known_square_norm,
    random_integers,
    random_signs,
    tiles,
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
    """Signed sums of runs of ``dim`` coordinates, each run shifted at random."""

    layers: Sequence[tuple[str, int, int]] = ()

    def __init__(self, dim: int, seed: int, shapes: Shapes) -> None:
        self.dim = dim
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        self.signs = {name: random_signs(size, seed, name) for name, size in sizes.items()}
        self.shifts = {
            name: random_integers(-(-size // self.dim), self.dim, seed, name, "shift").tolist()
            for name, size in sizes.items()
        }

    def zeros(self, num_examples: int) -> Tensor:
        # Twice as wide: a shifted run is added without wrapping, and wraps once, at the end.
        return torch.zeros(num_examples, 2 * self.dim)

    def add(self, buffer: Tensor, name: str, factors: list[Factor]) -> Tensor:
        return _each_tile(factors, buffer, partial(self.add_tile, buffer, name))

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
        return buffer[:, : self.dim] + buffer[:, self.dim :]
