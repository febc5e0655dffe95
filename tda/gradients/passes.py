"""What is done with a model in one go: a forward pass, and perhaps a backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tda.data import to
from tda.errors import TaskError
from tda.gradients import exact
from tda.gradients.tap import Consume, factors_of
from tda.measurements import Measurement
from tda.products import fast_products

Function = Callable[..., Any]
# (number of examples, device) -> what takes their factors, and what gives what became of these:
# tensors [example, …]. Pickles.
Reduction = Callable[[int, torch.device], tuple[Consume, Callable[[], tuple[Tensor, ...]]]]


class Passes:
    """Passes of one model, whose parameters require no gradient unless one says so.

    parameters: those attributed, by name. Batches go to ``device``.
    """

    paths: tuple[str, ...] = ("tap", "vmap", "loop")  # best first
    num_shares = 1  # processes among which a batch can be divided

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        measurement: Measurement,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.measurement = measurement
        self.device = device
        self.autocast = autocast

    def load(self, weights: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Take these weights; the keys that are missing, and those that are unexpected.

        A tied parameter is not missing if it is there under another name.
        """
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        state = self.model.state_dict(keep_vars=True)
        given = {id(value) for name, value in state.items() if name in weights}
        return [name for name in missing if id(state[name]) not in given], unexpected

    def tap(
        self, batch: Any, num_examples: int, copied: frozenset[str], consume: Consume
    ) -> tuple[Tensor, Tensor | None]:
        """f ``[example]`` and the last hidden layer, by `factors_of`."""
        with self._conditions():
            batch = to(batch, self.device)
            return factors_of(
                self.model, self.parameters, self._measure, batch, num_examples, consume, copied
            )

    def exact(
        self, path: str, batch: Any, num_examples: int, consume: Consume
    ) -> tuple[Tensor, Tensor | None]:
        """The same by `exact.vmapped` or `exact.loop`."""
        function = exact.vmapped if path == "vmap" else exact.loop
        with self._conditions():
            batch = to(batch, self.device)
            return function(
                self.model, self.parameters, self._measure, batch, num_examples, consume
            )

    def alone(self, example: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """f ``[1]`` and ∇f by parameter, by plain autograd, of a batch of one."""
        with self._conditions():
            example = to(example, self.device)
            return exact.gradient(self.model, self.parameters, self._measure, example)

    def forward(self, batch: Any) -> Tensor:
        """f ``[example]``, with all that a backward pass to the weights would need."""
        with self._conditions(), exact.trained(self.parameters):
            return self._measure(self.model, to(batch, self.device))

    def apply(self, function: Function | None, batch: Any, *others: Any) -> Any:
        """``function(model, batch, *others)``, without gradients; None: f ``[example]``."""
        with self._conditions(), torch.no_grad():
            return (function or self._measure)(self.model, to(batch, self.device), *others)

    @contextmanager
    def _conditions(self) -> Iterator[None]:
        """Of every pass: precision, and two warnings of torch's that do not concern the user.

        vmap is a loop inside some operations (slow, and still exact); reentrant checkpointing finds
        no gradients (the tap refuses it, and says what to do).
        """
        with warnings.catch_warnings(), fast_products(), exact.differentiable(self.model):
            warnings.filterwarnings("ignore", message="There is a performance drop")
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            if self.autocast is None:
                yield
            else:
                with torch.autocast(self.device.type, dtype=self.autocast):
                    yield

    def _measure(self, model: nn.Module, batch: Any) -> Tensor:
        output = self.measurement.output(model, batch)
        if not isinstance(output, Tensor) or output.ndim != 1:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TaskError(
                f"measurement {self.measurement.name!r} does not give one scalar an example",
                found=found,
                wanted="a tensor [example]",
                do='use reduction="none" and sum or average over everything but the examples',
            )
        return output
