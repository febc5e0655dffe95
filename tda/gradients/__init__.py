"""Per-example gradients of a measurement: activation × output gradient, one backward a batch.

    factors.py   the gradient of one parameter at each example: Outer, Convolved, Lookup, Dense
    rules.py     from an operation and its output's gradient to factors
    tap.py       finds every use of a parameter, in one forward and one backward
    exact.py     vmap(vjp) and one-example loops: the fallback, and the audit's oracle
    passes.py    these, as passes of one model under the same conditions
    sharded/     passes of a model that is spread over processes, told by one to the others

`Gradients` ties them together and audits itself on the first batch of several that it sees.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tda.data import to
from tda.errors import GradientError, TaskError
from tda.gradients.exact import example_of
from tda.gradients.factors import (
    Convolved,
    Dense,
    Elementwise,
    Factor,
    Lookup,
    Outer,
    materialise,
)
from tda.gradients.passes import Passes, Reduction
from tda.gradients.rules import InseparableError, matrix_shape
from tda.gradients.sharded.passes import Leading
from tda.gradients.sharded.session import session_of
from tda.gradients.tap import Consume, ModifiedError, SwitchedOffError
from tda.layout import copied, is_sharded, is_spread
from tda.malloc import give_back, keep_freed
from tda.measurements import Link, Measurement, Places, predict, require_classes

__all__ = [
    "Audit",
    "Consume",
    "Convolved",
    "Dense",
    "Elementwise",
    "Factor",
    "Gradients",
    "Lookup",
    "Outer",
    "shapes_of",
]

log = logging.getLogger(__name__)

_MOST_AUDITED, _LEAST_AUDITED = 8, 3
_AUDIT_FLOATS = 2**24  # gradients held for the audit: 64 MiB, but for large models
_TOLERANCE = {None: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}  # of a pass in this type


@dataclass(frozen=True)
class Audit:
    """What the first batch showed: the path taken, why, and the share of parameters in use."""

    path: str
    reason: str
    covered: float

    def __str__(self) -> str:
        how = {"tap": "one backward", "vmap": "exact vmap", "loop": "one example at a time"}
        because = f" ({self.reason})" if self.reason else ""
        return f"gradients by {how[self.path]}{because}; {self.covered:.0%} of parameters in use"


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Each attributed parameter as a matrix ``[O, I]``, in the model's order; tied ones once."""
    return {name: matrix_shape(p) for name, p in model.named_parameters() if p.requires_grad}


class Gradients:
    """Per-example gradients of ``measurement`` for a private copy of ``model``, in eval mode.

    Dropout is off and batch norm uses its running statistics. Parameters with
    ``requires_grad=False`` are left out. ``autocast`` is the dtype of the forward and backward
    pass, or None for the model's own. The user's model is never changed. A model that is spread
    over several devices stays so; batches go to ``device``, and factors are brought there. One that
    is sharded over processes is used as it lies (`tda.gradients.sharded`).
    """

    def __init__(
        self,
        model: nn.Module,
        measurement: Measurement,
        device: str | torch.device = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        keep_freed()
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise TaskError(
                "the model has no parameter to attribute to",
                found="requires_grad=False everywhere" if list(model.parameters()) else "none",
                wanted="at least one parameter with requires_grad=True",
            )
        if is_sharded(model):
            self._passes: Passes = session_of(model).passes(measurement, autocast)
        else:
            own = copied(model).eval()
            if not is_spread(model):
                _move(own, device)
            parameters = {n: p for n, p in own.named_parameters() if n in set(trained)}
            own.requires_grad_(False)
            # "cuda" is any thread's own, and the backward pass has a thread for each device.
            device = torch.empty(0, device=device).device
            self._passes = Passes(own, parameters, measurement, device, autocast)
        self.model = self._passes.model
        self.parameters: dict[str, Tensor] = self._passes.parameters
        self.measurement = measurement
        self.device = self._passes.device
        self.audited: Audit | None = None
        self._lone = False  # whether the batch audited had one example, which mixes with none
        self._copied: frozenset[str] = frozenset()
        self._outputs: torch.Size | None = None  # of one example

    @property
    def num_shares(self) -> int:
        """Processes that `reduced` divides a batch among."""
        return self._passes.num_shares

    @property
    def _tolerance(self) -> float:
        """Of errors that rounding makes, in the precision of the pass."""
        kinds = {self._passes.autocast, *(p.dtype for p in self.parameters.values())}
        return max(_TOLERANCE.get(kind, 0.0) for kind in kinds)

    @property
    def num_audited(self) -> int:
        """Examples of the first batch that are compared with plain autograd."""
        size = sum(p.numel() for p in self.parameters.values())
        return max(_LEAST_AUDITED, min(_MOST_AUDITED, _AUDIT_FLOATS // size))

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of a checkpoint. Raises TaskError naming the keys that do not fit."""
        try:
            missing, unexpected = self._passes.load(weights)
        except RuntimeError as error:
            raise TaskError(
                "the checkpoint does not fit the model",
                found=str(error).splitlines()[-1].strip(),
                do="give the checkpoint of this model",
            ) from error
        if missing or unexpected:
            raise TaskError(
                "the checkpoint does not fit the model",
                found=f"missing {missing[:5]}, unexpected {unexpected[:5]}",
                wanted="the keys of model.state_dict()",
                do="give the checkpoint of this model",
            )

    def __call__(self, batch: Any, num_examples: int, consume: Consume) -> tuple[Tensor, Any]:
        """f ``[example]`` and the last hidden layer; ``consume(name, factors)`` a parameter.

        The first batch is audited: its first 3 to 8 examples, each alone under plain autograd, must
        have the gradients found here, else the exact path takes over. One of a lone example shows
        little, and the first of several is audited again. Raises GradientError where the examples
        of a batch are not independent.
        """
        path = self._audited(batch, num_examples).path
        with _explained(batch, num_examples):
            return self._run(path, batch, num_examples, self._here(consume))

    def reduced(
        self, batch: Any, num_examples: int, reduction: Reduction
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """As a call with what ``reduction(num_examples, device)`` takes factors by, and what that
        gives: tensors ``[example, …]``. Processes that share a model divide the batch."""
        passes, path = self._passes, self._audited(batch, num_examples).path
        with _explained(batch, num_examples):
            several = path == "tap" and 1 < passes.num_shares <= num_examples
            if several and isinstance(passes, Leading):
                return passes.shared(batch, num_examples, self._copied, reduction)
            consume, result = reduction(num_examples, self.device)
            return *self._run(path, batch, num_examples, self._here(consume)), result()

    def _audited(self, batch: Any, num_examples: int) -> Audit:
        if self._lone and num_examples > 1:
            self.audited = None
        if self.audited is None:
            self._put_channels_last(batch)
            self.audited, self._lone = self._audit(batch, num_examples), num_examples == 1
            give_back()  # whole gradients, which nobody holds again
            fell_back = self.audited.path != "tap"
            log.log(logging.WARNING if fell_back else logging.INFO, "%s", self.audited)
        return self.audited

    def _put_channels_last(self, batch: Any) -> None:
        """Pictures are convolved faster so by a processor, if the model's code can have it so."""
        filters = [p for p in self.model.parameters() if p.ndim == 4]
        if self.device.type != "cpu" or not filters or is_sharded(self.model):
            return
        _lay_out(filters, torch.channels_last)  # activations follow the weights
        try:
            self.output(batch)
        except _FAULTS:
            # Such as a view of what no longer lies in one piece; the audit names other faults.
            _lay_out(filters, torch.contiguous_format)

    def _here(self, consume: Consume) -> Consume:
        """With factors brought to the device of the projection, where a model is spread."""
        if not is_spread(self.model):
            return consume
        return lambda name, factors: consume(name, [f.to(self.device) for f in factors])

    def check(self, batch: Any, places: Places) -> None:
        """Raises DataError naming an example whose target has no meaning, before a pass meets it:
        on a GPU a class that there is not ends all work of the process there."""
        measurement = self.measurement
        measurement.check(batch, places)
        if measurement.classes is None:
            return
        y = measurement.classes(batch)
        if self._outputs is None:
            with _explained(batch, 1):
                self._outputs = self.apply(_shape, example_of(batch, 0, len(places)))
        require_classes(y, places, self._outputs)

    def output(self, batch: Any) -> Tensor:
        """f ``[example]`` alone, by a forward pass without gradients."""
        return self._passes.apply(None, batch)

    def link(self, output: Tensor, batch: Any) -> Link:
        """The loss as a function of outputs f ``[example]``: float32, on the CPU."""
        with torch.no_grad():
            return self.measurement.link(output.float().cpu(), to(batch, "cpu"))

    def forward(self, batch: Any) -> Tensor:
        """f ``[example]``, with all that a backward pass to the weights would need."""
        with _explained(batch):
            return self._passes.forward(batch)

    def apply(self, function: Callable[..., Any], batch: Any, *others: Any) -> Any:
        """``function(model, batch, *others)``, without gradients."""
        return self._passes.apply(function, batch, *others)

    def _run(self, path: str, batch: Any, num_examples: int, consume: Consume):
        if path == "tap":
            return self._tap(batch, num_examples, consume)
        return self._passes.exact(path, batch, num_examples, consume)

    def _tap(self, batch: Any, num_examples: int, consume: Consume):
        # Consumed only when the whole batch went well: a retry must not count anything twice.
        arrived: list[tuple[str, list[Factor]]] = []
        streaming = self.audited is not None
        take = consume if streaming else lambda name, factors: arrived.append((name, factors))
        while True:
            try:
                result = self._passes.tap(batch, num_examples, self._copied, take)
                break
            except ModifiedError as change:
                if streaming or change.name in self._copied:
                    raise InseparableError(
                        f"the input of {change.name} is changed in place"
                    ) from None
                self._copied |= {change.name}
                arrived.clear()
        for name, factors in arrived:
            consume(name, factors)
        return result

    def _audit(self, batch: Any, num_examples: int) -> Audit:
        outputs, wanted = self._alone(batch, num_examples)
        used = sum(p.numel() for n, p in self.parameters.items() if any(w[n].any() for w in wanted))
        covered = used / sum(p.numel() for p in self.parameters.values())
        self._check_independence(batch, num_examples, outputs)
        if not used and not self.forward(batch).requires_grad:
            raise GradientError(
                "what is measured does not depend on any parameter that is attributed",
                found="an output without a gradient",
                wanted="one that backward() can be called on",
                do="look for detach(), item(), numpy() or new tensors in model and measurement",
            )
        reason = ""
        for path in self._passes.paths[:-1]:
            try:
                fault = self._compare(path, batch, num_examples, wanted)
            except SwitchedOffError as error:
                # A torch.autograd.Function gives its parameters gradients all the same.
                if not any(grads[error.name].any() for grads in wanted):
                    raise _without_gradient(error.name) from error
                fault = str(error)
            except (InseparableError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                fault = (str(error).splitlines() or [type(error).__name__])[0]
            if not fault:
                return Audit(path, reason, covered)
            reason = reason or fault
        return Audit("loop", reason, covered)

    def _alone(self, batch: Any, num_examples: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """f and ∇f of examples by plain autograd, each in a batch of its own."""
        count = min(self.num_audited, num_examples)
        with _explained(batch, 1):
            pairs = [
                self._passes.alone(example_of(batch, index, num_examples)) for index in range(count)
            ]
        return torch.cat([output for output, _ in pairs]), [grads for _, grads in pairs]

    def _check_independence(self, batch: Any, num_examples: int, alone: Tensor) -> None:
        with _explained(batch, num_examples):
            together = self.output(batch)[: len(alone)].float()
        scale = float(alone.float().abs().max().clamp(min=1e-3))
        error = float((together - alone.float()).abs().max()) / scale
        if error > 10 * self._tolerance:  # NaN compares false
            raise GradientError(
                "the model mixes the examples of a batch: they have no gradients of their own",
                found=f"an output that changes by {error:.1e} when the example is alone",
                wanted="a model whose output for an example does not depend on its batch",
                do="look for statistics, attention or losses taken over the batch axis, and for "
                "random numbers that are drawn in eval mode, too",
            )

    def _compare(self, path: str, batch: Any, num_examples: int, wanted: list[dict]) -> str:
        """A parameter whose gradient is wrong and by how much, or an empty string."""
        audited = slice(0, len(wanted))
        scales = [sum(float(g.float().square().sum()) for g in w.values()) ** 0.5 for w in wanted]
        absent, tolerance = set(wanted[0]), self._tolerance
        faults: list[str] = []

        def check(name: str, found: Tensor | None) -> None:
            for index, (grads, scale) in enumerate(zip(wanted, scales, strict=True)):
                grad = grads[name].float()
                own = 0.0 if found is None else found[index].reshape(grad.shape).to(grad.device)
                error = float((own - grad).norm())
                # NaN compares false: a non-finite gradient is the featurizer's to report.
                if error > tolerance * max(float(grad.norm()), 1e-3 * scale):
                    share = error / scale if scale else math.inf
                    faults.append(f"{name} is not separable by example (error {share:.1e})")

        def consume(name: str, factors: list[Factor]) -> None:
            absent.discard(name)
            check(name, materialise([factor.examples(audited) for factor in factors]))

        self._run(path, batch, num_examples, consume)
        for name in sorted(absent):
            check(name, None)
        return faults[0] if faults else ""


def _shape(model: nn.Module, batch: Any) -> torch.Size:
    return predict(model, batch).shape


def _without_gradient(name: str) -> GradientError:
    return GradientError(
        "a parameter is used where gradients are switched off, so it would get none",
        where=name,
        found="reentrant activation checkpointing, or torch.no_grad() in the forward pass",
        do="checkpoint with use_reentrant=False; set requires_grad_(False) on parameters that are "
        "not trained",
    )


def _lay_out(parameters: list[nn.Parameter], memory_format: torch.memory_format) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _move(model: nn.Module, device: str | torch.device) -> None:
    """Raises TaskError where this machine has no such device."""
    try:
        nn.Module.to(model, device)  # accelerate's own `to` is still that of the original
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:  # as torch has it, of a build without it
        raise TaskError(
            f"device {str(device)!r} cannot be used here",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            wanted="a device that torch has on this machine",
            do='use device="cpu", or install the build of torch for this device',
        ) from error


_FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


@contextmanager
def _explained(batch: Any, num_examples: int | None = None) -> Iterator[None]:
    """Errors of the user's model or measurement say what they were given."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FAULTS as error:
        count = {None: "a batch", 1: "a batch of one example"}
        raise GradientError(
            "the model or the measurement fails on "
            + count.get(num_examples, f"a batch of {num_examples} examples"),
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            wanted="a batch as the data set gives it: " + _describe(batch),
            do="check types (float64 arrays: .astype('float32'); a Hugging Face data set: "
            ".with_format('torch')), shapes, names (`input` goes to the model as it is, all other "
            "keys but the target by name) and the measurement; batch norm without running "
            "statistics needs other examples and is refused",
        ) from error


def _describe(batch: Any) -> str:
    """Types and shapes of a batch, in words."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if isinstance(batch, dict):
        return ", ".join(f"{name}: {_describe(value)}" for name, value in batch.items())
    if isinstance(batch, tuple | list):
        return ", ".join(map(_describe, batch))
    return type(batch).__name__
