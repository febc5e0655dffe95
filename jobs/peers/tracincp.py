"""captum: TracInCP over checkpoints, each weighted by its learning rate."""

from __future__ import annotations

import numpy as np
import torch
from bundle import Bundle, run
from captum.influence import TracInCP
from torch import Tensor, nn

BATCH = 256


def tracin(given: Bundle) -> np.ndarray:
    model = given.model(0)
    sum_of_losses = _Sum(given)
    # Its batched gradients are of linear and convolutional layers alone; else one example a pass.
    known = (nn.Linear, nn.Conv2d)
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    batched = all(isinstance(m, known) for m in layers) and given.task != "fashion_ddpm"

    def load(model: nn.Module, index: int) -> float:
        model.load_state_dict(given.weights(index))
        return float(given.checkpoints[index]["learning_rate"])

    tracer = TracInCP(
        model,
        given.train,
        checkpoints=list(range(len(given.checkpoints))),
        checkpoints_load_func=load,
        loss_fn=sum_of_losses if batched else given.output_losses,
        batch_size=BATCH,
        sample_wise_grads_per_batch=batched,
    )
    inputs, targets = given.queries.tensors
    parts = zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    return torch.cat([tracer.influence((x, y)) for x, y in parts]).numpy()


class _Sum(nn.Module):
    reduction = "sum"

    def __init__(self, given: Bundle) -> None:
        super().__init__()
        self.given = given

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.given.output_losses(outputs, targets).sum()


if __name__ == "__main__":
    run({"tracin": tracin})
