"""Where the parameters of a model lie: what can be worked with, and what is refused with advice.

whole, one device       as it is
whole, several devices  as accelerate's ``device_map`` or its owner has put it: it stays there
sharded by FSDP2        over processes, by torch's ``fully_shard``: inside `tda.lead`, as it lies
sharded otherwise       FSDP 1, DeepSpeed's ZeRO 3, tensor parallelism: to be gathered
offloaded               to the CPU or a disk, brought to a device layer by layer: refused
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tda.errors import TaskError

FSDP2 = "FSDP2 (fully_shard)"
GATHER = (
    "gather them with torch's get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True, cpu_offload=True)), or of DeepSpeed with zero_to_fp32.py"
)


def bare(model: nn.Module) -> nn.Module:
    """The model within torch.compile and data-parallel training, by whose names it is indexed."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def sharded_by(model: nn.Module) -> str | None:
    """What has spread the parameters over processes, if anything has."""
    modules, parameters = list(model.modules()), list(model.parameters())
    # By name: importing these types takes a second.
    if any(_is_a(module, "FullyShardedDataParallel") for module in modules):
        return "FSDP 1 (FullyShardedDataParallel)"
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "DeepSpeed ZeRO 3"
    spread = {id(parameter) for parameter in parameters if type(parameter).__name__ == "DTensor"}
    by_fsdp = {id(p) for m in modules if spread and _is_a(m, "FSDPModule") for p in m.parameters()}
    if spread:
        return FSDP2 if spread <= by_fsdp else "tensor parallelism"
    return None


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread it over processes."""
    return sharded_by(model) == FSDP2


def class_of(model: nn.Module) -> type:
    """The class of a model; of one that FSDP2 has sharded, that which it had before."""
    kinds = type(model).__mro__
    names = [kind.__name__ for kind in kinds]
    return kinds[names.index("FSDPModule") + 1] if "FSDPModule" in names else kinds[0]


def is_spread(model: nn.Module) -> bool:
    """Whether parameters lie on several devices: then the model knows how to bring data there."""
    return len({parameter.device for parameter in model.parameters()}) > 1


def require_whole(model: nn.Module) -> None:
    """Raises TaskError unless every parameter is here, with its numbers."""
    by = sharded_by(model)
    if by is not None:
        raise TaskError(
            "the model's parameters are spread over processes",
            found=f"a model sharded by {by}",
            wanted="one whose parameters are whole"
            + ("" if by == FSDP2 else ", or sharded by torch's fully_shard (see tda.lead)"),
            do="give the model as it was before, and the weights as its checkpoint: "
            f"{GATHER}; or index adapters (LoRA) of a model that fits",
        )
    require_numbers(model)


def require_numbers(model: nn.Module) -> None:
    """Raises TaskError unless every parameter is on a device where it is computed with."""
    shapeless = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if shapeless:
        raise TaskError(
            "parameters of the model have no shape yet",
            where=shapeless[0],
            found="a lazy layer that has not seen a batch",
            do="pass one batch through the model before making the task",
        )
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise TaskError(
            "parameters of the model hold no numbers",
            where=absent[0],
            found=f"{len(absent)} parameters on the device 'meta'",
            wanted="every parameter on a device: what is offloaded comes as another tensor at "
            "each use, and its gradient cannot be told",
            do="load the model without offloading (a device_map of devices only, no 'disk', no "
            "'cpu' beside a GPU), on a larger device, or in bfloat16",
        )


def copied(model: nn.Module) -> nn.Module:
    """A copy of its own. Raises TaskError where a training pass has left an activation in it."""
    try:
        return copy.deepcopy(model)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        kept = [
            f"{path}.{name}".removeprefix(".")
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        raise TaskError(
            "the model cannot be copied",
            where=", ".join(kept[:5]) or None,
            found=(str(error).splitlines() or [""])[0],
            wanted="a model that keeps no activation of a training pass",
            do="run it once under torch.no_grad(), or delete the attribute",
        ) from error


def _is_a(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)
