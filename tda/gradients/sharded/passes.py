"""Passes of a sharded model: by every process at once, and as the leader has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tda.data import to
from tda.gradients import exact
from tda.gradients.factors import Factor
from tda.gradients.passes import Function, Passes, Reduction
from tda.gradients.sharded.weights import Weights, fitted
from tda.gradients.tap import Consume
from tda.measurements import Measurement

if TYPE_CHECKING:
    from tda.gradients.sharded.session import Session

LEADER = 0


class Sharded(Passes):
    """Passes of a sharded model, by each of its processes at the same time."""

    paths = ("tap", "loop")  # vmap has no place for a parameter that comes and goes

    def __init__(
        self, session: Session, measurement: Measurement, autocast: torch.dtype | None
    ) -> None:
        trained = {n for n, p in session.model.named_parameters() if p.requires_grad}
        parameters = {n: p for n, p in session.parameters.items() if n in trained}
        super().__init__(session.model, parameters, measurement, session.device, autocast)
        self._session = session
        self._frozen = False
        self.num_shares = dist.get_world_size()

    def tap(self, batch: Any, num_examples: int, copied: frozenset[str], consume: Consume):
        self._frozen = True
        try:
            return super().tap(batch, num_examples, copied, consume)
        finally:
            self._frozen = False

    def share(
        self, batch: Any, num_examples: int, copied: frozenset[str], number: int
    ) -> list[tuple[Tensor, Tensor | None, tuple[Tensor, ...]]]:
        """By each process of its examples; on the leader the parts of all."""
        span, reduction = self._session.share(number, num_examples)
        count = span.stop - span.start
        few = exact.examples_of(batch, span, num_examples)
        part: Any
        try:
            consume, result = reduction(count, self.device)
            held = _Held(consume)
            with self._session.apart():
                output, hidden = Sharded.tap(self, few, count, copied, held)
            held.check()
            found = tuple(one.cpu() for one in result())
            part = output.cpu(), None if hidden is None else hidden.cpu(), found
        except Exception as error:
            if not self._session.in_step:
                raise
            part = error
        return self._session.collect(part)

    def alone(self, example: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """∇f comes to the CPU parameter by parameter: whole it might not fit the device."""
        grads: dict[str, Tensor] = {}

        def take(name: str, parameter: Tensor) -> None:
            if dist.get_rank() == LEADER and parameter.grad is not None:
                grads[name] = parameter.grad.cpu()
            parameter.grad = None

        with self._conditions(), exact.trained(self.parameters):
            hooks = [
                p.register_post_accumulate_grad_hook(partial(take, name))
                for name, p in self.parameters.items()
            ]
            try:
                output = self._measure(self.model, to(example, self.device))
                if output.requires_grad:
                    output.sum().backward()
            finally:
                for hook in hooks:
                    hook.remove()
        for name, p in self.parameters.items():
            if name not in grads:
                grads[name] = torch.zeros(p.shape, dtype=p.dtype)
        return output.detach(), {name: grads[name] for name in self.parameters}

    @contextmanager
    def _conditions(self) -> Iterator[None]:
        with self._session.using(self._frozen), super()._conditions():
            yield


class Leading(Sharded):
    """The same by rank 0: told to the others, and done with them."""

    def __init__(
        self,
        session: Session,
        number: int,
        measurement: Measurement,
        autocast: torch.dtype | None,
    ) -> None:
        super().__init__(session, measurement, autocast)
        self._number = number
        self._weights: Weights | None = None

    def load(self, weights: Weights) -> tuple[list[str], list[str]]:
        whole, missing, unexpected = fitted(self.model, weights)
        if not (missing or unexpected):
            self._weights = whole
            self._session.hold(whole)
        return missing, unexpected

    def tap(self, batch: Any, num_examples: int, copied: frozenset[str], consume: Consume):
        held = _Held(consume)
        with self._told("tap", batch, num_examples, copied, _drop):
            result = super().tap(batch, num_examples, copied, held)
        held.check()
        return result

    def shared(
        self, batch: Any, num_examples: int, copied: frozenset[str], reduction: Reduction
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """As `tap`, and what ``reduction`` gives; each process of a share of the batch."""
        number = self._session.number_of(reduction)
        with self._told("share", batch, num_examples, copied, number):
            parts = self.share(batch, num_examples, copied, number)
        outputs, hidden, reduced = zip(*parts, strict=True)
        known = [h for h in hidden if h is not None]
        return (
            torch.cat(outputs),
            torch.cat(known) if len(known) == len(parts) else None,
            tuple(torch.cat(each) for each in zip(*reduced, strict=True)),
        )

    def exact(self, path: str, batch: Any, num_examples: int, consume: Consume):
        held = _Held(consume)
        with self._told("exact", path, batch, num_examples, _drop):
            result = super().exact(path, batch, num_examples, held)
        held.check()
        return result

    def alone(self, example: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with self._told("alone", example):
            return super().alone(example)

    def forward(self, batch: Any) -> Tensor:
        with self._told("forward", batch):
            return super().forward(batch)

    def apply(self, function: Function | None, batch: Any, *others: Any) -> Any:
        with self._told("apply", function, batch, *others):
            return super().apply(function, batch, *others)

    @contextmanager
    def _told(self, name: str, *args: Any) -> Iterator[None]:
        if self._weights is not None:
            self._session.hold(self._weights)  # others share the model, and may have loaded theirs
        with self._session.told("pass", self._number, name, args):
            yield


class _Held:
    """Keeps what ``consume`` raises until the pass, which others take part in, is over."""

    def __init__(self, consume: Consume) -> None:
        self._consume = consume
        self._error: Exception | None = None

    def __call__(self, name: str, factors: list[Factor]) -> None:
        if self._error is None:
            try:
                self._consume(name, factors)
            except Exception as error:
                self._error = error

    def check(self) -> None:
        """Raises what was kept."""
        if self._error is not None:
            raise self._error


def _drop(name: str, factors: list[Factor]) -> None:
    """What a follower does with factors."""
