"""The gradient of a convolution: what each position sees is formed a few examples at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tda
from tda.gradients import Gradients
from tda.gradients.factors import Convolved, Window
from tda.projection import tiles as tiling
from tda.projection.tiles import few_examples, square_norm, tiles

CASES = {
    "1d": (nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "strided": (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 8, 7)),
    "dilated": (nn.Conv2d(2, 4, (3, 2), dilation=2), (2, 8, 7)),
    "same": (nn.Conv2d(2, 4, (3, 5), padding="same"), (2, 6, 5)),
    "valid": (nn.Conv2d(2, 4, 3, padding="valid"), (2, 6, 5)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 6, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 6, 5)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 4, 5, 4)),
}
EXAMPLES = 11


def convolved(name: str) -> tuple[Convolved, Tensor]:
    """The factor of a layer's weight at random ∂f/∂output, and autograd's gradients."""
    layer, size = CASES[name]
    x = torch.randn(EXAMPLES, *size)
    out = layer(x)
    grad = torch.randn_like(out)
    wanted = []
    for one in range(EXAMPLES):
        (found,) = torch.autograd.grad(
            (out[one] * grad[one]).sum(), layer.weight, retain_graph=True
        )
        wanted.append(found.flatten(1))
    window = Window(
        tuple(layer.weight.shape[2:]), layer.stride, layer.padding, layer.dilation, layer.groups
    )
    left = grad.flatten(2).mT.unflatten(2, (layer.groups, -1))
    return Convolved(left, x, window), torch.stack(wanted)


@pytest.mark.parametrize("name", CASES)
def test_it_is_autograds_gradient(name: str) -> None:
    factor, wanted = convolved(name)
    assert factor.shape == tuple(wanted.shape[1:])
    torch.testing.assert_close(factor.rows(0, len(wanted[0])), wanted, rtol=1e-4, atol=1e-4)
    norm = wanted.square().sum((1, 2))
    torch.testing.assert_close(square_norm([factor]), norm, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_in_a_basis_it_is_convolved_by_the_basis(name: str) -> None:
    """L·G·Rᵀ, though the patches are never formed."""
    factor, wanted = convolved(name)
    left, right = torch.randn(3, wanted.shape[1]), torch.randn(2, wanted.shape[2])
    found = factor.compress(left, right)
    torch.testing.assert_close(found, left @ wanted @ right.T, rtol=1e-4, atol=1e-3)
    assert "right" not in vars(factor)


@pytest.mark.parametrize("name", ["1d", "groups"])
def test_patches_are_formed_of_a_few_examples_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor, wanted = convolved(name)
    monkeypatch.setattr(tiling, "_TILE_FLOATS", 1)
    monkeypatch.setattr(tiling, "_FEW", 4)
    sizes = []
    for span, some in few_examples([factor]):
        found = torch.cat([tile.values for tile in tiles(some)], 1)
        torch.testing.assert_close(found, wanted[span].flatten(1), rtol=1e-4, atol=1e-4)
        sizes.append(len(found))
    assert sizes == [4, 4, 3]
    assert "right" not in vars(factor)


def _pictures() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten())


class Viewed(nn.Module):
    """Takes a view that channels-last activations do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).view(len(x), -1))


@pytest.mark.parametrize("make", [_pictures, Viewed])
def test_the_layout_of_pictures_changes_no_gradient(make: Callable[[], nn.Module]) -> None:
    """Channels last where the model's code allows it; the user's model keeps its own."""
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(6, 2, 6, 6), torch.arange(6) % 3
    task = tda.Task(model, checkpoints=[model.state_dict()], measurement="cross_entropy")
    gradients = Gradients(task.model, task.measurement)
    found: dict[str, Tensor] = {}
    gradients((x, y), 6, lambda name, factors: found.update({name: factors[0].rows(0, 3)}))
    assert gradients.audited is not None and gradients.audited.path == "tap"
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous(), name
        for one in range(6):
            # The measurement of a classifier is its margin log p/(1 − p).
            p = model(x[one : one + 1]).softmax(1)[0, y[one]]
            (wanted,) = torch.autograd.grad((p / (1 - p)).log(), parameter)
            rows = wanted.reshape(len(wanted), -1)[:3]
            torch.testing.assert_close(found[name][one], rows, rtol=1e-3, atol=1e-4)
