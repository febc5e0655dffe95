"""A recorded training run as a value: run it, or follow it back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tda.data import Batch, as_dataset, batches, to
from tda.errors import ConfigError, DataError, TaskError
from tda.gradients.exact import differentiable
from tda.measurements import Measurement, as_measurement
from tda.progress import progress_bar
from tda.recipe import Gradient
from tda.replay.network import Loss, Network
from tda.replay.rules import Adam, Rule, Sgd, State
from tda.task import Checkpoint

if TYPE_CHECKING:
    from tda.evaluate.ensemble import Ensemble

Optimizer = Literal["sgd", "adam", "adamw"]

_BATCH = 32  # queries whose gradients are taken at once
_BUDGET = 2**30  # bytes, for what is kept of the queries followed together
_SAME = 1e-3  # of the way from the first weights to the last: rounding, not another run


@dataclass(frozen=True, eq=False, kw_only=True)
class Training:
    """A deterministic run: step t moves θ along Σ_{i ∈ B_t} w_i ∇ℓ_i(θ) / |B_t|, with all w_i = 1.

    model: with the weights training starts from; it is copied, and trained in the mode (train or
    eval) it is in. inputs, targets: tensors ``[train, ...]``.
    batches: the examples of every step, as indices ``[step, batch]`` or a list of them, which may
    differ in length. loss: ``(output, target) -> mean over the batch``.
    learning_rate: of a step, or ``step -> number``, steps counted from 0.
    momentum: of sgd; betas, eps: of adam and adamw; all mean what they do in ``torch.optim``.
    final: the weights the run is known to have ended with; where the replay ends elsewhere, it is
    refused.

    Raises ConfigError, DataError; what replays it raises TaskError where the run is random, does
    not repeat, diverges, or its losses are not those of single examples.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    batches: Sequence[Any] | np.ndarray | Tensor
    loss: Loss = F.cross_entropy
    optimizer: Optimizer = "sgd"
    learning_rate: float | Callable[[int], float] = 1e-3
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    final: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(Optimizer):
            raise ConfigError(
                f"unknown optimizer {self.optimizer!r}",
                where="Training.optimizer",
                wanted=", ".join(get_args(Optimizer)),
            )
        if self.optimizer != "sgd" and self.momentum:
            raise ConfigError(
                f"{self.optimizer} has no momentum", where="Training.momentum", do="set betas"
            )
        n = len(self.inputs)
        if len(self.targets) != n:
            raise DataError(
                "inputs and targets differ in length", found=f"{n} and {len(self.targets)}"
            )
        if not self._rows:
            raise DataError("a training without a step", where="Training.batches", found="none")
        for step, batch in enumerate(self._rows):
            if batch.ndim != 1 or not len(batch) or batch.min() < 0 or batch.max() >= n:
                raise DataError(
                    "a batch is not a list of training examples",
                    where=f"Training.batches, step {step}",
                    wanted=f"at least one index from 0 to {n - 1}",
                )

    @staticmethod
    def of(ensemble: Ensemble, seed: int) -> Training:
        """What an `Ensemble` trains on the whole training set from this seed."""
        whole = np.arange(len(ensemble.inputs))
        return Training(
            model=ensemble.fresh(seed),
            inputs=ensemble.inputs,
            targets=ensemble.targets,
            batches=ensemble.order(whole, seed),
            loss=ensemble.loss,
            learning_rate=ensemble.learning_rate,
            momentum=ensemble.momentum,
            weight_decay=ensemble.weight_decay,
        )

    @property
    def num_steps(self) -> int:
        return len(self.batches)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rate = self.learning_rate
        return float(rate(step) if callable(rate) else rate)

    def run(self, weights: Any = None) -> nn.Module:
        """The trained model; with ``weights [train]``, where example i counts w_i: 0 leaves it out.

        Each step still divides by the size of its batch.
        """
        counts, state = self._weights(weights), self._start()
        for step in range(self.num_steps):
            state = self._step(state, step, counts)
        if weights is None:
            self._check_final(state)
        return self._network.module(state.weights)

    def checkpoints(self, steps: Sequence[int]) -> list[Checkpoint]:
        """The run after so many steps each, ascending, with its optimizer and learning rates."""
        wanted, found = sorted(set(steps)), []
        state, one = self._start(), self._weights(None)
        if not wanted or wanted[0] < 1 or wanted[-1] > self.num_steps:
            raise ConfigError(
                "no checkpoint of this run",
                found=list(steps),
                wanted=f"numbers of steps from 1 to {self.num_steps}",
            )
        for step in range(wanted[-1]):
            state = self._step(state, step, one)
            if step + 1 in wanted:
                found.append(self._checkpoint(state, step + 1))
        return found

    def _checkpoint(self, state: State, steps: int) -> Checkpoint:
        model = self._network.module(state.weights)
        return Checkpoint(
            model.state_dict(),
            step=steps,
            learning_rate=self.rate(steps - 1),
            optimizer=self._optimizer_state(model, state.moments, steps),
            learning_rate_sum=sum(map(self.rate, range(steps))),
        )

    def _optimizer_state(
        self, model: nn.Module, moments: Sequence[Tensor], steps: int
    ) -> dict[str, Any]:
        """The state dict torch's optimizer would have."""
        trained = [p for p in model.parameters() if p.requires_grad]
        lr, decay = self.rate(steps - 1), self.weight_decay
        if self.optimizer == "sgd":
            names, moments = ["momentum_buffer"], moments if self.momentum else ()
            optimizer: Any = torch.optim.SGD(trained, lr, self.momentum, weight_decay=decay)
        else:
            kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
            names = ["exp_avg", "exp_avg_sq"]
            optimizer = kind(trained, lr, self.betas, self.eps, decay)
            for parameter in trained:
                optimizer.state[parameter]["step"] = torch.tensor(float(steps))
        for name, moment in zip(names, moments, strict=False):
            for parameter, part in zip(trained, self._network.named(moment).values(), strict=True):
                optimizer.state[parameter][name] = part.clone()
        return optimizer.state_dict()

    def influence(
        self,
        queries: Any,
        measurement: Any = "cross_entropy",
        *,
        gradient: Gradient = "margin",
        aggregate: bool = False,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> np.ndarray:
        """score[q, i] = ∂M(z_q; θ_T(w)) / ∂w_i at w = 1:  ``[query, train]``.

        M is the measurement of the last model, higher being better: its margin f where it has one,
        else −ℓ; −ℓ always with ``gradient="loss"``. So a positive score means that training on i
        helps q, and leaving out a few examples is predicted to change M by −Σ score.

        queries: a data set or arrays. aggregate: their sum as one query, ``[1, train]``: one pass
        back for any number of queries. batch_size: queries followed back together, by default as
        many as fit into 1 GiB; the scores do not depend on it.

        Reverse mode (Maclaurin et al. 2015, Gradient-based Hyperparameter Optimization through
        Reversible Learning, algorithm 2; the weights of examples as hyper-parameters), with states
        kept every √T steps and computed again in between.
        """
        measured, data, tape = as_measurement(measurement), as_dataset(queries), self._record()
        model = self._network.module(tape[-1].weights).eval()
        size = len(data) if aggregate else batch_size or self._fitting()
        spans = [(start, min(start + size, len(data))) for start in range(0, len(data), size)]
        found, passes = [], len(spans) * sum(map(len, self._rows))
        with progress_bar("replaying", passes, progress) as tick:
            for start, stop in spans:
                rises = _rises(model, batches(data, start, stop, _BATCH), measured, gradient)
                rows = reduce(torch.add, rises)[None] if aggregate else torch.stack(list(rises))
                found.append(self._back(tape, rows, tick))
        return torch.cat(found).cpu().numpy()

    # ---- the run

    @cached_property
    def _rows(self) -> list[Tensor]:
        return [torch.as_tensor(b, dtype=torch.long, device="cpu") for b in self.batches]

    @cached_property
    def _network(self) -> Network:
        network = Network(self.model, self.loss)
        network.check_loss(*self._batch(0, network))
        return network

    @cached_property
    def _rule(self) -> Rule:
        if self.optimizer == "sgd":
            return Sgd(self.momentum, self.weight_decay)
        return Adam(self.betas, self.eps, self.weight_decay, self.optimizer == "adamw")

    def _batch(self, step: int, network: Network) -> tuple[Tensor, Tensor]:
        device, rows = network.initial.device, self._rows[step]
        return self.inputs[rows].to(device), self.targets[rows].to(device)

    def _start(self) -> State:
        initial = self._network.initial
        return State(
            initial, tuple(torch.zeros_like(initial) for _ in range(self._rule.num_moments))
        )

    def _weights(self, given: Any) -> Tensor:
        one = self._network.initial.new_ones(len(self.inputs))
        weights = one if given is None else torch.as_tensor(given).to(one)
        if weights.shape != one.shape:
            raise DataError(
                "weights are not one number a training example",
                found=list(weights.shape),
                wanted=list(one.shape),
            )
        return weights

    def _step(self, state: State, step: int, weights: Tensor) -> State:
        rows = self._rows[step]
        counts = weights[rows] / len(rows)
        x, y = self._batch(step, self._network)
        gradient = self._network.gradient(state.weights, counts, x, y)
        state = self._rule.forward(state, gradient, step, self.rate(step))
        if not state.weights.isfinite().all():
            raise TaskError(
                "this training diverges",
                where=f"step {step}",
                found="weights that are not finite",
                do="train with a smaller learning rate, or mend the inputs",
            )
        return state

    def _check_final(self, state: State) -> None:
        if self.final is None:
            return
        final, initial = self._network.flat(self.final), self._network.initial
        off, way = (state.weights - final).norm().item(), (final - initial).norm().item()
        if not off <= _SAME * way:
            raise TaskError(
                "this is not how the final weights were made",
                found=f"a run that ends {off:.3g} away from them, of {way:.3g} from the first",
                wanted=f"at most {_SAME:g} of the way",
                do="check the first weights, the batches, the loss and the optimiser's numbers",
            )

    # ---- and back

    def _record(self) -> list[State]:
        """The states before every √T-th step, and the last."""
        state, tape, weights = self._start(), [], self._weights(None)
        for step in range(self.num_steps):
            if step % self._stride == 0:
                tape.append(state)
            state = self._step(state, step, weights)
        self._check_final(state)
        return [*tape, state]

    @property
    def _stride(self) -> int:
        return max(1, math.isqrt(self.num_steps))

    def _fitting(self) -> int:
        """How many queries are followed at once: adjoints, and what two backward passes keep."""
        network = self._network
        longest = max(range(self.num_steps), key=lambda step: len(self._rows[step]))
        activations = network.saved_elements(*self._batch(longest, network))
        each = 3 * (self._rule.num_moments + 2) * len(network.initial) + 3 * activations
        return max(1, _BUDGET // (each * network.initial.element_size()))

    def _back(self, tape: list[State], rises: Tensor, tick: Callable[[int], None]) -> Tensor:
        """Σ_t ∂M/∂w of every step, from ∂M/∂θ_T ``[query, parameter]``."""
        scores = rises.new_zeros(len(rises), len(self.inputs))
        adjoint = State(
            rises, tuple(torch.zeros_like(rises) for _ in range(self._rule.num_moments))
        )
        for first in reversed(range(0, self.num_steps, self._stride)):
            states = self._segment(tape, first)
            for step in reversed(range(first, first + len(states) - 1)):
                before, after = states[step - first : step - first + 2]
                adjoint = self._step_back(adjoint, before, after, step, scores)
                tick(len(self._rows[step]))
            if not adjoint.weights.isfinite().all():
                raise TaskError(
                    "the influence of early steps is not finite",
                    where=f"step {first}",
                    do="this training is too unstable to be followed back: replay it in float64, "
                    "or train with a smaller learning rate",
                )
        return scores

    def _segment(self, tape: list[State], first: int) -> list[State]:
        """The states from the one kept before step ``first`` to the next one kept."""
        place, weights = first // self._stride, self._weights(None)
        states = [tape[place]]
        for step in range(first, min(first + self._stride, self.num_steps)):
            states.append(self._step(states[-1], step, weights))
        if not torch.equal(states[-1].weights, tape[place + 1].weights):
            raise TaskError(
                "the same steps led to other weights the second time",
                where=f"steps {first} to {first + len(states) - 2}",
                do="torch.use_deterministic_algorithms(True), and leave the threads alone",
            )
        return states

    def _step_back(
        self, adjoint: State, before: State, after: State, step: int, scores: Tensor
    ) -> State:
        rows, rate = self._rows[step], self.rate(step)
        counts = self._weights(None)[rows] / len(rows)
        x, y = self._batch(step, self._network)
        gradient, pull = self._network.linearize(before.weights, counts, x, y)
        of_gradient, (weights, moments) = self._rule.back(
            adjoint, before, gradient, after, step, rate
        )
        through, by_example = pull(of_gradient)
        scores.index_add_(1, rows.to(scores.device), by_example / len(rows))
        return State(weights + through, moments)


@torch.enable_grad()
def _rises(
    model: nn.Module, read: Iterator[tuple[int, Batch]], measured: Measurement, gradient: Gradient
) -> Iterator[Tensor]:
    """∂M/∂θ ``[parameter]`` of each query."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for _, batch in read:
        moved = to(batch, trained[0].device)
        with differentiable(model):
            output = measured.output(model, moved)
        has_margin = measured.has_margin and gradient == "margin"
        value = output if has_margin else -measured.link(output, moved).loss
        for one in value:
            slopes = torch.autograd.grad(one, trained, retain_graph=True, materialize_grads=True)
            yield torch.cat([slope.reshape(-1) for slope in slopes])
