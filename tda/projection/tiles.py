"""Gradients in tiles that fit the cache, and the randomness of projections."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from tda.gradients import Convolved, Factor, Lookup, Outer
from tda.gradients.factors import gram_square_norm, short_sum_of_rows, sum_of_rows

Shapes = Mapping[str, tuple[int, int]]  # each parameter as a matrix [O, I]
_TILE_FLOATS = 2**21  # one tile of gradients: 8 MiB, which stays in a cache
_GPU_TILE_FLOATS = 2**27  # there a tile costs launches, and no cache would hold it
_GPU_ROWS = 64  # there products of rows that start elsewhere than at a multiple of these are slow
_FEW = 8  # examples of a tile, at least: each costs the overhead of a tile again


def random_bits(count: int, seed: int, name: str, role: str) -> np.ndarray:
    """``count`` bits (uint8 0 or 1), the same on every machine."""
    raw = _philox(seed, name, role).random_raw(-(-count // 64)).astype("<u8")
    return np.unpackbits(raw.view(np.uint8), bitorder="little")[:count]


def random_integers(count: int, below: int, seed: int, name: str, role: str) -> np.ndarray:
    """``count`` integers in [0, below), the same on every machine."""
    raw = _philox(seed, name, role).random_raw(count).astype(np.uint64)
    return (raw % np.uint64(below)).astype(np.int64)


def random_shifts(size: int, dim: int, seed: int, name: str) -> list[int]:
    """One integer in [0, dim) for each run of ``dim`` coordinates."""
    return random_integers(-(-size // dim), dim, seed, name, "shift").tolist()


def random_permutation(size: int, seed: int, name: str, role: str) -> Tensor:
    """A permutation of range(size), the same on every machine."""
    raw = _philox(seed, name, role).random_raw(size)
    return torch.from_numpy(np.argsort(raw, kind="stable"))


def _philox(seed: int, name: str, role: str) -> np.random.Philox:
    key = hashlib.blake2b(f"{seed}/{role}/{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(key, "<u8"))


def random_signs(count: int, seed: int, name: str) -> Tensor:
    bits = random_bits(count, seed, name, "sign")
    return torch.from_numpy(bits.astype(np.int8) * 2 - 1)


@dataclass(frozen=True)
class Tile:
    """``[example, coordinate]``: coordinates start, start+1, … of one parameter; float32, but on a
    GPU bfloat16 where they are a product of such, which is read there as it is."""

    start: int
    values: Tensor


def few_examples(factors: list[Factor]) -> Iterator[tuple[slice, list[Factor]]]:
    """A few examples at a time: as many whole gradients as a tile holds.

    Products are faster with all rows of a few examples than with a few rows of all.
    """
    count = factors[0].num_examples
    num_rows, width = factors[0].shape
    positions = max((f.left.shape[1] for f in factors if isinstance(f, Convolved)), default=0)
    step = max(_FEW, _tile_floats(factors) // (max(num_rows, positions) * width))
    if step >= count or not any(isinstance(factor, Outer) for factor in factors):
        yield slice(0, count), factors
        return
    for start in range(0, count, step):
        span = slice(start, start + step)
        yield span, [factor.examples(span) for factor in factors]


def _tile_floats(factors: list[Factor]) -> int:
    return _TILE_FLOATS if factors[0].device.type == "cpu" else _GPU_TILE_FLOATS


def tiles(factors: list[Factor]) -> Iterator[Tile]:
    """One parameter's gradient in runs of neighbouring coordinates, formed one at a time."""
    num_rows, width = factors[0].shape
    step = max(1, _tile_floats(factors) // (factors[0].num_examples * width))
    on_cpu = factors[0].device.type == "cpu"
    formed = sum_of_rows if on_cpu else short_sum_of_rows
    if not on_cpu and step > _GPU_ROWS:
        step -= step % _GPU_ROWS
    lookups = [f for f in factors if isinstance(f, Lookup)]
    if on_cpu and len(lookups) == len(factors):  # only rows that were looked up are not zero
        used = torch.unique(torch.cat([f.index.flatten() for f in lookups]))
        for ids in used.split(step):
            block = total([f.rows_at(ids) for f in lookups])
            for place, row in enumerate(ids.tolist()):
                yield Tile(row * width, block[:, place])
        return
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield Tile(start * width, formed(factors, start, stop).flatten(1))


def total(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def known_square_norm(factors: list[Factor]) -> Tensor | None:
    """‖G‖² ``[example]`` where it costs less than forming G; None elsewhere."""
    return factors[0].square_norm() if len(factors) == 1 else None


def square_norm(factors: list[Factor]) -> Tensor:
    """‖G‖² ``[example]`` of one parameter's gradient, which nobody else forms."""
    first = factors[0]
    if isinstance(first, Convolved) and len(factors) == 1 and first.has_long_lines:
        first = first.channels_last()  # the same numbers in another order
        factors = [first]
    known = known_square_norm(factors)
    if known is not None:
        return known
    sides = _short_sides(factors)
    if sides is not None:
        return gram_square_norm(sides)
    square = [
        total([row_square_norm(tile.values) for tile in tiles(some)])
        for _, some in few_examples(factors)
    ]
    return torch.cat(square)


def _short_sides(factors: list[Factor]) -> list[Outer | Lookup] | None:
    """The same, where products of all pairs of their positions cost less than forming G."""
    sides = [
        f for f in factors if isinstance(f, Lookup) or (isinstance(f, Outer) and f.num_groups == 1)
    ]
    (num_rows, width), num_positions = factors[0].shape, sum(f.num_positions for f in sides)
    are_short = num_positions * (num_rows + width) <= num_rows * width
    return sides if are_short and len(sides) == len(factors) else None


def row_square_norm(values: Tensor) -> Tensor:
    """‖v‖² of each row v, in one pass: float32."""
    return torch.linalg.vector_norm(values, dim=1, dtype=torch.float32).square()
