"""traker: TRAK with its own defaults, on its CPU projector (its CUDA one has to be compiled)."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from bundle import Bundle, called, run
from torch import Tensor
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput
from trak.projectors import BasicProjector, ProjectionType

BATCH = 64


def trak(given: Bundle, proj_dim: int) -> np.ndarray:
    if not (given.is_classification or given.is_language):
        raise SystemExit("its outputs are those of a loss that is −log p; this one has no p")
    with tempfile.TemporaryDirectory() as folder:
        return _scores(given, folder, proj_dim)


def _scores(given: Bundle, folder: str, proj_dim: int) -> np.ndarray:
    model = given.model(0)
    projector = BasicProjector(
        grad_dim=sum(p.numel() for p in model.parameters()),
        proj_dim=proj_dim,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"),
    )
    number = len(given.train)
    traker: Any = TRAKer(
        model=model,
        task=_Text(given) if given.is_language else ImageClassificationModelOutput(),
        train_set_size=number,
        save_dir=folder,
        device="cpu",
        projector=projector,
        proj_dim=proj_dim,
        use_half_precision=False,
    )
    kept = range(len(given.checkpoints))
    for index in kept:
        traker.load_checkpoint(given.weights(index), model_id=index)
        for batch in given.loader(given.train, BATCH):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for index in kept:
        traker.start_scoring_checkpoint("queries", given.weights(index), index, len(given.queries))
        for batch in given.loader(given.queries, BATCH):
            traker.score(batch=batch, num_samples=len(batch[0]))
    return np.array(traker.finalize_scores("queries")).T


class _Text(AbstractModelOutput):
    """log(p/(1−p)) and 1 − p of a text, p = e^−ℓ, as its outputs of classifiers have them."""

    def __init__(self, given: Bundle) -> None:
        self.given = given

    def get_output(self, model: Any, weights: Any, buffers: Any, *one: Tensor) -> Tensor:
        batch = (part.unsqueeze(0) for part in one)
        return self.given.margins(called(model, (weights, buffers)), *batch).sum()

    def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
        ps = torch.exp(-self.given.losses(called(model, (weights, buffers)), *batch))
        return (1 - ps).clone().detach().unsqueeze(-1)


if __name__ == "__main__":
    run({"trak": lambda b: trak(b, 2048), "trak k=512": lambda b: trak(b, 512)})
