"""kronfluence: EK-FAC influence, at its default damping and at its heuristic, 0.1 × mean."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from bundle import Bundle, margin, run
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn

BATCH = 256


class SuiteTask(Task):
    """Labels are sampled from the model's own prediction where its Fisher asks for them."""

    def __init__(self, given: Bundle) -> None:
        self.given = given

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, targets = batch
        if not sample or self.given.task == "fashion_ddpm":
            return self.given.losses(model, inputs, targets).sum()
        outputs = model(inputs)
        with torch.no_grad():
            targets = self._drawn(outputs, targets)
        return self.given.output_losses(outputs, targets).sum()

    def _drawn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.given.task == "diamonds":
            return outputs[:, 0] + torch.randn(len(outputs))
        drawn = torch.multinomial(outputs.flatten(0, -2).softmax(-1), 1)[:, 0]
        if outputs.ndim == 2:
            return drawn
        return torch.cat([targets[:, :1], drawn.view(targets.shape)[:, :-1]], dim=1)

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        inputs, targets = batch
        if self.given.is_classification:
            return -margin(model(inputs), targets).sum()
        return self.given.losses(model, inputs, targets).sum()


def ekfac(given: Bundle, damping: float | None) -> np.ndarray:
    parts = [_of_checkpoint(given, i, damping) for i in range(len(given.checkpoints))]
    return np.mean(parts, axis=0)


def _of_checkpoint(given: Bundle, index: int, damping: float | None) -> np.ndarray:
    torch.manual_seed(0)
    task = SuiteTask(given)
    model = prepare_model(given.model(index), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("suite", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors(
            factors_name="factors",
            dataset=given.train,
            per_device_batch_size=BATCH,
            factor_args=FactorArguments(strategy="ekfac"),
        )
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="factors",
            query_dataset=given.queries,
            train_dataset=given.train,
            per_device_query_batch_size=len(given.queries),
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].float().numpy()


if __name__ == "__main__":
    run({"ekfac": lambda b: ekfac(b, 1e-8), "ekfac λ=0.1·mean": lambda b: ekfac(b, None)})
