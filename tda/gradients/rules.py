"""From a call that used a parameter, and the gradient of its output, to the gradient factors.

One rule an operation: given the call's arguments and ∂f/∂output at each example, it yields
``(parameter argument, factor)``. Whatever has no rule here goes through ``opaque``, which is
exact for any operation whose output has the examples along one axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tda.gradients.factors import Convolved, Dense, Factor, Lookup, Outer, Window

_OPAQUE_BYTES = 256 * 2**20


class InseparableError(Exception):
    """A call's contribution cannot be told apart by example. Says why."""


@dataclass(frozen=True)
class Call:
    """One call of ``function`` on tensors of a batch, and where its examples are.

    batch_axis: 0, or 1 for time-major tensors ``[position, example, …]``.
    wants: whether a factor is asked for this argument; costly rules look before they compute.
    """

    function: Callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_examples: int
    batch_axis: int
    wants: Callable[[Any], bool]

    def bind(self, *names: str) -> list[Any]:
        """The arguments of these names, positional or not; None where left out."""
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        return [given.get(name) for name in names]

    def positions(self, tensor: Tensor, num_features: int = 1) -> Tensor:
        """``[example, position, *features]``, features the last ``num_features`` axes."""
        lead = tensor.shape[: tensor.ndim - num_features]
        features = tensor.shape[tensor.ndim - num_features :]
        if self.batch_axis == 1 and len(lead) >= 1:
            if len(lead) == 1:  # positions and examples flattened together, position first
                tensor = tensor.reshape(-1, self.num_examples, *features)
            return tensor.movedim(1, 0).reshape(self.num_examples, -1, *features)
        if not lead or lead[0] % self.num_examples:
            raise InseparableError(
                f"{_name(self.function)} got a tensor of shape {list(tensor.shape)} for a batch "
                f"of {self.num_examples}: its examples are not along the first axis"
            )
        return tensor.reshape(self.num_examples, -1, *features)


def _name(function: Callable) -> str:
    return getattr(function, "__name__", str(function))


Rule = Callable[[Call, Tensor], Iterator[tuple[Any, Factor]]]


def _outer(left: Tensor, right: Tensor) -> Outer:
    return Outer(left[:, :, None], right[:, :, None])


def _vector(grad: Tensor) -> Dense:
    """A vector parameter, gradient ``[example, position, O]`` summed over positions."""
    whole = grad[:, 0].float() if grad.shape[1] == 1 else grad.sum(1, dtype=torch.float32)
    return Dense(whole[:, :, None])


def linear(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    """y = x Wᵀ + b."""
    x, weight, bias = call.bind("input", "weight", "bias")
    left = call.positions(grad)
    yield weight, _outer(left, call.positions(x))
    if call.wants(bias):
        yield bias, _vector(left)


def addmm(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    """y = b + x W, as in Hugging Face's Conv1D."""
    bias, x, weight, beta, alpha = call.bind("input", "mat1", "mat2", "beta", "alpha")
    if beta not in (None, 1) or alpha not in (None, 1):
        yield from opaque(call, grad)
        return
    right = call.positions(grad)
    yield weight, _outer(call.positions(x), right)
    if call.wants(bias):
        yield bias, _vector(right)


def matmul(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    """y = x W."""
    x, weight = call.args[:2]
    if weight.ndim != 2 or x.ndim < 2:
        yield from opaque(call, grad)
        return
    yield weight, _outer(call.positions(x), call.positions(grad))


def embedding(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    """y = W[index]; the row ``padding_idx`` has no gradient."""
    index, weight, padding, max_norm, _, by_frequency, _ = call.bind(
        "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"
    )
    if by_frequency or max_norm is not None:
        raise InseparableError("embedding with scale_grad_by_freq or max_norm couples the examples")
    value = call.positions(grad)
    flat = call.positions(index, num_features=0)
    if padding is not None:
        value = value.masked_fill((flat == padding % len(weight))[:, :, None], 0.0)
    yield weight, Lookup(flat, value, len(weight))


def _affine(call: Call, grad: Tensor, normal: Tensor, weight: Any, bias: Any, axes: int):
    """y = x̂·w + b with w, b over the last ``axes`` axes of x̂."""
    g, x = call.positions(grad, axes), call.positions(normal, axes)
    yield weight, Dense(_matrix((g.float() * x.float()).sum(1)))
    if call.wants(bias):
        yield bias, Dense(_matrix(g.sum(1, dtype=torch.float32)))


def _matrix(per_example: Tensor) -> Tensor:
    """``[example, O, …]`` as ``[example, O, I]``."""
    return per_example.reshape(len(per_example), per_example.shape[1], -1)


def layer_norm(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    x, shape, weight, bias, eps = call.bind("input", "normalized_shape", "weight", "bias", "eps")
    normal = F.layer_norm(x, shape, eps=1e-5 if eps is None else eps)
    yield from _affine(call, grad, normal, weight, bias, len(shape))


def rms_norm(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    x, shape, weight, eps = call.bind("input", "normalized_shape", "weight", "eps")
    yield from _affine(call, grad, F.rms_norm(x, shape, eps=eps), weight, None, len(shape))


def group_norm(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    x, groups, weight, bias, eps = call.bind("input", "num_groups", "weight", "bias", "eps")
    normal = F.group_norm(x, groups, eps=1e-5 if eps is None else eps)
    yield from _channels(call, grad, normal, weight, bias)


def batch_norm(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    x, mean, var, weight, bias, training, _, eps = call.bind(
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"
    )
    if training or mean is None:
        raise InseparableError("batch norm on statistics of the batch couples the examples")
    normal = F.batch_norm(x, mean, var, eps=1e-5 if eps is None else eps)
    yield from _channels(call, grad, normal, weight, bias)


def instance_norm(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    x, mean, var, weight, bias, own, _, eps = call.bind(
        "input", "running_mean", "running_var", "weight", "bias",
        "use_input_stats", "momentum", "eps",
    )  # fmt: skip
    eps = 1e-5 if eps is None else eps
    normal = F.instance_norm(x, mean, var, use_input_stats=own is not False, eps=eps)
    yield from _channels(call, grad, normal, weight, bias)


def _channels(call: Call, grad: Tensor, normal: Tensor, weight: Any, bias: Any):
    """y = x̂·w + b with w, b over axis 1 of ``[example, channel, …]``."""
    yield from _affine(call, grad.movedim(1, -1), normal.movedim(1, -1), weight, bias, 1)


def convolution(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    """y[o, t] = Σ_{c,u} W[o, c, u]·x[c, stride·t + dilation·u] + b[o], any number of dimensions."""
    x, weight, bias, stride, padding, dilation, groups = call.bind(
        "input", "weight", "bias", "stride", "padding", "dilation", "groups"
    )
    groups = groups or 1
    if x.ndim != weight.ndim:
        raise InseparableError("a convolution without a batch axis")
    left = call.positions(grad.movedim(1, -1))
    window = Window(tuple(weight.shape[2:]), stride or 1, padding or 0, dilation or 1, groups)
    x = x.to(grad.dtype)  # as autocast had it, before it is copied many times
    yield weight, Convolved(left.unflatten(2, (groups, -1)), x, window)
    if call.wants(bias):
        yield bias, _vector(left)


def product(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    """y = x·w, w broadcast over x."""
    x, weight = call.args[:2]
    for parameter, other in ((weight, x), (x, weight)):
        if call.wants(parameter):
            yield from _broadcast(call, grad.float() * other, parameter)


def addition(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    """y = x + α·w, w broadcast over x."""
    yield from _sum(call, grad, call.kwargs.get("alpha", 1))


def subtraction(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    """y = x − α·w, w broadcast over x."""
    yield from _sum(call, grad, -call.kwargs.get("alpha", 1))


def _sum(call: Call, grad: Tensor, factor: float) -> Iterator[tuple[Any, Factor]]:
    x, weight = call.args[:2]
    if call.wants(x):
        yield from _broadcast(call, grad.float(), x)
    if call.wants(weight):
        yield from _broadcast(call, grad.float() * factor, weight)


def _broadcast(call: Call, grad: Tensor, parameter: Any) -> Iterator[tuple[Any, Factor]]:
    """Sum ``∂f/∂(broadcast parameter)`` to the parameter's own shape, at each example."""
    axis, count = call.batch_axis, call.num_examples
    _check_batch_axis(call, grad)
    shape = (1,) * (grad.ndim - parameter.ndim) + tuple(parameter.shape)
    if shape[axis] != 1:  # the parameter has a row for each example (it was expanded)
        if shape != tuple(grad.shape) or axis:
            raise InseparableError("a parameter broadcast along a batch axis that is not the first")
        grad = torch.diag_embed(grad.movedim(0, -1), dim1=0, dim2=1)
        yield parameter, Dense(grad.reshape(count, parameter.shape[0], -1))
        return
    summed = [i for i in range(grad.ndim) if i != axis and shape[i] == 1 and grad.shape[i] != 1]
    per_example = (grad.sum(summed, keepdim=True) if summed else grad).movedim(axis, 0)
    yield parameter, Dense(per_example.reshape(count, *matrix_shape(parameter)))


def opaque(call: Call, grad: Tensor) -> Iterator[tuple[Any, Factor]]:
    """Any operation: the vjp is linear, so example b's gradient is the vjp of grad masked to b."""
    axis, count = call.batch_axis, call.num_examples
    _check_batch_axis(call, grad)
    if re.fullmatch(r"\w*[^_]_|__i\w+__", _name(call.function)):
        raise InseparableError(f"{_name(call.function)} works in place, so it cannot be run again")
    flat, spec = tree_flatten((call.args, call.kwargs))
    shape = [count if i == axis else 1 for i in range(grad.ndim)]
    eye = torch.eye(count, dtype=grad.dtype, device=grad.device)
    chunk = max(1, _OPAQUE_BYTES // max(1, 4 * grad.numel()))
    for place, parameter in enumerate(flat):
        if not call.wants(parameter):
            continue

        def function(value: Tensor, place: int = place) -> Tensor:
            args, kwargs = tree_unflatten([*flat[:place], value, *flat[place + 1 :]], spec)
            return call.function(*args, **kwargs)

        pull = vjp(function, parameter)
        per_example = torch.func.vmap(
            lambda mask, pull=pull: pull(grad * mask.reshape(shape))[0], chunk_size=chunk
        )(eye)
        yield parameter, Dense(per_example.reshape(count, *matrix_shape(parameter)))


def vjp(function: Callable[..., Tensor], *primals: Tensor) -> Callable[[Tensor], Any]:
    """v ↦ vᵀJ of a function there, a tensor for each primal; can be mapped by vmap.

    torch.func's own imports torch's compiler when it is called: a second, and 70 MB.
    """
    values = [primal.detach().requires_grad_() for primal in primals]
    with torch.enable_grad():
        result = function(*values)
    if not result.requires_grad:  # such as what is detached
        return lambda grad: tuple(map(torch.zeros_like, primals))
    return lambda grad: torch.autograd.grad(
        result, values, grad, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """A parameter of shape ``[O, …]`` as the matrix ``[O, I]``; a scalar is ``[1, 1]``."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return rows, parameter.numel() // max(rows, 1)


def _check_batch_axis(call: Call, grad: Tensor) -> None:
    axis, count = call.batch_axis, call.num_examples
    if grad.ndim <= axis or grad.shape[axis] != count:
        raise InseparableError(
            f"{_name(call.function)} gave a result of shape {list(grad.shape)}: no axis {axis} "
            f"of {count} examples"
        )


RULES: dict[Callable, Rule] = {
    F.linear: linear,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    torch.mul: product,
    Tensor.mul: product,
    Tensor.__mul__: product,
    Tensor.__rmul__: product,
    Tensor.mul_: product,
    Tensor.__imul__: product,
    torch.add: addition,
    Tensor.add: addition,
    Tensor.__add__: addition,
    Tensor.__radd__: addition,
    Tensor.add_: addition,
    Tensor.__iadd__: addition,
    torch.sub: subtraction,
    Tensor.sub: subtraction,
    Tensor.__sub__: subtraction,
}
