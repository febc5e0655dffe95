"""Per-example gradients in one backward pass to activations.

The weights need no gradient, so autograd never forms a batch gradient. Every call that uses a
parameter is tapped (found by the identity of the parameter, so tied weights, reused modules and
functional calls are all seen), a hook on its output receives ∂f/∂output, and the rule of the
operation turns both into factors (`tda.gradients.rules`).

Tensors are of three kinds: those that depend on the batch, parameters with whatever is computed
from parameters and constants alone (``derived``: a transpose, a slice, a positional embedding),
and constants. A call that mixes the first two is a tapped call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from tda.gradients.factors import Dense, Factor, Outer, materialise
from tda.gradients.rules import RULES, Call, InseparableError, matrix_shape, opaque, vjp
from tda.products import attention

Consume = Callable[[str, list[Factor]], None]

# torch's own attention function without the door that hands the whole call to a mode: the mode
# is wanted for the calls inside.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


class ModifiedError(Exception):
    """An activation was changed in place after a layer had used it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class SwitchedOffError(InseparableError):
    """A parameter is used while no gradient is recorded."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is used where gradients are switched off")
        self.name = name


class _Root(torch.autograd.Function):
    """Identity (in place) that makes autograd record from here on."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


@dataclass(frozen=True)
class Derived:
    """A tensor computed from parameters and constants alone: ``compute(*parameters)``."""

    names: tuple[str, ...]
    compute: Callable[..., Tensor]
    transposed: bool = False  # exactly Wᵀ of the one parameter


@dataclass
class _Pending:
    """Taps of one parameter: how many have been set and which factors have arrived."""

    num_calls: int = 0
    num_done: int = 0
    factors: list[Factor] = field(default_factory=list)


class Tap(TorchFunctionMode):
    """Runs a model on a batch of ``num_examples`` and hands out each parameter's factors.

    parameters: those attributed, by name, none requiring a gradient. consume(name, factors) is
    called once a parameter that was used, during `backward`, when its last factor is known.
    copied: names of layers whose input is copied because the model changes it in place.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        num_examples: int,
        consume: Consume,
        copied: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.num_examples = num_examples
        self.consume = consume
        self.copied = copied
        self._last_linear: tuple[Call, Tensor] | None = None  # and its input
        self._derived = {id(p): Derived((n,), lambda p: p) for n, p in parameters.items()}
        self._keep: list[Tensor] = []  # ids above stay valid while the tensors live
        self._root = torch.zeros((), requires_grad=True)
        self._pending: dict[str, _Pending] = defaultdict(_Pending)
        self._batch_axis = 0

    def mark(self, batch: Any) -> None:
        """Declare the tensors of a batch to depend on the batch."""
        for tensor in _tensors(batch):
            _set_data(tensor)

    def backward(self, output: Tensor) -> None:
        """Backpropagate Σ output; every factor is consumed before this returns."""
        if output.requires_grad:
            output.sum().backward()
        for name, pending in self._pending.items():
            if pending.factors:  # a call whose output does not reach the measurement
                self.consume(name, pending.factors)

    def __torch_function__(
        self, function: Any, types: Iterable, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        used = [t for t in tensors if id(t) in self._derived]
        if not any(map(_is_data, tensors)):
            result = function(*args, **kwargs)
            if used:
                self._derive(function, args, kwargs, used, result)
            return result
        if not used:
            if function is F.scaled_dot_product_attention:
                function = attention
            return _spread(function(*args, **kwargs))
        if not torch.is_grad_enabled():
            raise SwitchedOffError(self._derived[id(used[0])].names[0])
        if function is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        return self._tapped(function, args, kwargs, used)

    def _attention(self, args: tuple, kwargs: dict) -> Any:
        """Tap inside: it works on ``[position, example, feature]``, whatever its caller has."""
        outer, self._batch_axis = self._batch_axis, 1
        try:
            with self:
                return _attention(*args, **kwargs)
        finally:
            self._batch_axis = outer

    def _derive(
        self, function: Callable, args: tuple, kwargs: dict, used: list[Tensor], result: Any
    ) -> None:
        sources = {id(t): self._derived[id(t)] for t in used}
        names = tuple(dict.fromkeys(n for d in sources.values() for n in d.names))

        for position, tensor in enumerate(tree_flatten(result)[0]):
            if not isinstance(tensor, Tensor) or id(tensor) in self._derived:
                continue

            def compute(*values: Tensor, position: int = position) -> Tensor:
                given = dict(zip(names, values, strict=True))
                made = {key: d.compute(*(given[n] for n in d.names)) for key, d in sources.items()}
                new_args, new_kwargs = tree_map(lambda v: made.get(id(v), v), (args, kwargs))
                return tree_flatten(function(*new_args, **new_kwargs))[0][position]

            transposed = (
                getattr(function, "__name__", "") in ("t", "numpy_T", "__get__")
                and len(names) == 1
                and used[0] is self.parameters[names[0]]
                and tensor.ndim == 2
                and tensor.data_ptr() == used[0].data_ptr()
                and tensor.shape == used[0].shape[::-1]
                and tensor.stride() == used[0].stride()[::-1]
            )
            self._derived[id(tensor)] = Derived(names, compute, transposed)
            self._keep.append(tensor)

    def _tapped(self, function: Callable, args: tuple, kwargs: dict, used: list[Tensor]) -> Any:
        # In order, never a set: sums over parameters must round the same way in every process.
        names = list(dict.fromkeys(n for t in used for n in self._derived[id(t)].names))
        copy = not self.copied.isdisjoint(names)
        saved_args, saved_kwargs = tree_map(
            lambda v: self._save(v, copy) if isinstance(v, Tensor) else v, (args, kwargs)
        )
        versions = [(t, t._version) for t in _tensors((saved_args, saved_kwargs))]
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor):
            raise InseparableError(
                f"{getattr(function, '__name__', function)} gives several results"
            )
        if not result.requires_grad:
            result = _Root.apply(result, self._root)
        _set_data(result)
        for name in names:
            self._pending[name].num_calls += 1
        rule = RULES.get(function, opaque)
        call = Call(
            function, saved_args, saved_kwargs, self.num_examples, self._batch_axis,
            wants=lambda v: isinstance(v, Tensor) and id(v) in self._derived,
        )  # fmt: skip

        kept = [(call, versions)]

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[place]
            if grad is None:
                return
            call, versions = kept.pop()  # activations are free once used, as autograd's own are
            if any(_is_freed(self.parameters[name]) for name in names):
                raise InseparableError(f"{names[0]} is used where another module's weights lie")
            if any(tensor._version != version for tensor, version in versions):
                raise ModifiedError(min(names))
            with torch.no_grad(), torch._C.DisableTorchFunction():
                for argument, factor in rule(call, grad):
                    if call.wants(argument):
                        self._arrive(self._derived[id(argument)], argument, factor)
                for name in names:
                    self._finish(name)

        node, place = result.grad_fn, result.output_nr
        assert node is not None
        node.register_prehook(hook)  # after hooks of the result, which may bring weights here
        self._keep_hidden(rule, call)
        return result

    def _save(self, tensor: Tensor, copy: bool) -> Tensor:
        if id(tensor) in self._derived:
            return tensor
        return tensor.detach().clone() if copy else tensor.detach()

    def _arrive(self, derived: Derived, tensor: Tensor, factor: Factor) -> None:
        for name, part in _pull_back(derived, tensor, factor, self.parameters):
            self._pending[name].factors.append(part)

    def _finish(self, name: str) -> None:
        pending = self._pending[name]
        pending.num_done += 1
        if pending.num_done == pending.num_calls and pending.factors:
            self.consume(name, pending.factors)
            pending.factors = []

    def _keep_hidden(self, rule: Any, call: Call) -> None:
        if rule.__name__ in ("linear", "addmm", "matmul"):
            self._last_linear = call, call.args[1 if rule.__name__ == "addmm" else 0]

    def release(self) -> None:
        """Let go of the batch now: calls know the tap, and would keep it in memory for a while."""
        self._last_linear = None
        self._pending.clear()
        self._derived.clear()
        self._keep.clear()

    def hidden(self) -> Tensor | None:
        """``[example, feature]``: the input of the last linear layer, averaged over positions."""
        if self._last_linear is None:
            return None
        call, x = self._last_linear
        return call.positions(x).float().mean(1)


def _pull_back(
    derived: Derived, tensor: Tensor, factor: Factor, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Factor]]:
    """Factors of a derived tensor as factors of the parameters it was computed from."""
    sources = [parameters[name] for name in derived.names]
    if len(sources) == 1 and sources[0] is tensor:
        yield derived.names[0], factor
    elif derived.transposed and isinstance(factor, Outer):
        yield derived.names[0], Outer(factor.right, factor.left)
    else:
        grads = materialise([factor]).reshape(-1, *tensor.shape).to(tensor.dtype)
        pulled = torch.func.vmap(vjp(derived.compute, *sources))(grads)
        for name, source, grad in zip(derived.names, sources, pulled, strict=True):
            yield name, Dense(grad.reshape(len(grad), *matrix_shape(source)))


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, tuple | list):
        for item in tree:
            _collect(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _collect(item, found)


def _is_data(tensor: Tensor) -> bool:
    return "_tda_data" in tensor.__dict__ or (tensor.requires_grad and not tensor.is_leaf)


def _set_data(tensor: Tensor) -> None:
    tensor._tda_data = True  # type: ignore[attr-defined]


def _is_freed(parameter: Tensor) -> bool:
    """Whether its numbers are not here now: FSDP frees them between uses."""
    return parameter.untyped_storage().nbytes() == 0 and parameter.numel() > 0


def _spread(result: Any) -> Any:
    for tensor in _tensors(result):
        _set_data(tensor)
    return result


def factors_of(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    measure: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    num_examples: int,
    consume: Consume,
    copied: frozenset[str] = frozenset(),
) -> tuple[Tensor, Tensor | None]:
    """One forward and one backward: the outputs f ``[example]`` and the last hidden layer.

    Raises InseparableError where a layer cannot be told apart by example, ModifiedError where an
    input was changed in place.
    """
    tap = Tap(parameters, num_examples, consume, copied)
    tap.mark(batch)
    try:
        with torch.enable_grad(), tap:
            output = measure(model, batch)
        tap.backward(output)
        return output.detach(), tap.hidden()
    finally:
        tap.release()
