"""Gaussian noise on the weights of a model, the same on every machine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tda.errors import TaskError


def with_noise(
    weights: Mapping[str, Tensor], model: nn.Module, noise: float, seed: int
) -> dict[str, Tensor]:
    """θ + noise · median_j |θ_j| · ε, ε ~ N(0, I), of the trained numbers θ; all else as it is.

    The median is that of the numbers that are not zero: of a pruned model most are. weights: a
    state dict with the names of ``model``. What is tied in the model stays so. ε is drawn by numpy,
    whose normal numbers do not depend on the processor. Raises TaskError where all are zero.
    """
    names: dict[int, list[str]] = {}  # of one parameter: those the state dict has
    trained = [p for p in model.parameters() if p.requires_grad]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights:
            names.setdefault(id(parameter), []).append(name)
    known = [names[id(p)] for p in trained if id(p) in names]
    if not known:
        return dict(weights)
    numbers = (weights[first].detach().cpu().flatten() for first, *_ in known)
    every = torch.cat([some.float().abs() for some in numbers])
    every = every[every > 0]
    if not len(every):
        raise TaskError(
            "noise is in units of the median weight, and every weight is zero",
            found=f"{len(known)} parameters of zeros",
            wanted="the weights of a trained model",
        )
    scale, random = noise * float(every.median()), np.random.default_rng(seed)
    found = dict(weights)
    for same in known:
        value = weights[same[0]].detach()
        drawn = torch.from_numpy(random.standard_normal(value.numel(), np.float32))
        moved = value + (scale * drawn).reshape(value.shape).to(value)
        found |= dict.fromkeys(same, moved)
    return found
