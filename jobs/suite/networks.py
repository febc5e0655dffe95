"""The networks of the suite and the loss of each example: torch alone, so that peers import it too.

``network(task)`` is a task's; ``losses(task, model, inputs, targets)`` is ``[example]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD = 0  # the id of padding in a text
VOCABULARY = 30_522  # of BERT
CHARACTERS = 66  # of the Shakespeare task: the 65 most frequent, and one for all others
LENGTH = 64  # characters of an example
SIDE = 14  # pixels of the images the diffusion model makes
NOISE_STEPS = 100
NOISE_SEEN = (5, 20, 40, 60, 80)  # the noise levels at which an example is measured


def mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class Attention(nn.Module):
    """Multi-head attention; ``mask`` adds −∞ where a position must not be seen."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def heads(each: Tensor) -> Tensor:
            return each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block: norms before (GPT) or after (BERT) what is added."""

    def __init__(self, width: int, num_heads: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(width, num_heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-12 if not norm_first else 1e-5)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12 if not norm_first else 1e-5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.down(F.gelu(self.up(self.norm2(x))))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


def places(ids: Tensor) -> Tensor:
    """0, 1, 2, … for each example: an example's gradient of a position must stay its own."""
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)


class Bert(nn.Module):
    """BERT-tiny (2 × 128) with a classifier on the first token; padding is id 0."""

    def __init__(self, width: int = 128, num_layers: int = 2, num_classes: int = 2) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(Block(width, 2, norm_first=False) for _ in range(num_layers))
        self.pool = nn.Linear(width, width)
        self.classify = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        unseen = (ids == PAD)[:, None, None, :]
        mask = torch.zeros(unseen.shape, device=ids.device).masked_fill(unseen, float("-inf"))
        x = self.norm(self.word(ids) + self.place(places(ids)))
        for block in self.blocks:
            x = block(x, mask)
        return self.classify(torch.tanh(self.pool(x[:, 0])))


class Gpt(nn.Module):
    """A causal transformer over characters."""

    def __init__(self, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(CHARACTERS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, 4, norm_first=True) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, ids: Tensor) -> Tensor:
        size = ids.shape[1]
        mask = torch.full((size, size), float("-inf"), device=ids.device).triu(1)
        x = self.token(ids) + self.place(places(ids))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Denoiser(nn.Module):
    """ε_θ(x_t, t) of flat images ``[..., pixel]`` at levels of noise ``[...]``."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(SIDE**2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, SIDE**2),
        )  # fmt: skip

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(8, device=noisy.device) * (-math.log(1000) / 8))
        angles = level[..., None].float() * rates
        wave = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.layers(torch.cat([noisy, wave], dim=-1))


def with_noise(images: Tensor) -> Tensor:
    """Images ``[example, pixel]``, each with its own noise, drawn once for every level it is seen
    at: ``[example, 1 + level, pixel]``. So a loss is a number, the same whenever it is asked for.
    """
    shape = (len(images), len(NOISE_SEEN), images.shape[1])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([images[:, None], noise], dim=1)


def kept_signal() -> Tensor:
    """ᾱ_t of the linear schedule of Ho et al. 2020, cut to ``NOISE_STEPS`` steps."""
    return torch.cumprod(1 - torch.linspace(1e-3, 0.2, NOISE_STEPS), 0)


def denoised(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(ε, ε_θ(x_t, t)) ``[example, level, pixel]``, x_t = √ᾱ_t·x + √(1−ᾱ_t)·ε."""
    images, noise = inputs[:, :1], inputs[:, 1:]
    level = torch.tensor(NOISE_SEEN, device=inputs.device)
    kept = kept_signal().to(inputs.device)[level][:, None]
    noisy = kept.sqrt() * images + (1 - kept).sqrt() * noise
    return noise, model(noisy, level.expand(len(inputs), -1))


def denoising_losses(model: nn.Module, inputs: Tensor) -> Tensor:
    """mean_t mean_pixel (ε − ε_θ(x_t, t))²  ``[example]``."""
    noise, found = denoised(model, inputs)
    return (noise - found).square().mean((1, 2))


def squared_outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """mean_t mean_pixel ε_θ(x_t, t)²  ``[example]``: what D-TRAK differentiates."""
    return denoised(model, inputs)[1].square().mean((1, 2))


def losses(task: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """ℓ of each example ``[example]``, as the network was trained with."""
    if task == "fashion_ddpm":
        return denoising_losses(model, inputs)
    outputs = model(inputs)
    if task == "diamonds":
        return (outputs[:, 0] - targets).square() / 2
    if task == "shakespeare":
        each = F.cross_entropy(outputs[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none")
        return each.mean(1)
    return F.cross_entropy(outputs, targets, reduction="none")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits_mlp": lambda: mlp(64, 64, 32, 10),
    "fashion_mlp": lambda: mlp(784, 128, 64, 10),
    "fashion_cnn": cnn,
    "penbased": lambda: mlp(16, 128, 64, 10),
    "diamonds": lambda: mlp(9, 64, 32, 1),
    "rotten_tomatoes": Bert,
    "shakespeare": Gpt,
    "fashion_ddpm": Denoiser,
}


def network(task: str) -> nn.Module:
    """A task's network, as torch's seed makes it."""
    return NETWORKS[task]()
