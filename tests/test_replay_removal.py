"""Small removals with the same seed and batches: what is trained, and what replay foretells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tda
from tda.evaluate import Design, Ensemble, GroundTruth

NUM_TRAIN, NUM_QUERIES = 1500, 20


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


INPUTS, LABELS = digits()
QUERIES = (INPUTS[NUM_TRAIN:][:NUM_QUERIES], LABELS[NUM_TRAIN:][:NUM_QUERIES])


def network(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10))


def ensemble(**options: Any) -> Ensemble:
    given = {"model": network, "steps": 300, "batch_size": 50, "learning_rate": 0.02, **options}
    train = {"inputs": INPUTS[:NUM_TRAIN], "targets": LABELS[:NUM_TRAIN]}
    return Ensemble(**train, momentum=0.9, weight_decay=1e-3, **given)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_networks_that_keep_the_order_see_the_same_batches_with_weights_of_zero():
    """v ← βv + Σ_{i ∈ B∩S} ∇ℓ_i / |B| + wd·θ, B of the whole set; a replay trains the same."""
    kept, whole = ensemble(steps=10, keep_order=True), np.arange(NUM_TRAIN)
    order = kept.order(whole, 3)
    subset = np.setdiff1d(whole, order[3])  # a whole batch is left out
    counts = torch.isin(torch.arange(NUM_TRAIN), torch.from_numpy(subset)).float()
    torch.manual_seed(3)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    for rows in order:
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(model(INPUTS[rows]), LABELS[rows], reduction="none")
        (losses * counts[rows]).mean().backward()
        optimizer.step()
    together = kept.many([(whole, 3), (subset, 3)])
    assert_same(together[1], model)
    assert_same(tda.Training.of(kept, 3).run(counts), model)
    assert_same(together[0], ensemble(steps=10)(whole, 3))
    assert_same(together[0], tda.Training.of(ensemble(steps=10), 3).run())


def test_an_ensemble_that_keeps_the_order_is_another_one():
    assert ensemble(keep_order=True).digest != ensemble().digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "fraction", "floor"),
    [(nn.ReLU, 0.01, 0.9), (nn.ReLU, 0.05, 0.9), (nn.ReLU, 0.1, 0.9), (nn.Tanh, 0.05, 0.95)],
)
def test_replay_foretells_small_removals(activation, fraction, floor):
    """LDS over 30 networks of the same seed and batches; smooth networks have no kinks to cross."""
    train = ensemble(model=lambda: network(activation), keep_order=True)
    scores = tda.Training.of(train, 0).influence(QUERIES, progress=False)
    masks = Design(kind="removal", fraction=fraction, num_subsets=30).masks(NUM_TRAIN)
    models = train.many([(np.flatnonzero(mask), 0) for mask in masks])
    margin = tda.MEASUREMENTS["cross_entropy"].output
    with torch.no_grad():
        outputs = torch.stack([margin(model, QUERIES) for model in models])[:, None]
    found = tda.evaluate.lds(scores, GroundTruth(masks, outputs.numpy()))
    assert found.value >= floor
