"""Where the parameters of a model lie: whole and at hand, or refused with what to do.

whole, one device       as it is
whole, several devices  as accelerate's ``device_map`` or its owner has put it: it stays there
sharded                 over processes, by FSDP or DeepSpeed's ZeRO 3: to be gathered
offloaded               to the CPU or a disk, brought to a device layer by layer: refused
"""

from __future__ import annotations

from torch import nn

from tda.errors import TaskError

_SHARDS = ("DTensor", "FlatParameter")  # by name: importing them takes a second
GATHER = (
    "gather them with torch's get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True, cpu_offload=True)), or of DeepSpeed with zero_to_fp32.py"
)


def sharded_by(model: nn.Module) -> str | None:
    """What has spread the parameters over processes, if anything has."""
    for parameter in model.parameters():
        if type(parameter).__name__ in _SHARDS:
            return "FSDP"
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed ZeRO 3"
    return None


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
            wanted="one whose parameters are whole: each worker holds a model of its own",
            do="give Task the model as it was before, and the weights as its checkpoint: "
            f"{GATHER}; or index adapters (LoRA) of a model that fits",
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
