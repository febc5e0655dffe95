"""Small models, each with one or more of the traps that real architectures set.

A model is its named parts and a forward function; sizes are a few hundred parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Net(nn.Module):
    """Named parts and a forward pass ``run(net, *inputs)``."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)


def free(*shape: int) -> nn.Parameter:
    """A parameter used directly, outside any layer."""
    return nn.Parameter(0.5 * torch.randn(shape))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, dilation=2, padding=2, padding_mode="circular", bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=4, padding_mode="replicate"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def cnn_same() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, (3, 5), padding="same"),
        nn.MaxPool2d(2),
        nn.GELU(),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(3, 2, 2, stride=2, output_padding=1),
        nn.Flatten(),
        nn.Linear(98, 4, bias=False),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(16, 4)
    )


def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 1),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm([4, 3, 3]),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.BatchNorm1d(6),
        nn.RMSNorm(6, eps=1e-5),
        nn.Linear(6, 4),
    )


def tiny_lm() -> nn.Module:
    """One causal attention block; the head is the token embedding."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.token(x) + net.position[: x.shape[1]]
        q, k, v = (
            part.unflatten(-1, (2, 4)).transpose(1, 2) for part in net.qkv(net.norm(h)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + net.out(mixed.transpose(1, 2).flatten(-2))
        return net.head(h + net.down(F.gelu(net.up(h))))

    net: Any = Net(
        run, token=nn.Embedding(11, 8), position=free(9, 8), norm=nn.LayerNorm(8),
        qkv=nn.Linear(8, 24), out=nn.Linear(8, 8), up=nn.Linear(8, 12), down=nn.Linear(12, 8),
        head=nn.Linear(8, 11, bias=False),
    )  # fmt: skip
    net.head.weight = net.token.weight
    return net


def attention() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        h = net.token(x)
        mixed, _ = net.attend(h, h, h, key_padding_mask=x == 0)
        return net.head(net.drop((h + mixed).mean(1)))

    attend = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
    drop = nn.Dropout(0.5)
    return Net(run, token=nn.Embedding(11, 8), attend=attend, drop=drop, head=nn.Linear(8, 3))


def encoder() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.layer(net.token(x), src_key_padding_mask=x == 0).sum(1))

    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)
    return Net(run, token=nn.Embedding(11, 8), layer=layer, head=nn.Linear(8, 3))


def sequence_first() -> nn.Module:
    """The layers see [position, batch, feature]."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.norm(torch.tanh(net.mix(x.transpose(0, 1)))).mean(0))

    return Net(run, mix=nn.Linear(5, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 4))


def flattened() -> nn.Module:
    """The first layer sees [batch · position, feature]."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = torch.tanh(net.mix(x.reshape(-1, x.shape[-1])))
        return net.head(h.reshape(len(x), -1))

    return Net(run, mix=nn.Linear(5, 4), head=nn.Linear(12, 4))


def reused() -> nn.Module:
    """One layer applied twice, its weight tied into a second and used transposed."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = torch.tanh(net.first(torch.tanh(net.first(x))))
        return net.head(torch.sigmoid(net.second(h)) + F.linear(h, net.first.weight.t()))

    net: Any = Net(run, first=nn.Linear(5, 5), second=nn.Linear(5, 5), head=nn.Linear(5, 4))
    net.second.weight = net.first.weight
    return net


def several_inputs() -> nn.Module:
    """One layer called on inputs of different shapes."""

    def run(net: Any, left: Tensor, right: Tensor) -> Tensor:
        return net.head(torch.tanh(net.shared(left)) * torch.tanh(net.shared(right)).sum(1))

    return Net(run, shared=nn.Linear(5, 6), head=nn.Linear(6, 4))


def in_place() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        h = net.first(x)
        h += x
        h.relu_()
        h = net.second(h * net.scale)
        h += net.shift
        h.mul_(2)
        return net.head(F.relu(h, inplace=True))

    return Net(
        run, first=nn.Linear(5, 5), scale=free(5), second=nn.Linear(5, 5), shift=free(5),
        head=nn.Linear(5, 4),
    )  # fmt: skip


def direct() -> nn.Module:
    """Parameters used outside any layer: products, a class token, a slice of positions."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = torch.cat([net.token.expand(len(x), -1, -1), x @ net.weight.t()], 1)
        h = net.scale * (h + net.position[:, : h.shape[1]])
        h = torch.tanh(h + h @ net.down @ net.up)
        return torch.addmm(net.bias, h[:, 0] + h.mean(1), net.head) / net.temperature.exp()

    return Net(
        run, token=free(1, 1, 6), weight=free(6, 5), position=free(1, 9, 6), scale=free(6),
        down=free(6, 2), up=free(2, 6), bias=free(4), head=free(6, 4), temperature=free(),
    )  # fmt: skip


def einsum() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        heads = torch.tanh(torch.einsum("btd,hdk->bhtk", x, net.split))
        return torch.einsum("bhtk,hkc->bc", heads, net.join) + net.bias

    return Net(run, split=free(2, 5, 3), join=free(2, 3, 4), bias=free(4))


def bilinear() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.mix(net.bend(net.first(x)), x)

    return Net(run, first=nn.Linear(5, 3), bend=nn.PReLU(3), mix=nn.Bilinear(3, 5, 4))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    net[4].weight.requires_grad_(False)
    return net


def uniform() -> nn.Module:
    """A head of zeros: every class has the same probability."""
    net: Any = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    return net


def recurrent() -> nn.Module:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(net.memory(x)[0][:, -1])

    return Net(run, memory=nn.LSTM(5, 4, batch_first=True), head=nn.Linear(4, 4))


def counting() -> nn.Module:
    """Token ids and their raw integer values, to one number."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(
            torch.tanh(net.token(x).sum(1)) + net.value(x.to(net.value.weight.dtype))
        ).squeeze(-1)

    token = nn.Embedding(7, 4, padding_idx=0)
    return Net(run, token=token, value=nn.Linear(4, 4), head=nn.Linear(4, 1))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8,
    )  # fmt: skip
    config.num_labels = 3
    return BertForSequenceClassification(config)


def perceptron(*, squash: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), squash(), nn.Dropout(0.5), nn.Linear(6, 3))


def saturated(inputs: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """A small network of two classes in the plane, fitted until it hardly errs: it brings most
    examples to few directions."""
    torch.manual_seed(0)
    relu, linear = nn.ReLU(), nn.Linear
    model = nn.Sequential(linear(2, 32), relu, linear(32, 32), relu, linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def digits_net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 10))


def normed_weight() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 4))
