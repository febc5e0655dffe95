"""captum: TracInCP over checkpoints, each weighted by its learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bundle import Bundle, run
from captum.influence import TracInCP
from torch import Tensor, nn
from torch.utils.data import TensorDataset

BATCH, SMALL_BATCH = 256, 8


def tracin(given: Bundle) -> np.ndarray:
    network = given.model(0)
    # Its batched gradients are of linear and convolutional layers alone.
    known = (nn.Linear, nn.Conv2d)
    layers = [m for m in network.modules() if next(m.parameters(recurse=False), None) is not None]
    batched = all(isinstance(m, known) for m in layers) and given.task != "fashion_ddpm"

    def load(_: nn.Module, index: int) -> float:
        network.load_state_dict(given.weights(index))
        return float(given.checkpoints[index]["learning_rate"])

    def tracer(model: nn.Module, data: TensorDataset, loss: nn.Module, **options: Any) -> TracInCP:
        checkpoints = list(range(len(given.checkpoints)))
        return TracInCP(model, data, checkpoints, load, loss_fn=loss, **options)

    if not batched:
        # Each example's gradient passes the whole of its batch, and is taken again for every batch
        # that it meets: small ones of both.
        train, queries = (_with_targets(data) for data in (given.train, given.queries))
        small = tracer(_Losses(given, network), train, _Kept(), batch_size=SMALL_BATCH)
        return small.influence(given.loader(queries, SMALL_BATCH)).numpy()
    large = tracer(
        network, given.train, _Sum(given), batch_size=BATCH, sample_wise_grads_per_batch=True
    )
    inputs, targets = given.queries.tensors
    parts = zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    return torch.cat([large.influence((x, y)) for x, y in parts]).numpy()


def _with_targets(data: TensorDataset) -> TensorDataset:
    """With the targets among what the model is given, too."""
    inputs, targets = data.tensors
    return TensorDataset(inputs, targets, targets)


class _Losses(nn.Module):
    """ℓ of each example: what a denoiser is given is made of an image and its noise."""

    def __init__(self, given: Bundle, network: nn.Module) -> None:
        super().__init__()
        self.given, self.network = given, network

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.given.losses(self.network, inputs, targets)


class _Kept(nn.Module):
    reduction = "none"

    def forward(self, losses: Tensor, targets: Tensor) -> Tensor:
        return losses


class _Sum(nn.Module):
    reduction = "sum"

    def __init__(self, given: Bundle) -> None:
        super().__init__()
        self.given = given

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.given.output_losses(outputs, targets).sum()


if __name__ == "__main__":
    run({"tracin": tracin})
