"""What a torch optimizer's ``state_dict()`` tells of a run: rates, momentum, and Adam's moments.

A state dict numbers its parameters in the order in which the optimizer was given them. They are
matched to the model's in this order of preference, shapes checked throughout:

    by name     the groups hold ``param_names`` (`torch.optim.Adam(model.named_parameters())`)
    in order    the groups one after another are the trained parameters, or all parameters
    by shape    each group is in the model's order, and at every parameter only one group's next
                has its shape: matrices with weight decay and vectors without, for instance
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tda.errors import TaskError

_NAME_THEM = (
    "add `param_names` (lists of names as in model.named_parameters()) to the state's param_groups"
)
_STATE_IT = "leave the optimizer out, and state learning_rate_sum, momentum and weight_decay"
_TENSORS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class Moments:
    """Adam's memory of one parameter after ``step`` steps (Kingma and Ba 2015, algorithm 1).

    mean is m = β₁m + (1−β₁)g, square is v = β₂v + (1−β₂)g², neither corrected for its start at
    zero; peak is the largest v so far (AMSGrad), None where the step divides by v itself.
    """

    mean: Tensor
    square: Tensor
    peak: Tensor | None
    step: int
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True)
class OptimizerState:
    """The state of SGD or Adam, by parameter of the model.

    kind: "sgd" or "adam" (AdamW too). step: taken so far, None where the state does not say (SGD).
    momentum: β of SGD, such that a gradient counts 1/(1−β) times in the long run (with dampening
    d, β is 1 − (1−β₀)/(1−d)); None for Adam. weight_decay: mean over the trained numbers, since
    groups often differ; None where it goes through Adam's moments (not decoupled) and so is no
    decay of known strength. moments: of each trained parameter that has them. learning_rates: of
    all groups. contents: all that was read, for a digest.
    """

    kind: Literal["sgd", "adam"]
    step: int | None
    learning_rates: frozenset[float]
    momentum: float | None
    weight_decay: float | None
    moments: Mapping[str, Moments]
    contents: Mapping[str, Tensor]

    def learning_rate(self, where: object) -> float:
        """η of all groups. Raises TaskError where they differ: scores weigh a checkpoint by one."""
        if len(self.learning_rates) > 1:
            raise TaskError(
                "the learning rate differs between the optimizer's groups",
                where=where,
                found=", ".join(f"{rate:g}" for rate in sorted(self.learning_rates)),
                wanted="one learning rate a checkpoint",
                do="state the one that counts: tda.Checkpoint(…, learning_rate=…)",
            )
        return next(iter(self.learning_rates))

    def require_moments(self, model: nn.Module, where: object) -> None:
        """Raises TaskError naming the first trained parameter without Adam's moments."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in self.moments:
                raise TaskError(
                    f"the optimizer has no moments of parameter {name!r}",
                    where=where,
                    found="SGD" if self.kind == "sgd" else "no step was taken on it",
                    wanted="exp_avg and exp_avg_sq of Adam or AdamW, for every trained parameter",
                    do="give the optimizer's state after training, or metric='euclidean'; a "
                    "parameter that was not trained takes no part with requires_grad_(False)",
                )


@dataclass(frozen=True)
class _Slot:
    """One parameter as the optimizer knows it: its group's settings and its own entry."""

    group: Mapping[str, Any]
    entry: Mapping[str, Any]

    def fits(self, parameter: Tensor) -> bool:
        """Whether the tensors kept have the parameter's shape; one without any fits all."""
        kept = [self.entry.get(name) for name in _TENSORS]
        return all(t.shape == parameter.shape for t in kept if isinstance(t, Tensor))

    @property
    def shape(self) -> list[int] | None:
        kept = [self.entry.get(name) for name in _TENSORS]
        return next((list(t.shape) for t in kept if isinstance(t, Tensor)), None)

    def number(self, name: str) -> float:
        return float(self.group.get(name) or 0.0)


def read_state(state: Any, model: nn.Module, where: object) -> OptimizerState:
    """The optimizer state of a model's trained parameters. Raises TaskError."""
    if not (isinstance(state, Mapping) and {"state", "param_groups"} <= set(state)):
        found = sorted(map(str, state))[:8] if isinstance(state, Mapping) else type(state).__name__
        raise TaskError(
            "this is no optimizer state",
            where=where,
            found=found,
            wanted="optimizer.state_dict() of a torch optimizer, with `state` and `param_groups`",
        )
    slots = _match(state, model, where)
    kind = _kind(slots.values(), where)
    moments = {n: _moments(s) for n, s in slots.items() if "exp_avg" in s.entry}
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in slots}
    return OptimizerState(
        kind=kind,
        step=max((m.step for m in moments.values()), default=None),
        learning_rates=frozenset(slot.number("lr") for slot in slots.values()),
        momentum=_momentum(slots.values(), where) if kind == "sgd" else None,
        weight_decay=_weight_decay(kind, slots, sizes),
        moments=moments,
        contents={f"{n}/{key}": value for n, s in slots.items() for key, value in _contents(s)},
    )


def _match(state: Mapping[str, Any], model: nn.Module, where: object) -> dict[str, _Slot]:
    """The slot of each trained parameter, by name. Raises TaskError naming one that has none."""
    groups = [
        [_Slot(group, state["state"].get(key, {})) for key in group["params"]]
        for group in state["param_groups"]
    ]
    slots = [slot for group in groups for slot in group]
    every = dict(model.named_parameters())
    trained = {name: p for name, p in every.items() if p.requires_grad}
    names = _names(state["param_groups"])
    if names is not None:
        return _checked(dict(zip(names, slots, strict=True)), trained, where)
    for parameters in (trained, every):
        if len(parameters) != len(slots):
            continue
        in_order = dict(zip(parameters, slots, strict=True))
        if len(groups) > 1 and not all(s.fits(parameters[n]) for n, s in in_order.items()):
            in_order = _interleaved(groups, parameters, where)
        return {
            n: slot for n, slot in _checked(in_order, parameters, where).items() if n in trained
        }
    without = list(trained)[len(slots) :]
    raise TaskError(
        "the optimizer holds another number of parameters than the model",
        where=where,
        found=f"{len(slots)} in the optimizer"
        + (f": none is left for {without[0]!r}" if without else ""),
        wanted=f"{len(trained)}, those with requires_grad=True"
        + (f", or all {len(every)}" if len(every) > len(trained) else ""),
        do="give the optimizer of this model, with requires_grad as it was in training; or "
        + _NAME_THEM,
    )


def _names(groups: list[Mapping[str, Any]]) -> list[str] | None:
    """Names of all slots, where the state has them: as ``param_names``, or as its own keys."""
    names = [name for group in groups for name in group.get("param_names") or group["params"]]
    return names if all(isinstance(name, str) for name in names) else None


def _checked(
    slots: dict[str, _Slot], parameters: Mapping[str, Tensor], where: object
) -> dict[str, _Slot]:
    """``slots`` of these parameters. Raises TaskError naming the first that does not fit."""
    for name, parameter in parameters.items():
        slot = slots.get(name)
        if slot is None or not slot.fits(parameter):
            raise TaskError(
                f"the optimizer's state does not fit parameter {name!r}",
                where=where,
                found="no state of that name" if slot is None else f"state of shape {slot.shape}",
                wanted=f"shape {list(parameter.shape)}",
                do="give the optimizer of this model and of this checkpoint; where it was given "
                f"its parameters in another order, {_NAME_THEM}",
            )
    return {name: slots[name] for name in parameters}


def _interleaved(
    groups: list[list[_Slot]], parameters: Mapping[str, Tensor], where: object
) -> dict[str, _Slot]:
    """Several groups, each in the model's order, merged by shape."""
    waiting = [deque(group) for group in groups]
    merged = {}
    for name, parameter in parameters.items():
        fitting = [group for group in waiting if group and group[0].fits(parameter)]
        if len(fitting) != 1:
            raise TaskError(
                f"the optimizer's groups do not show which of them parameter {name!r} is in",
                where=where,
                found=f"{len(fitting)} of {len(groups)} groups whose next parameter has its shape "
                f"{list(parameter.shape)}",
                wanted="one",
                do=_NAME_THEM,
            )
        merged[name] = fitting[0].popleft()
    return merged


def _kind(slots: Collection[_Slot], where: object) -> Literal["sgd", "adam"]:
    kinds = {_kind_of(slot) for slot in slots}
    if kinds == {"sgd"}:
        return "sgd"
    if kinds == {"adam"}:
        return "adam"
    raise TaskError(
        "this optimizer is not known",
        where=where,
        found=f"settings {sorted({name for slot in slots for name in slot.group} - {'params'})}",
        wanted="torch.optim.SGD, Adam or AdamW, minimising",
        do=_STATE_IT,
    )


def _kind_of(slot: _Slot) -> str:
    settings = set(slot.group)
    if slot.group.get("maximize"):
        return "ascent"
    # NAdam has a momentum_decay, RAdam neither of the three: both step by other formulas.
    if "betas" in settings and settings & {"amsgrad", "correct_bias", "bias_correction"}:
        has_moments = not slot.entry or {"exp_avg", "exp_avg_sq", "step"} <= set(slot.entry)
        return "adam" if has_moments else "other"
    return "sgd" if "dampening" in settings else "other"


def _moments(slot: _Slot) -> Moments:
    first, second = slot.group["betas"]
    peak = slot.entry.get("max_exp_avg_sq")
    return Moments(
        mean=slot.entry["exp_avg"].detach().cpu(),
        square=slot.entry["exp_avg_sq"].detach().cpu(),
        peak=None if peak is None else peak.detach().cpu(),
        step=int(slot.entry["step"]),
        betas=(float(first), float(second)),
        eps=slot.number("eps"),
    )


def _momentum(slots: Collection[_Slot], where: object) -> float:
    found = {(slot.number("momentum"), slot.number("dampening")) for slot in slots}
    if len(found) > 1:
        raise TaskError(
            "the momentum differs between the optimizer's groups",
            where=where,
            found=sorted(found),
            wanted="one momentum: scores have one schedule a checkpoint",
            do=_STATE_IT,
        )
    momentum, dampening = found.pop()
    if not momentum or not dampening:
        return momentum
    # A velocity v = βv + (1−d)g counts a gradient (1−d)/(1−β) times in the long run.
    return 1 - (1 - momentum) / (1 - dampening)


def _weight_decay(kind: str, slots: Mapping[str, _Slot], sizes: Mapping[str, int]) -> float | None:
    coupled = [not slot.group.get("decoupled_weight_decay", True) for slot in slots.values()]
    decays = {name: slot.number("weight_decay") for name, slot in slots.items()}
    if kind == "adam" and any(coupled) and any(decays.values()):
        return None
    if len(set(decays.values())) == 1:
        return next(iter(decays.values()))
    return sum(decays[name] * sizes[name] for name in slots) / sum(sizes.values())


def _contents(slot: _Slot) -> Iterable[tuple[str, Tensor]]:
    for name in _TENSORS:
        if isinstance(slot.entry.get(name), Tensor):
            yield name, slot.entry[name]
    names = ("lr", "momentum", "dampening", "weight_decay", "eps")
    betas = [float(beta) for beta in slot.group.get("betas", ())]
    numbers = [slot.number(name) for name in names] + betas + [float(slot.entry.get("step", 0))]
    yield "settings", torch.tensor(numbers, dtype=torch.float64)
