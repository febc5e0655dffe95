"""Models with data, as they are trained: a GPT, a CNN and an MLP. torch alone: peers import it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model with data for ``num_batches`` batches, and the loss it is trained with."""

    name: str
    model: nn.Module
    data: Any
    batch_size: int
    measurement: str
    loss: Callable[[nn.Module, Any], Tensor]


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """4 blocks of width 256, tied embedding."""

    def __init__(self, vocabulary: int = 1024, length: int = 128, width: int = 256) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(4)))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        return self.norm(self.blocks(x)) @ self.token.weight.T


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def next_token(model: nn.Module, batch: Any) -> Tensor:
    tokens = batch["input_ids"]
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def workloads() -> list[Workload]:
    torch.manual_seed(0)
    tokens = {"input_ids": torch.randint(0, 1024, (512, 128))}
    images = (torch.randn(4096, 3, 32, 32), torch.randint(0, 10, (4096,)))
    vectors = (torch.randn(65536, 784), torch.randint(0, 10, (65536,)))
    return [
        Workload("GPT 4×256", GPT(), tokens, 16, "causal_lm", next_token),
        Workload("CNN", cnn(), images, 64, "cross_entropy", classify),
        Workload("MLP", mlp(), vectors, 256, "cross_entropy", classify),
    ]


def batches_of(work: Workload) -> list[Any]:
    if isinstance(work.data, dict):
        parts = {name: values.split(work.batch_size) for name, values in work.data.items()}
        return [dict(zip(parts, b, strict=True)) for b in zip(*parts.values(), strict=True)]
    return list(zip(*(values.split(work.batch_size) for values in work.data), strict=True))
