"""Scores smoothed over the neighbourhood of a model, for those who have one trained model.

    score(q, i) = mean_c score(q, i; θ_c),    θ_c = θ + noise · median_j |θ_j| · ε_c,  ε_c ~ N(0, I)

Gradients of one model are rough: they tell of its last few steps as much as of its data. Averaged
over a little noise on the weights (NoiseGrad: Bykov et al. 2022; of inputs, SmoothGrad: Smilkov et
al. 2017) they tell of what its neighbours have in common, and so, as jobs/LEADERBOARD.md shows,
of models trained anew. Copies come in pairs, ε and −ε: what is odd in ε leaves the mean.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from tda.errors import TaskError
from tda.task import Checkpoint, as_checkpoints

NOISE = 0.2  # chosen on digits_mlp, penbased, fashion_mlp and diamonds of the suite


def smoothed(checkpoints: Any, count: int = 6, noise: float = NOISE) -> list[Checkpoint]:
    """``count`` copies of each checkpoint, with noise on the trained weights, for `tda.Task`.

    checkpoints: as `tda.Task` takes them: a state dict, a path, a `tda.Checkpoint`, or a list.
    count: even. The first of many copies are those of a few, so that a run can grow. noise: its
    standard deviation, in units of the median |weight| of the model: too much of it where the mean
    training loss rises by more than a half. A classifier that hardly feels it gains by more.

    Indexing takes ``count`` times as long, and the run as many bytes. Copies are of one training:
    they say nothing of what another seed would have found. Files are read and noise is drawn when
    a copy is needed. Raises TaskError.
    """
    if not isinstance(count, int) or count < 2 or count % 2:
        raise TaskError(
            "the number of copies is out of its range",
            found=repr(count),
            wanted="an even number, since noise comes in pairs: 6, say",
        )
    if not isinstance(noise, int | float) or not 0 < noise < math.inf:
        raise TaskError(
            "the noise is out of its range",
            found=repr(noise),
            wanted=f"a number above 0, in units of the median |weight|: {NOISE}, say",
        )
    given = as_checkpoints(checkpoints)
    return [
        replace(
            checkpoint,
            name=f"{checkpoint.name or f'checkpoint-{index}'}{sign}{pair}",
            noise=float(f"{sign}{noise}"),
            noise_seed=pair,
        )
        for pair in range(count // 2)
        for sign in "+-"
        for index, checkpoint in enumerate(given)  # a path of checkpoints stays one
    ]
