"""captum: TracInCP over checkpoints, each weighted by its learning rate."""

from __future__ import annotations

import numpy as np
import torch
from bundle import Bundle, run
from captum.influence import TracInCP
from torch import Tensor, nn
from torch.utils.data import TensorDataset

BATCH, SMALL_BATCH = 256, 8


def tracin(given: Bundle) -> np.ndarray:
    model = given.model(0)
    # Its batched gradients are of linear and convolutional layers alone.
    known = (nn.Linear, nn.Conv2d)
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    batched = all(isinstance(m, known) for m in layers) and given.task != "fashion_ddpm"
    if not batched:
        return _one_by_one(given, model)

    def load(model: nn.Module, index: int) -> float:
        model.load_state_dict(given.weights(index))
        return float(given.checkpoints[index]["learning_rate"])

    tracer = TracInCP(
        model,
        given.train,
        checkpoints=list(range(len(given.checkpoints))),
        checkpoints_load_func=load,
        loss_fn=_Sum(given),
        batch_size=BATCH,
        sample_wise_grads_per_batch=True,
    )
    inputs, targets = given.queries.tensors
    parts = zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    return torch.cat([tracer.influence((x, y)) for x, y in parts]).numpy()


def _one_by_one(given: Bundle, network: nn.Module) -> np.ndarray:
    """In small batches: each example's gradient passes the whole of its own, and is taken again
    for every batch that it meets."""

    def load(model: nn.Module, index: int) -> float:
        network.load_state_dict(given.weights(index))
        return float(given.checkpoints[index]["learning_rate"])

    inputs, targets = given.train.tensors
    tracer = TracInCP(
        _Losses(given, network),
        TensorDataset(inputs, targets, targets),
        checkpoints=list(range(len(given.checkpoints))),
        checkpoints_load_func=load,
        loss_fn=_Kept(),
        batch_size=SMALL_BATCH,
    )
    inputs, targets = given.queries.tensors
    queries = TensorDataset(inputs, targets, targets)
    return tracer.influence(given.loader(queries, SMALL_BATCH)).numpy()


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
