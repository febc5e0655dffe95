"""Identity, dense signs and the count sketch: one row from all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tda.gradients import Convolved, Dense, Elementwise, Factor
from tda.projection.outer import OuterSketch, rank_one
from tda.projection.tiles import (
    Shapes,
    Tile,
    few_examples,
    known_square_norm,
    random_shifts,
    random_signs,
    row_square_norm,
    square_norm,
    tiles,
    total,
)

# (values, signs, shifts, inside, dim) -> sketch, ‖v‖²
Launch = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]

_SPAN_FLOATS = 2**18  # numbers transformed at a time: 1 MiB


@cache
def _launch(device_type: str) -> Launch | None:
    """What adds a tile's runs in one launch on such a device, where there is something."""
    if device_type != "cuda" or torch.cuda.get_device_capability() < (7, 0):
        return None
    try:
        from tda.projection.kernels import add_runs
    except ImportError:
        return None
    return add_runs


def _each_tile(
    factors: list[Factor], buffer: Tensor, use: Callable[[Tensor, Tile], Tensor | None]
) -> Tensor:
    """Hand every tile of a gradient, and its examples' buffer, to ``use``; ‖G‖² ``[example]``.

    ``use`` may return the tile's part of that, where it has seen every number.
    """
    known = known_square_norm(factors)
    square = torch.zeros(len(buffer), device=buffer.device)
    for span, some in few_examples(factors):
        for tile in tiles(some):
            seen = use(buffer[span], tile)
            if known is None:
                square[span] += row_square_norm(tile.values) if seen is None else seen
            del tile  # before the next is formed, which then lies where this one did
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
        def use(buffer: Tensor, tile: Tile) -> None:
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
        def use(buffer: Tensor, tile: Tile) -> None:
            signs = self.signs[name][tile.start : tile.start + tile.values.shape[1]]
            buffer.addmm_(tile.values.float(), signs.to(buffer))

        return _each_tile(factors, buffer, use)

    def rows(self, buffer: Tensor) -> Tensor:
        return buffer / self.dim**0.5


@dataclass(frozen=True)
class Sums:
    """What a count sketch adds into, and what waits to be added.

    Large gradients are added as they come. Small ones – vectors, and outer products, which are
    never formed – are sketched all together, a few examples at a time: they stay in the cache then.
    """

    num_examples: int
    dim: int
    device: str | torch.device = "cpu"
    waiting: list[tuple[str, list[Factor]]] = field(default_factory=list)

    def to(self, device: str | torch.device) -> Sums:
        return replace(self, device=device)

    @cached_property
    def runs(self) -> Tensor:
        """``[example, 2 dim]``: a shifted run is added without wrapping, and wraps at the end."""
        return torch.zeros(self.num_examples, 2 * self.dim, device=self.device)

    def some(self, span: slice) -> Tensor:
        """``runs`` of some examples, to be written to once."""
        if "runs" in vars(self):
            return self.runs[span]
        count = len(range(self.num_examples)[span])
        return torch.zeros(count, 2 * self.dim, device=self.device)


class CountSketch:
    """Signed sums of runs of ``dim`` coordinates, each run shifted at random.

    rank_one: parameters whose gradient at an example is one outer product, and ring: buckets of one
    of their rings; see `OuterSketch`.
    filters: those of convolutions whose coordinates (output, channel, kernel) are counted in the
    order (output, kernel, channel), by the size of their kernel.
    """

    layers: Sequence[tuple[str, int, int]] = ()

    def __init__(
        self,
        dim: int,
        seed: int,
        shapes: Shapes,
        rank_one: Sequence[str] = (),
        filters: Mapping[str, int] | None = None,
        ring: int | None = None,
    ) -> None:
        self.dim = dim
        self.ring = ring or dim
        self.filters = filters or {}
        self.outer = {
            name: OuterSketch(dim, seed, name, shapes[name], self.ring) for name in rank_one
        }
        sizes = {n: rows * columns for n, (rows, columns) in shapes.items() if n not in rank_one}
        self.signs = {name: random_signs(size, seed, name) for name, size in sizes.items()}
        self.shifts = {name: random_shifts(size, dim, seed, name) for name, size in sizes.items()}
        self._placed: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def zeros(self, num_examples: int) -> Sums:
        return Sums(num_examples, self.dim)

    def add(self, buffer: Sums, name: str, factors: list[Factor]) -> Tensor:
        if name in self.filters:
            factors = [_channels_last(factor, self.filters[name]) for factor in factors]
        if self._waits(factors):
            buffer.waiting.append((name, factors))
            return square_norm(factors)
        return _each_tile(factors, buffer.runs, partial(self.add_tile, name=name))

    def _waits(self, factors: list[Factor]) -> bool:
        (first, *more) = factors
        small = isinstance(first, Dense) and first.grad[0].numel() <= self.dim
        return not more and (small or rank_one(factors) is not None)

    def add_tile(self, buffer: Tensor, tile: Tile, name: str) -> Tensor | None:
        if name in self.outer:
            self.outer[name].add_tile(buffer, tile)
        elif buffer.device.type == "cpu":
            self.add_runs(buffer, tile, name)
        elif (launch := _launch(buffer.device.type)) is not None:
            return self.add_launched(launch, buffer, tile, name)
        else:
            self.add_rolled(buffer, tile, name)
        return None

    def add_runs(self, buffer: Tensor, tile: Tile, name: str) -> None:
        size = tile.values.shape[1]
        signs = self.signs[name][tile.start : tile.start + size].to(buffer)
        run, inside = divmod(tile.start, self.dim)
        head = min(self.dim - inside, size)
        whole, rest = divmod(size - head, self.dim)
        lengths = [head] + [self.dim] * whole + [rest] * (rest > 0)
        shifts = self.shifts[name][run : run + len(lengths)]
        parts = tile.values.split(lengths, 1), signs.split(lengths)
        for shift, length, values, sign in zip(shifts, lengths, *parts, strict=True):
            buffer.narrow(1, shift + inside, length).addcmul_(values, sign)
            inside = 0

    def add_launched(self, launch: Launch, buffer: Tensor, tile: Tile, name: str) -> Tensor:
        """The same for all runs in one launch, which sees the tile's ‖v‖² too."""
        signs, shifts = self._on(buffer.device, name)
        run, inside = divmod(tile.start, self.dim)
        own = signs[tile.start : tile.start + tile.values.shape[1]]
        sketch, square = launch(tile.values, own, shifts[run:], inside, self.dim)
        buffer[:, : self.dim] += sketch
        return square

    def add_rolled(self, buffer: Tensor, tile: Tile, name: str) -> None:
        """The same for all runs in a few operations, where that is not to be had."""
        signs, shifts = self._on(buffer.device, name)
        size = tile.values.shape[1]
        run, inside = divmod(tile.start, self.dim)
        num_runs = -(-(inside + size) // self.dim)
        signed = tile.values.float() * signs[tile.start : tile.start + size]
        filled = F.pad(signed, (inside, num_runs * self.dim - inside - size))
        places = torch.arange(self.dim, device=buffer.device)
        source = (places - shifts[run : run + num_runs, None]) % self.dim
        rolled = filled.view(len(filled), num_runs, self.dim)
        buffer[:, : self.dim] += rolled.gather(2, source.expand_as(rolled)).sum(1)

    def _on(self, device: torch.device, name: str) -> tuple[Tensor, Tensor]:
        """Signs and shifts where the gradients are, taken there once."""
        if (name, device) not in self._placed:
            shifts = torch.tensor(self.shifts[name], dtype=torch.int32)
            self._placed[name, device] = self.signs[name].to(device), shifts.to(device)
        return self._placed[name, device]

    def rows(self, buffer: Sums) -> Tensor:
        rows = torch.empty(buffer.num_examples, self.dim, device=buffer.device)
        for span in self._spans(rows):
            runs, spectra = buffer.some(span), []
            for name, factors in buffer.waiting:
                some: list[Factor] = [factor.examples(span) for factor in factors]
                outer = rank_one(some) if name in self.outer else None
                if outer is not None:
                    spectra.append(self.outer[name].spectrum(outer))
                    continue
                for tile in tiles(some):
                    self.add_tile(runs, tile, name)
            torch.add(runs[:, : self.dim], runs[:, self.dim :], out=rows[span])
            if spectra:
                rows[span] += torch.fft.irfft(total(spectra), n=self.ring).flatten(1)
        return rows

    def _spans(self, rows: Tensor) -> Iterator[slice]:
        """A few examples at a time: their transforms stay in the cache."""
        step = max(1, _SPAN_FLOATS // self.dim) if rows.device.type == "cpu" else len(rows)
        return (slice(start, start + step) for start in range(0, len(rows), step))


def _channels_last(factor: Factor, kernel: int) -> Factor:
    if isinstance(factor, Convolved):
        return factor.channels_last()
    return Elementwise([factor], lambda g, *_: g.unflatten(2, (-1, kernel)).mT.flatten(2))
