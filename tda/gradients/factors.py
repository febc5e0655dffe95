"""The gradient of one parameter at each example of a batch, kept in the form it comes in.

A parameter of shape ``[O, …]`` is the matrix ``[O, I]``. Its gradient G at one example is

    Outer    G = Σ_t left_t ⊗ right_t       weights of linear layers
    Convolved     the same, right_t what position t sees: formed when it is asked for
    Lookup   G = Σ_t onehot(index_t) ⊗ value_t        embeddings
    Dense    G                              everything else
    Elementwise  u(Σ of these), coordinate by coordinate      a metric's scaling

and is never stored whole: ``rows`` gives a slice of it, ``compress`` gives L·G·Rᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MANY_CHANNELS = 16  # lines of so many numbers are worth copying


@dataclass(frozen=True)
class Outer:
    """left ``[example, position, group, O/groups]``, right ``[example, position, group, I]``."""

    left: Tensor
    right: Tensor

    def to(self, device: torch.device) -> Outer:
        return Outer(self.left.to(device), self.right.to(device))

    def examples(self, span: slice) -> Outer:
        return Outer(self.left[span], self.right[span])

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def num_examples(self) -> int:
        return len(self.left)

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[2] * self.left.shape[3], self.right.shape[3]

    @property
    def num_positions(self) -> int:
        return self.left.shape[1]

    @property
    def num_groups(self) -> int:
        return self.left.shape[2]

    @property
    def is_rank_one(self) -> bool:
        """Whether G is one outer product: one position, one group."""
        return self.num_positions == self.num_groups == 1

    def rows(self, start: int, stop: int) -> Tensor:
        """G[start:stop] at each example, ``[example, stop-start, I]`` float32."""
        return self.short_rows(start, stop).float()

    def short_rows(self, start: int, stop: int) -> Tensor:
        """The same in the type that both sides are multiplied in."""
        left, right = self.alike()
        if self.is_rank_one:
            return left[:, 0, 0, start:stop, None] * right[:, 0, 0, None]
        if left.shape[2] == 1:
            return torch.bmm(left[:, :, 0, start:stop].mT, right[:, :, 0])
        return torch.einsum("btgo,btgi->bgoi", left, right).flatten(1, 2)[:, start:stop]

    @property
    def _kind(self) -> torch.dtype:
        """The type both sides are multiplied in: float32, or bfloat16 as in autocast, where a plain
        backward pass would round both too."""
        short = torch.bfloat16 in (self.left.dtype, self._right_dtype)
        return torch.bfloat16 if short else torch.float32

    @property
    def _right_dtype(self) -> torch.dtype:
        return self.right.dtype

    def alike(self) -> tuple[Tensor, Tensor]:
        """Both sides in the type that they are multiplied in."""
        return self.left.to(self._kind), self.right.to(self._kind)

    def compress(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        """``[example, m, r]`` from bases ``[m, O]`` and ``[r, I]``."""
        kind = self._kind
        left_basis, right_basis = left_basis.to(kind), right_basis.to(kind)
        if self.is_rank_one:  # outer products one by one are slow by bmm
            turned = self.left[:, 0, 0].to(kind) @ left_basis.T
            seen = self.right[:, 0, 0].to(kind) @ right_basis.T
            return turned.float()[:, :, None] * seen.float()[:, None]
        basis = left_basis.reshape(-1, *self.left.shape[2:])
        turned = torch.einsum("mgo,btgo->btgm", basis, self.left.to(kind)).flatten(1, 2)
        return torch.bmm(turned.mT, self.right_in(right_basis).flatten(1, 2)).float()

    def right_in(self, basis: Tensor) -> Tensor:
        """The right side's coordinates ``[example, position, group, r]`` in a basis ``[r, I]``."""
        return self.right.to(basis.dtype) @ basis.T

    def square_norm(self) -> Tensor | None:
        """‖G‖² ``[example]`` = Σ_ts ⟨left_t, left_s⟩⟨right_t, right_s⟩, where that is cheaper."""
        size, width = self.shape
        if self.num_groups > 1 or self.num_positions**2 * (size + width) > size * width:
            return None
        return self.gram_square_norm()

    def gram_square_norm(self) -> Tensor:
        """The same of one group, whatever it costs."""
        left, right = (side[:, :, 0] for side in self.alike())
        if left.shape[1] == 1:
            return (_norm(left) * _norm(right)).square()
        grams = torch.bmm(left, left.mT).float(), torch.bmm(right, right.mT).float()
        return (grams[0] * grams[1]).sum((1, 2))


def _norm(vector: Tensor) -> Tensor:
    """``[example]`` from ``[example, 1, size]``."""
    return torch.linalg.vector_norm(vector, dim=(1, 2), dtype=torch.float32)


@dataclass(frozen=True)
class Window:
    """What each output position of a convolution sees of its input; the arguments of torch's.

    channels_last: a patch is [*kernel, C], as pictures lie in memory then, not [C, *kernel].
    """

    kernel: tuple[int, ...]
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    channels_last: bool = False

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """``[example, position, group, r]``: each group of x ``[example, C, *size]`` with every
        one of the kernels ``[r, (C/groups)·kernel]``."""
        count, channels = x.shape[0], x.shape[1] // self.groups
        function = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        out = function(
            x.reshape(-1, channels, *x.shape[2:]),
            kernels.reshape(-1, channels, *self.kernel),
            None, self.stride, self.padding, self.dilation,
        )  # fmt: skip
        return out.reshape(count, self.groups, len(kernels), -1).permute(0, 3, 1, 2)

    def patches(self, x: Tensor) -> Tensor:
        """``[example, position, group, (C/groups)·kernel]`` of x ``[example, C, *size]``.

        Copied in lines as long as can be: of positions, or of all channels.
        """
        dims = len(self.kernel)
        stride, dilation = _each(self.stride, dims), _each(self.dilation, dims)
        spans = [d * (k - 1) for d, k in zip(dilation, self.kernel, strict=True)]
        if self.padding == "same":
            pads = [(span // 2, span - span // 2) for span in spans]
        else:
            padding = 0 if self.padding == "valid" else self.padding
            pads = [(p, p) for p in _each(padding, dims)]
        sides = [side for pad in reversed(pads) for side in pad]
        first = 1 if self.channels_last else 2  # axis of x's size
        if self.channels_last:
            x, sides = x.movedim(1, -1), [0, 0, *sides]
        seen = F.pad(x.contiguous(), sides)
        for axis in range(dims):
            seen = seen.unfold(first + axis, spans[axis] + 1, stride[axis])[..., :: dilation[axis]]
        out, kernel = range(first, first + dims), range(2 + dims, 2 + 2 * dims)
        num_positions = seen.shape[first : first + dims].numel()
        if self.channels_last:
            lines = seen.permute(0, *out, *kernel, 1 + dims)
            return lines.reshape(len(x), num_positions, self.groups, -1)
        lines = seen.permute(0, 1, *kernel, *out)
        return lines.reshape(len(x), self.groups, -1, num_positions).permute(0, 3, 1, 2)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


class Convolved(Outer):
    """``right`` is what each position sees of x ``[example, C, *size]`` through a window.

    Many times as large as x, so it is formed where it is asked for, best of a few examples.
    """

    x: Tensor
    window: Window

    def __init__(self, left: Tensor, x: Tensor, window: Window) -> None:
        for name, value in (("left", left), ("x", x), ("window", window)):
            object.__setattr__(self, name, value)

    @cached_property
    def right(self) -> Tensor:
        return self.window.patches(self.x)

    @property
    def has_long_lines(self) -> bool:
        """Whether patches are copied faster channels last."""
        return self.window.groups == 1 and self.x.shape[1] >= _MANY_CHANNELS

    def channels_last(self) -> Convolved:
        """The same of one group with columns in the order [*kernel, C]."""
        return Convolved(self.left, self.x, replace(self.window, channels_last=True))

    def to(self, device: torch.device) -> Convolved:
        return Convolved(self.left.to(device), self.x.to(device), self.window)

    def examples(self, span: slice) -> Convolved:
        return Convolved(self.left[span], self.x[span], self.window)

    @property
    def shape(self) -> tuple[int, int]:
        width = self.x.shape[1] // self.window.groups * math.prod(self.window.kernel)
        return self.left.shape[2] * self.left.shape[3], width

    @property
    def _right_dtype(self) -> torch.dtype:
        return self.x.dtype

    def right_in(self, basis: Tensor) -> Tensor:
        return self.window.convolve(self.x.to(basis.dtype), basis)


@dataclass(frozen=True)
class Lookup:
    """index ``[example, position]``, value ``[example, position, I]``, of an ``[O, I]`` table."""

    index: Tensor
    value: Tensor
    num_rows: int

    def to(self, device: torch.device) -> Lookup:
        return Lookup(self.index.to(device), self.value.to(device), self.num_rows)

    def examples(self, span: slice) -> Lookup:
        return replace(self, index=self.index[span], value=self.value[span])

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def num_examples(self) -> int:
        return len(self.index)

    @property
    def num_positions(self) -> int:
        return self.index.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.value.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        ids = torch.arange(start, stop, device=self.index.device)
        return self.rows_at(ids)

    def rows_at(self, ids: Tensor) -> Tensor:
        """G[ids] at each example, ``[example, len(ids), I]`` float32; ids sorted."""
        size = (self.num_examples, len(ids), self.shape[1])
        return self.add_at(ids, self.value.new_zeros(size, dtype=torch.float32))

    def add_at(self, ids: Tensor, out: Tensor) -> Tensor:
        """The same, added to ``out``, in place."""
        place = torch.searchsorted(ids, self.index).clamp(max=len(ids) - 1)
        hit = ids[place] == self.index
        batch, num_positions, width = self.value.shape
        value = torch.where(hit[:, :, None], self.value.float(), 0.0)
        return out.scatter_add_(1, place[:, :, None].expand(batch, num_positions, width), value)

    def compress(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        left = left_basis.T[self.index]
        return torch.bmm(left.mT, self.value.float() @ right_basis.T)

    def square_norm(self) -> Tensor:
        return inner(self, self)


@dataclass(frozen=True)
class Dense:
    """grad ``[example, O, I]``."""

    grad: Tensor

    def to(self, device: torch.device) -> Dense:
        return Dense(self.grad.to(device))

    def examples(self, span: slice) -> Dense:
        return Dense(self.grad[span])

    @property
    def device(self) -> torch.device:
        return self.grad.device

    @property
    def num_examples(self) -> int:
        return len(self.grad)

    @property
    def shape(self) -> tuple[int, int]:
        return self.grad.shape[1], self.grad.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.grad[:, start:stop].float()

    def compress(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        # One large product a side: broadcasting ``@`` would make one an example.
        turned = torch.tensordot(self.grad.float(), left_basis, ([1], [1]))
        return torch.tensordot(turned, right_basis.to(turned.dtype), ([1], [1])).float()

    def square_norm(self) -> Tensor | None:
        return self.grad.float().square().sum((1, 2))


@dataclass(frozen=True)
class Elementwise:
    """function(G, start, stop) of rows start … stop-1 of the sum G of ``factors``, same shape."""

    factors: list[Factor]
    function: Callable[[Tensor, int, int], Tensor]

    def to(self, device: torch.device) -> Elementwise:
        return Elementwise([factor.to(device) for factor in self.factors], self.function)

    def examples(self, span: slice) -> Dense:
        return Dense(self.rows(0, self.shape[0])[span])  # the function may know every example

    @property
    def device(self) -> torch.device:
        return self.factors[0].device

    @property
    def num_examples(self) -> int:
        return self.factors[0].num_examples

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors[0].shape

    def rows(self, start: int, stop: int) -> Tensor:
        return self.function(sum_of_rows(self.factors, start, stop), start, stop)

    def compress(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        return left_basis @ self.rows(0, self.shape[0]) @ right_basis.T

    def square_norm(self) -> Tensor | None:
        return None


Factor = Outer | Lookup | Dense | Elementwise


def sum_of_rows(factors: list[Factor], start: int, stop: int) -> Tensor:
    """Σ of factors of one parameter: G[start:stop], ``[example, stop-start, I]`` float32."""
    first, *more = sorted(factors, key=lambda factor: not isinstance(factor, Outer))
    whole = first.rows(start, stop)
    for factor in more:
        if isinstance(factor, Lookup) and isinstance(first, Outer):  # whose rows are new numbers
            factor.add_at(torch.arange(start, stop, device=factor.device), whole)
        else:
            whole = whole + factor.rows(start, stop)
    return whole


def short_sum_of_rows(factors: list[Factor], start: int, stop: int) -> Tensor:
    """The same; of one outer product in the type that it is multiplied in."""
    if len(factors) == 1 and isinstance(factors[0], Outer):
        return factors[0].short_rows(start, stop)
    return sum_of_rows(factors, start, stop)


def materialise(factors: list[Factor]) -> Tensor:
    """Σ of factors of one parameter, ``[example, O, I]`` float32."""
    return sum_of_rows(factors, 0, factors[0].shape[0])


def gram_square_norm(factors: Sequence[Outer | Lookup]) -> Tensor:
    """‖Σ_a G_a‖² = Σ_ab ⟨G_a, G_b⟩ ``[example]``, of outer products of one group and lookups."""
    own = [f.gram_square_norm() if isinstance(f, Outer) else f.square_norm() for f in factors]
    between = [2 * inner(a, b) for a, b in combinations(factors, 2)]
    return torch.stack(own + between).sum(0)


def inner(a: Outer | Lookup, b: Outer | Lookup) -> Tensor:
    """⟨G_a, G_b⟩ = Σ_ts ⟨left_at, left_bs⟩⟨right_at, right_bs⟩ ``[example]``; of one group."""
    if isinstance(a, Lookup) and isinstance(b, Lookup):
        lefts = (a.index[:, :, None] == b.index[:, None]).float()
    elif isinstance(a, Lookup):
        return inner(b, a)
    elif isinstance(b, Lookup):
        places = b.index[:, None].expand(-1, a.num_positions, -1)
        lefts = a.left[:, :, 0].gather(2, places)
    else:
        lefts = _gram(a.alike()[0][:, :, 0], b.alike()[0][:, :, 0])
    return (lefts * _gram(_rights(a), _rights(b))).sum((1, 2))


def _rights(factor: Outer | Lookup) -> Tensor:
    """``[example, position, I]``, in the type that it is multiplied in."""
    return factor.value.float() if isinstance(factor, Lookup) else factor.alike()[1][:, :, 0]


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """⟨a_t, b_s⟩ ``[example, t, s]`` float32."""
    kind = torch.promote_types(a.dtype, b.dtype)
    return torch.bmm(a.to(kind), b.to(kind).mT).float()
