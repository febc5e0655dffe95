"""Parameters of a sharded model: whole while they are used, in shares, and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tda.errors import TaskError

Weights = Mapping[str, Tensor]


def gathered_objects(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that FSDP2 gathers parameters into; made when first used, a module at a time."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined]  # else the first pass does
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.reshard()
    sharded = {name: id(parameter) for name, parameter in model.named_parameters()}
    whole: dict[str, Tensor] = {}
    for module in modules:
        module.unshard()
        whole |= {n: p for n, p in model.named_parameters() if id(p) != sharded[n]}
        module.reshard()
    parallel = [name for name, tensor in whole.items() if type(tensor).__name__ == "DTensor"]
    if parallel or set(whole) != set(sharded):
        raise TaskError(
            "the model is sharded by more than FSDP2",
            where=next(iter(parallel or set(sharded) - set(whole))),
            found="a parameter that stays spread while it is used (tensor parallelism)",
            wanted="fully_shard alone",
            do="shard the model by fully_shard over all processes",
        )
    return {name: whole[name] for name in sharded}


def shares(model: nn.Module) -> dict[str, Tensor]:
    """What this process holds of a state dict; writing to it changes the model."""
    state = {n: v for n, v in model.state_dict().items() if isinstance(v, Tensor)}
    return {n: getattr(v, "to_local", lambda v=v: v)() for n, v in state.items()}


def fitted(model: nn.Module, weights: Weights) -> tuple[Weights, list[str], list[str]]:
    """The weights with every name of a tied parameter; names that miss, and that are unknown.

    Raises RuntimeError naming a parameter of another shape.
    """
    state = model.state_dict(keep_vars=True)
    given = {id(state[name]): weights[name] for name in weights if name in state}
    twins = {n: given[id(v)] for n, v in state.items() if n not in weights and id(v) in given}
    for name, value in weights.items():
        if name in state and state[name].shape != value.shape:
            raise RuntimeError(
                f"size mismatch for {name}: {list(value.shape)}, in the model "
                f"{list(state[name].shape)}"
            )
    missing = [name for name in state if name not in weights and name not in twins]
    return (
        {**weights, **twins} if twins else weights,
        missing,
        [n for n in weights if n not in state],
    )
