"""The gradient of one parameter at each example of a batch, kept in the form it comes in.

A parameter of shape ``[O, …]`` is the matrix ``[O, I]``. Its gradient G at one example is

    Outer    G = Σ_t left_t ⊗ right_t       weights of linear layers and convolutions
    Lookup   G = Σ_t onehot(index_t) ⊗ value_t        embeddings
    Dense    G                              everything else
    Elementwise  u(Σ of these), coordinate by coordinate      a metric's scaling

and is never stored whole: ``rows`` gives a slice of it, ``compress`` gives L·G·Rᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """left ``[example, position, group, O/groups]``, right ``[example, position, group, I]``."""

    left: Tensor
    right: Tensor

    def to(self, device: torch.device) -> Outer:
        return Outer(self.left.to(device), self.right.to(device))

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
    def is_rank_one(self) -> bool:
        """Whether G is one outer product: one position, one group."""
        return self.left.shape[1] == self.left.shape[2] == 1

    def rows(self, start: int, stop: int) -> Tensor:
        """G[start:stop] at each example, ``[example, stop-start, I]`` float32."""
        left, right = self._alike()
        if left.shape[2] == 1:
            return torch.bmm(left[:, :, 0, start:stop].mT, right[:, :, 0]).float()
        whole = torch.einsum("btgo,btgi->bgoi", left, right)
        return whole.flatten(1, 2)[:, start:stop].float()

    def _alike(self) -> tuple[Tensor, Tensor]:
        """Both sides in the type they are multiplied in: float32, or bfloat16 as in autocast,
        where a plain backward pass would round both too."""
        short = torch.bfloat16 in (self.left.dtype, self.right.dtype)
        kind = torch.bfloat16 if short else torch.float32
        return self.left.to(kind), self.right.to(kind)

    def compress(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        """``[example, m, r]`` from bases ``[m, O]`` and ``[r, I]``."""
        left, right = self._alike()
        num_groups, size = left.shape[2:]
        basis = left_basis.to(left.dtype).reshape(-1, num_groups, size)
        turned = torch.einsum("mgo,btgo->btgm", basis, left).flatten(1, 2)
        return torch.bmm(turned.mT, right.flatten(1, 2) @ right_basis.to(right.dtype).T).float()

    def square_norm(self) -> Tensor | None:
        """‖G‖² ``[example]`` = Σ_ts ⟨left_t, left_s⟩⟨right_t, right_s⟩, where that is cheaper."""
        _, num_positions, num_groups, size = self.left.shape
        width = self.right.shape[3]
        if num_groups > 1 or num_positions**2 * (size + width) > size * width:
            return None
        return self.gram_square_norm()

    def gram_square_norm(self) -> Tensor:
        """The same of one group, whatever it costs."""
        left, right = (side[:, :, 0] for side in self._alike())
        if left.shape[1] == 1:
            return (_norm(left) * _norm(right)).square()
        grams = torch.bmm(left, left.mT).float(), torch.bmm(right, right.mT).float()
        return (grams[0] * grams[1]).sum((1, 2))


def _norm(vector: Tensor) -> Tensor:
    """``[example]`` from ``[example, 1, size]``."""
    return torch.linalg.vector_norm(vector, dim=(1, 2), dtype=torch.float32)


@dataclass(frozen=True)
class Lookup:
    """index ``[example, position]``, value ``[example, position, I]``, of an ``[O, I]`` table."""

    index: Tensor
    value: Tensor
    num_rows: int

    def to(self, device: torch.device) -> Lookup:
        return Lookup(self.index.to(device), self.value.to(device), self.num_rows)

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def num_examples(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.value.shape[2]

    def rows(self, start: int, stop: int) -> Tensor:
        ids = torch.arange(start, stop, device=self.index.device)
        return self.rows_at(ids)

    def rows_at(self, ids: Tensor) -> Tensor:
        """G[ids] at each example, ``[example, len(ids), I]`` float32; ids sorted."""
        place = torch.searchsorted(ids, self.index).clamp(max=len(ids) - 1)
        hit = ids[place] == self.index
        batch, num_positions, width = self.value.shape
        out = self.value.new_zeros((batch, len(ids), width), dtype=torch.float32)
        value = torch.where(hit[:, :, None], self.value.float(), 0.0)
        return out.scatter_add_(1, place[:, :, None].expand(batch, num_positions, width), value)

    def compress(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        left = left_basis.T[self.index]
        return torch.bmm(left.mT, self.value.float() @ right_basis.T)

    def square_norm(self) -> Tensor | None:
        value = self.value.float()
        same = self.index[:, :, None] == self.index[:, None, :]
        return (torch.bmm(value, value.mT) * same).sum((1, 2))


@dataclass(frozen=True)
class Dense:
    """grad ``[example, O, I]``."""

    grad: Tensor

    def to(self, device: torch.device) -> Dense:
        return Dense(self.grad.to(device))

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
        return torch.einsum("boi,mo,ri->bmr", self.grad.float(), left_basis, right_basis)

    def square_norm(self) -> Tensor | None:
        return self.grad.float().square().sum((1, 2))


@dataclass(frozen=True)
class Elementwise:
    """function(G, start, stop) of rows start … stop-1 of the sum G of ``factors``, same shape."""

    factors: list[Factor]
    function: Callable[[Tensor, int, int], Tensor]

    def to(self, device: torch.device) -> Elementwise:
        return Elementwise([factor.to(device) for factor in self.factors], self.function)

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
        whole = self.factors[0].rows(start, stop)
        for factor in self.factors[1:]:
            whole = whole + factor.rows(start, stop)
        return self.function(whole, start, stop)

    def compress(self, left_basis: Tensor, right_basis: Tensor) -> Tensor:
        return left_basis @ self.rows(0, self.shape[0]) @ right_basis.T

    def square_norm(self) -> Tensor | None:
        return None


Factor = Outer | Lookup | Dense | Elementwise


def materialise(factors: list[Factor]) -> Tensor:
    """Σ of factors of one parameter, ``[example, O, I]`` float32."""
    num_rows = factors[0].shape[0]
    total = factors[0].rows(0, num_rows)
    for factor in factors[1:]:
        total = total + factor.rows(0, num_rows)
    return total
