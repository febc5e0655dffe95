"""Gradients in tiles that fit the cache, and the randomness of projections."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tda.gradients import Factor, Lookup

Shapes = Mapping[str, tuple[int, int]]  # each parameter as a matrix [O, I]
_TILE_FLOATS = 2**20  # one tile of gradients, all examples: 4 MiB


def random_bits(count: int, seed: int, name: str, role: str) -> np.ndarray:
    """``count`` bits (uint8 0 or 1), the same on every machine."""
    raw = _philox(seed, name, role).random_raw(-(-count // 64)).astype("<u8")
    return np.unpackbits(raw.view(np.uint8), bitorder="little")[:count]


def random_integers(count: int, below: int, seed: int, name: str, role: str) -> np.ndarray:
    """``count`` integers in [0, below), the same on every machine."""
    raw = _philox(seed, name, role).random_raw(count).astype(np.uint64)
    return (raw % np.uint64(below)).astype(np.int64)


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
    """``[example, coordinate]`` float32: coordinates start, start+1, … of one parameter."""

    start: int
    values: Tensor


def tiles(factors: list[Factor]) -> Iterator[Tile]:
    """One parameter's gradient in runs of neighbouring coordinates, formed one at a time."""
    num_rows, width = factors[0].shape
    step = max(1, _TILE_FLOATS // (factors[0].num_examples * width))
    lookups = [f for f in factors if isinstance(f, Lookup)]
    if len(lookups) == len(factors):  # only the rows that were looked up are not zero
        used = torch.unique(torch.cat([f.index.flatten() for f in lookups]))
        for ids in used.split(step):
            block = total([f.rows_at(ids) for f in lookups])
            for place, row in enumerate(ids.tolist()):
                yield Tile(row * width, block[:, place])
        return
    for start in range(0, num_rows, step):
        block = total([f.rows(start, min(start + step, num_rows)) for f in factors])
        yield Tile(start * width, block.flatten(1))


def total(parts: list[Tensor]) -> Tensor:
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def known_square_norm(factors: list[Factor]) -> Tensor | None:
    """‖G‖² ``[example]`` where it costs less than forming G; None elsewhere."""
    return factors[0].square_norm() if len(factors) == 1 else None


def square_norm(factors: list[Factor]) -> Tensor:
    """‖G‖² ``[example]`` of one parameter's gradient."""
    known = known_square_norm(factors)
    if known is not None:
        return known
    return total([tile.values.square().sum(1) for tile in tiles(factors)])
