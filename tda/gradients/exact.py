"""The exact slow ways: per-example gradients by vmap(vjp), or by one backward an example.

They serve models the tap cannot separate (recurrent layers, time-major tensors), and the loop is
what the tap is audited against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tda.errors import GradientError
from tda.gradients.factors import Dense
from tda.gradients.rules import matrix_shape
from tda.gradients.tap import Consume

Measure = Callable[[nn.Module, Any], Tensor]


class _Measured(nn.Module):
    """The measurement as a module, so that torch can call it with other parameters."""

    def __init__(self, model: nn.Module, measure: Measure) -> None:
        super().__init__()
        self.model = model
        self.measure = measure

    def forward(self, batch: Any) -> Tensor:
        return self.measure(self.model, batch)


def examples_of(batch: Any, span: slice, num_examples: int) -> Any:
    """The batch that holds only some examples. Raises GradientError if it cannot be cut."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 0 or value.shape[0] != num_examples:
            raise GradientError(
                "a batch cannot be cut into its examples",
                found=f"a tensor of shape {list(value.shape)} in a batch of {num_examples}",
                wanted="the examples along the first axis of every tensor",
                do="mend the collate function of the Task",
            )
        return value[span]

    return tree_map(cut, batch)


def example_of(batch: Any, index: int, num_examples: int) -> Any:
    """The batch that holds only example ``index``. Raises GradientError if it cannot be cut."""
    return examples_of(batch, slice(index, index + 1), num_examples)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """For a forward pass: recurrent layers not by cuDNN, which has gradients of them in training
    mode only, and no second ones."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def trained(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """With gradients recorded for these parameters, as in training; afterwards for none."""
    try:
        for value in parameters.values():
            value.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for value in parameters.values():
            value.requires_grad_(False)


def gradient(
    model: nn.Module, parameters: Mapping[str, Tensor], measure: Measure, batch: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(f ``[1]``, its gradient by parameter) for a batch of one, by plain autograd."""
    values = list(parameters.values())
    with trained(parameters):
        output = measure(model, batch)
        grads: tuple[Tensor | None, ...] = (None,) * len(values)
        if output.requires_grad:
            grads = torch.autograd.grad(output.sum(), values, allow_unused=True)
    named = zip(parameters, grads, values, strict=True)
    return output.detach(), {n: torch.zeros_like(v) if g is None else g for n, g, v in named}


def loop(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    measure: Measure,
    batch: Any,
    num_examples: int,
    consume: Consume,
) -> tuple[Tensor, Tensor | None]:
    """One forward and backward an example."""
    outputs, grads = [], []
    for index in range(num_examples):
        output, grad = gradient(model, parameters, measure, example_of(batch, index, num_examples))
        outputs.append(output.reshape(1))
        grads.append(grad)
    for name, parameter in parameters.items():
        stacked = torch.stack([grad[name] for grad in grads])
        consume(name, [Dense(stacked.reshape(num_examples, *matrix_shape(parameter)))])
    return torch.cat(outputs), last_hidden(model, measure, batch, num_examples)


def vmapped(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    measure: Measure,
    batch: Any,
    num_examples: int,
    consume: Consume,
) -> tuple[Tensor, Tensor | None]:
    """vmap over examples of (f, ∇f); raises what torch raises where a layer does not allow it."""
    module = _Measured(model, measure)

    def one(values: dict[str, Tensor], example: Any) -> tuple[Tensor, Tensor]:
        single = tree_map(lambda v: v.unsqueeze(0) if isinstance(v, Tensor) else v, example)
        output = torch.func.functional_call(module, values, (single,)).sum()
        return output, output

    values = {f"model.{name}": value for name, value in parameters.items()}
    per_example = torch.func.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, 0))
    grads, outputs = per_example(values, batch)
    for name, parameter in parameters.items():
        grad = grads[f"model.{name}"]
        consume(name, [Dense(grad.reshape(num_examples, *matrix_shape(parameter)))])
    return outputs.detach(), last_hidden(model, measure, batch, num_examples)


def last_hidden(model: nn.Module, measure: Measure, batch: Any, num_examples: int) -> Tensor | None:
    """``[example, feature]``: what the last `nn.Linear` called was given, averaged over positions.

    None where there is none, or its input does not have the examples along the first axis.
    """
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            measure(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen or seen[-1].shape[0] != num_examples:
        return None
    return seen[-1].float().reshape(num_examples, -1, seen[-1].shape[-1]).mean(1)
