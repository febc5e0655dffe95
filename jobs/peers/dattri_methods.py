"""dattri: TRAK, TracIn and its influence functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bundle import Bundle, called, run
from dattri.algorithm.influence_function import (
    IFAttributorArnoldi,
    IFAttributorCG,
    IFAttributorDataInf,
    IFAttributorEKFAC,
)
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor

BATCH = 64


def task_of(given: Bundle, kind: str) -> Any:
    """Its task. Its TRAK and TracIn call the function on single examples, the others on batches."""
    model = given.model(0)

    def batch_loss(params: Any, data: Any) -> Tensor:
        return given.losses(called(model, params), *data).mean()

    def one_loss(params: Any, data: Any) -> Tensor:
        return batch_loss(params, (data[0][None], data[1][None]))

    def one_margin(params: Any, data: Any) -> Tensor:
        return given.margins(called(model, params), data[0][None], data[1][None])[0]

    function = {"batch": batch_loss, "one": one_loss, "margin": one_margin}[kind]
    weights = [given.weights(i) for i in range(len(given.checkpoints))]
    return AttributionTask(loss_func=function, model=model, checkpoints=weights)


def loaders(given: Bundle) -> tuple[Any, Any]:
    return given.loader(given.train, BATCH), given.loader(given.queries, BATCH)


def trak(given: Bundle, proj_dim: int) -> np.ndarray:
    if not (given.is_classification or given.is_language):
        raise SystemExit("its TRAK is documented for a loss that is −log p; this one has no p")
    task = task_of(given, "margin")
    model = task.get_model()

    def probability(params: Any, data: Any) -> Tensor:
        if given.is_language:
            return torch.exp(-given.losses(called(model, params), data[0][None], data[1][None]))[0]
        return called(model, params)(data[0][None]).softmax(1)[0, data[1]]

    attributor = TRAKAttributor(
        task=task,
        correct_probability_func=probability,
        projector_kwargs={"proj_dim": proj_dim, "device": "cpu"},
    )
    train, queries = loaders(given)
    with torch.no_grad():
        attributor.cache(train)
        return attributor.attribute(queries).T.numpy()


def tracin(given: Bundle) -> np.ndarray:
    task = task_of(given, "one")
    rates = torch.tensor([kept["learning_rate"] for kept in given.checkpoints])
    attributor = TracInAttributor(task=task, weight_list=rates, normalized_grad=False)
    train, queries = loaders(given)
    with torch.no_grad():
        return attributor.attribute(train, queries).T.numpy()


def influence(given: Bundle, kind: Any, **options: Any) -> np.ndarray:
    return _inner(given, kind(task=task_of(given, "batch"), **options))


def ekfac(given: Bundle, damping: float) -> np.ndarray:
    if len(given.checkpoints) > 1:
        raise SystemExit("its EK-FAC takes one checkpoint")
    task = task_of(given, "batch")
    return _inner(given, IFAttributorEKFAC(task=task, damping=damping))


def _inner(given: Bundle, attributor: Any) -> np.ndarray:
    train, queries = loaders(given)
    attributor.cache(train)
    return attributor.attribute(train, queries).detach().T.numpy()


if __name__ == "__main__":
    run(
        {
            "trak": lambda b: trak(b, 512),
            "trak k=2048": lambda b: trak(b, 2048),
            "tracin": tracin,
            "if_cg": lambda b: influence(b, IFAttributorCG, regularization=1e-2),
            "if_arnoldi": lambda b: influence(b, IFAttributorArnoldi, regularization=1e-2),
            "if_datainf": lambda b: influence(b, IFAttributorDataInf, regularization=1e-2),
            "ekfac": lambda b: ekfac(b, 0.0),
            "ekfac λ=1e-3": lambda b: ekfac(b, 1e-3),
        }
    )
