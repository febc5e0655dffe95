"""Many small networks trained at once: one batched product in place of one a model.

A step of a small network is mostly overhead. Stacked (``torch.func``), M networks share it: each
has its own weights, subset and order of examples, and all take their steps together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from tda.errors import TaskError
from tda.identity import digest, settings_of, source_of
from tda.replay.network import Loss, example_losses

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Ensemble:
    """A ``train`` for `ground_truth`: SGD as torch.optim's, for ``group`` networks at a time.

    model: makes a freshly initialised network, without buffers (batch norm: train one by one) and
    without dropout. Parameters that require no gradient stay as it makes them.
    inputs, targets: tensors ``[train, ...]``. learning_rate: of a step, or ``step -> number``.
    loss: ``(output, target) -> mean over the batch``.
    The network of (subset, seed) starts as torch seeded with ``seed`` makes it and sees its subset
    in a new order each epoch, ``batch_size`` at a time.
    keep_order: it sees the batches of the whole training set instead, in which what is not in its
    subset has weight 0 (a step still divides by ``batch_size``). So subsets of one seed differ by
    the examples left out and by nothing else: for small removals, and what a replay predicts.
    """

    model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    steps: int
    batch_size: int
    learning_rate: float | Callable[[int], float]
    momentum: float = 0.0
    weight_decay: float = 0.0
    loss: Loss = F.cross_entropy
    group: int = 32
    keep_order: bool = False

    @property
    def digest(self) -> str:
        """Changes with the numbers above and with the source of the functions."""
        rate = self.learning_rate
        numbers = (self.steps, self.batch_size, self.momentum, self.weight_decay, self.group)
        kept = ["order kept"] if self.keep_order else []
        rates = source_of(rate) + settings_of(rate) if callable(rate) else repr(rate)
        functions = [source_of(f) + settings_of(f) for f in (self.model, self.loss)]
        parts = [repr(numbers), rates, *functions, *kept]
        return digest("\0".join(parts).encode())

    def __call__(self, subset: np.ndarray, seed: int) -> nn.Module:
        return self.many([(subset, seed)])[0]

    def many(self, given: Sequence[tuple[np.ndarray, int]]) -> list[nn.Module]:
        """The trained networks of (subset, seed) pairs."""
        models = [self.fresh(seed) for _, seed in given]
        stacked, buffers = stack_module_state(models)
        if buffers:
            raise TaskError(
                "networks with buffers cannot be trained together",
                where="Ensemble.model",
                found=", ".join(buffers),
                do="train them one by one: a function (subset, seed) -> model",
            )
        weights = {name: value.detach() for name, value in stacked.items() if value.requires_grad}
        fixed = {name: value for name, value in stacked.items() if name not in weights}
        whole = np.arange(len(self.inputs))
        seen = [(whole if self.keep_order else subset, seed) for subset, seed in given]
        order = torch.stack([self.order(*each) for each in seen], dim=1)
        kept = torch.zeros(len(given), len(whole))
        for row, (subset, _) in zip(kept, given, strict=True):
            row[torch.from_numpy(subset)] = 1
        self._descend(models[0], weights, fixed, order, kept)
        for i, model in enumerate(models):  # not strict: of a tied weight's names there is one
            own = {name: values[i] for name, values in weights.items()}
            model.load_state_dict(own, strict=False)
        return models

    def fresh(self, seed: int) -> nn.Module:
        """The network training starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()

    def order(self, subset: np.ndarray, seed: int) -> Tensor:
        """Indices of the examples of every step ``[step, batch]``, epoch after epoch."""
        random, size = torch.Generator().manual_seed(seed), len(subset)
        epochs = -(-self.steps * self.batch_size // size)
        drawn = torch.cat([torch.randperm(size, generator=random) for _ in range(epochs)])
        taken = drawn[: self.steps * self.batch_size].view(self.steps, self.batch_size)
        return torch.from_numpy(subset)[taken]

    def _descend(
        self, model: nn.Module, weights: Weights, fixed: Weights, order: Tensor, kept: Tensor
    ) -> None:
        """v ← βv + ∇ℓ + wd·θ ;  θ ← θ − ηv, in place, for all networks together."""

        def loss(one: Weights, others: Weights, x: Tensor, y: Tensor, counted: Tensor) -> Tensor:
            outputs = functional_call(model, one | others, (x,))
            if not self.keep_order:
                return self.loss(outputs, y)
            return (counted * example_losses(self.loss, outputs, y)).mean()

        gradients = vmap(grad(loss), randomness="error")
        rate = self.learning_rate
        velocity = {name: torch.zeros_like(values) for name, values in weights.items()}
        for step, rows in enumerate(order):
            counted = kept.gather(1, rows)
            with _seeded():
                slopes = gradients(weights, fixed, self.inputs[rows], self.targets[rows], counted)
            for name, values in weights.items():
                slope = slopes[name].add_(values, alpha=self.weight_decay)
                velocity[name].mul_(self.momentum).add_(slope)
                values.sub_(velocity[name], alpha=rate(step) if callable(rate) else rate)


@contextmanager
def _seeded() -> Iterator[None]:
    """Raises TaskError where a step draws random numbers: torch's, which no seed of ours tells."""
    try:
        yield
    except RuntimeError as error:
        if "randomness error mode" not in str(error):
            raise
        raise TaskError(
            "networks that draw random numbers cannot be trained together",
            where="Ensemble.model",
            found="dropout or other randomness in a step, which does not follow from the seed",
            do="leave it out (dropout of 0, or in eval mode), or train them one by one: a function "
            "(subset, seed) -> model",
        ) from error
