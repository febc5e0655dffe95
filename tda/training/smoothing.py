"""Scores smoothed over the neighbourhood of a model, for those who have one trained model.

    score(q, i) = mean_c score(q, i; θ_c),    θ_c = θ + noise · median_j |θ_j| · ε_c,  ε_c ~ N(0, I)

Gradients of one model are rough: they tell of its last few steps as much as of its data. Averaged
over a little noise on the weights (NoiseGrad: Bykov et al. 2022; of inputs, SmoothGrad: Smilkov et
al. 2017) they tell of what its neighbours have in common, and so, as jobs/LEADERBOARD.md shows,
of models trained anew. Copies come in pairs, ε and −ε: what is odd in ε leaves the mean.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tda.data import Dataset, Picked, as_dataset, batches
from tda.errors import TaskError
from tda.featurizer import Features, Featurizer
from tda.projection import Projection
from tda.task import Checkpoint, Task, as_checkpoints, require_task

# Chosen on tasks of the suite: both on digits_mlp, penbased, fashion_mlp and diamonds; the ends of
# the levels on fashion_ddpm, whose gradients bear .05 and whose scores gain at .2 (LDS by halves
# .34 without noise, .38 and .50), and fashion_cnn, whose gradients bear 1 and whose scores lose.
NOISE = 0.2
COSINE = 0.93
_LEVELS = (NOISE, 0.25, 0.32, 0.4, 0.5)
_TURNED = 0.5  # the cosine of gradients that no longer say what they said
_NUM_EXAMPLES = 64
_DIM = 4_096  # of a gradient's sketch: a cosine of many is as good as exact


def smoothed(checkpoints: Any, count: int = 6, noise: float = NOISE) -> list[Checkpoint]:
    """``count`` copies of each checkpoint, with noise on the trained weights, for `tda.Task`.

    checkpoints: as `tda.Task` takes them: a state dict, a path, a `tda.Checkpoint`, or a list.
    count: even. The first of many copies are those of a few, so that a run can grow. noise: its
    standard deviation, in units of the median |weight| of the model; `find_noise` finds how much a
    model bears, which for a classifier is often more.

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


def find_noise(task: Task, dataset: Any, cosine: float = COSINE) -> float:
    """The noise for `smoothed` that leaves gradients where they point, one by one and together.

        the largest s with  mean_i cos(g_i, g_i(s)) ≥ cosine  and  cos(G, G(s)) ≥ cosine

    g_i(s) = ∇ℓ_i(θ ± s·median_j|θ_j|·ε), G the matrix of them as one vector, so that it knows of
    their lengths; at the last checkpoint of the task and in its metric, the mean of both signs.
    dataset: examples that the model was not trained on, the queries say; at most 64 are drawn. s is
    0.2, 0.25, 0.32, 0.4 or 0.5: the same number on another machine, at least what `smoothed` takes,
    and no more than scores gain by. Takes as long as to index some hundred examples. Raises
    TaskError where 0.2 turns the gradients by 60° and more.
    """
    require_task(task, "tda.find_noise(task, dataset)")
    if not isinstance(cosine, int | float) or not 0 < cosine < 1:
        raise TaskError("this is no cosine", found=repr(cosine), wanted=f"0 < cosine < 1: {COSINE}")
    at = _gradients(task, as_dataset(dataset))
    clean = at(0)
    felt = clean.norm(dim=1) > 0
    if not felt.any():
        raise TaskError(
            "no example has a gradient",
            found=f"zeros, of {len(clean)} examples",
            do="check the measurement: its loss does not depend on the trained weights",
        )
    kept = NOISE
    for place, level in enumerate(_LEVELS):
        moved = torch.stack([at(1 + 2 * place + side)[felt] for side in (0, 1)])
        alike = _alike(moved, clean[felt])
        if level == NOISE and not alike > _TURNED:  # or NaN
            raise TaskError(
                "the least noise turns the gradients round",
                found=f"a mean cosine of {alike:.2g} at a noise of {NOISE:g}",
                wanted=f"above {_TURNED:g}",
                do="score the model as it is, or train it with other seeds",
            )
        if not alike >= cosine:
            break
        kept = level
    return kept


def _alike(moved: Tensor, clean: Tensor) -> float:
    """The lower of the two cosines, of moved ``[sign, example, dim]``."""
    one_by_one = F.cosine_similarity(moved, clean, dim=-1).mean()
    together = F.cosine_similarity(moved.flatten(1), clean.flatten()[None]).mean()
    return float(torch.minimum(one_by_one, together))  # NaN where either is


def _gradients(task: Task, dataset: Dataset) -> Any:
    """Sketches of ∇ℓ ``[example, dim]``: 0 without noise, then +s and −s of every level."""
    last = replace(task.checkpoints[-1], noise=0.0)
    copies = copy.copy(task)
    signed = (sign * s for s in _LEVELS for sign in (1, -1))
    copies.checkpoints = (last, *(replace(last, noise=s) for s in signed))
    featurizer = Featurizer(copies)
    featurizer.bind(Projection("count_sketch", _DIM))
    count = min(_NUM_EXAMPLES, len(dataset))
    drawn = Picked(dataset, np.random.default_rng(0).choice(len(dataset), count, replace=False))
    size = featurizer.batch_size("auto", dataset)
    seen = batches(drawn, 0, count, size, task.collate)
    parts = [(batch, min(size, count - first)) for first, batch in seen]

    def at(checkpoint: int) -> Tensor:
        featurizer.at(checkpoint)
        found = Features.concatenate([featurizer(*part) for part in parts])
        return found.columns["slope"][:, None] * found.rows

    return at
