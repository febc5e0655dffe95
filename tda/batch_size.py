"""How many examples go through a model at once, where nobody says.

    b = the power of two below W / w, in [8, 1024], less while b·m > M

w, m are the floating-point operations and the activation bytes of one example: the slopes between
two small forward passes. W is the work above which a pass costs little more than its parts: the
smallest batch on the plateau of speed (measured on one core: a GPT 4×256 8–16, a CNN 16–64, an MLP
784-512-256-10 256–1,024). Nothing is timed, and M does not depend on what else the machine does, so
the same model and data get the same b: a run that goes on elsewhere writes the same bytes.
(Processes that divide a batch, in `tda.lead`, get b each.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tda.errors import ConfigError

BatchSize = int | Literal["auto"]

PROBES = 2, 4
_LEAST, _MOST = 8, 1024
_BACKWARD = 2  # times the operations of the forward pass
_WORK = {"cpu": 3e9}
_ACCELERATOR_WORK = 3e12
_MEMORY = 2 * 2**30  # bytes of activations


class _Operations(TorchDispatchMode):
    """Counts floating-point operations of matrix products and convolutions."""

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def check_batch_size(given: Any) -> None:
    """Raises ConfigError unless it is "auto" or a count."""
    whole = isinstance(given, int) and not isinstance(given, bool) and given >= 1
    if not whole and given != "auto":
        raise ConfigError("batch_size is not a count", found=repr(given), wanted='≥ 1, or "auto"')


def automatic(forward: Callable[[int], object], num_examples: int, device: torch.device) -> int:
    """b for ``forward(n)``, a pass over n examples that records for a backward; n up to 4.

    num_examples: in the data; with fewer than are probed there is nothing to choose.
    """
    few, more = PROBES
    if num_examples < more:
        return num_examples
    costs = _cost(forward, few), _cost(forward, more)
    operations, memory = (max(0, b - a) / (more - few) for a, b in zip(*costs, strict=True))
    work = max(1.0, (1 + _BACKWARD) * operations)
    limit = _WORK.get(device.type, _ACCELERATOR_WORK) / work
    size = _LEAST
    while 2 * size <= min(limit, _MOST):
        size *= 2
    while size > 1 and size * memory > _MEMORY:
        size //= 2
    return size


def _cost(forward: Callable[[int], object], count: int) -> tuple[int, int]:
    """(operations, bytes kept for the backward pass) of one forward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _Operations() as operations, saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward(count)  # while it lives, no storage is counted twice
        del held
    return operations.total, sum(kept.values())
