"""What the user brings: a model, its checkpoints, and what to measure."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tda.data import Collate
from tda.errors import TaskError
from tda.gradients.sharded.session import session_of
from tda.layout import bare, class_of, is_sharded, is_spread, require_numbers, require_whole
from tda.measurements import as_measurement
from tda.training.noise import with_noise
from tda.training.optimizer import OptimizerState, read_state
from tda.weights import (
    Weights,
    apart_from,
    digest_of,
    place_of,
    read,
    require_tensors,
    storage_of,
    under,
    without_wrapper,
)

METRICS = ("euclidean", "adam", "second_moment", "adam_update")
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """Weights at one moment of training, and what is known of how they came about.

    weights: a state dict, or the path of a ``.pt``/``.pth`` (loaded with ``weights_only=True``) or
    ``.safetensors`` file; a dict in the file may hold them under ``model``, ``state_dict`` or
    ``model_state_dict``.
    step, learning_rate: of training at that moment; TracIn needs the learning rate.
    optimizer: ``optimizer.state_dict()`` of torch's SGD, Adam or AdamW, or a file that holds one,
    as it is or under ``optimizer`` or ``optimizer_state_dict``. What it tells is taken from it
    where it is not given here. Groups with several learning rates need ``learning_rate``; their
    weight decay counts by its mean over the trained numbers.
    learning_rate_sum: Σ_t η_t of all steps so far. Without it a checkpoint's learning rate is taken
    for that of all steps since the checkpoint before.
    momentum: β of SGD (0.0: none); weight_decay: the coefficient. With Σ_t η_t these give the
    automatic damping (`tda.training.schedule.implied_damping`).
    noise, noise_seed: what `tda.smoothed` sets; 0.0 leaves the weights as they are.

    Raises TaskError for a number out of its range, or weights or an optimizer of another kind.
    """

    weights: Weights | str | Path
    step: int | None = None
    learning_rate: float | None = None
    name: str | None = None
    optimizer: Mapping[str, Any] | str | Path | None = None
    learning_rate_sum: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    noise: float = 0.0
    noise_seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str | None):
            raise TaskError(
                "the name of a checkpoint is no text", found=repr(self.name), wanted="a str"
            )
        if self.step is not None:
            object.__setattr__(self, "step", _whole(self.step, self.name))
        if not isinstance(self.weights, Mapping | str | Path):
            raise TaskError(
                "these are no weights",
                where=self.name,
                found=type(self.weights).__name__,
                wanted="a state dict, such as model.state_dict(), or the path of a file",
            )
        if not isinstance(self.optimizer, Mapping | str | Path | None):
            raise TaskError(
                "this is no state of an optimizer",
                where=self.name,
                found=type(self.optimizer).__name__,
                wanted="optimizer.state_dict(), or the path of a file",
            )
        for field in ("learning_rate", "learning_rate_sum", "momentum", "weight_decay"):
            value = getattr(self, field)
            below = 1.0 if field == "momentum" else math.inf
            if value is None or (isinstance(value, int | float) and 0 <= value < below):
                continue  # NaN compares false
            raise TaskError(
                f"{field} of a checkpoint is out of its range",
                where=self.name,
                found=repr(value),
                wanted="0 ≤ momentum < 1" if field == "momentum" else "a finite number ≥ 0",
            )

    def load(self) -> Weights:
        """The state dict. Raises TaskError naming the file if it cannot be had, or is none."""
        if isinstance(self.weights, Mapping):
            require_tensors(self.weights, self.name, "give model.state_dict()")
            return self.weights
        do = "save it with torch.save(model.state_dict(), path) or as safetensors"
        loaded = read(Path(self.weights), "a checkpoint", do)
        weights = under(loaded, "model", "state_dict", "model_state_dict")
        require_tensors(weights, self.weights, do)
        return weights

    def load_optimizer(self) -> Any:
        """The optimizer's state dict, None without one. Raises TaskError naming the file."""
        if self.optimizer is None:
            return None
        if isinstance(self.optimizer, Mapping):
            loaded: Any = self.optimizer
        else:
            do = "save it with torch.save(optimizer.state_dict(), path)"
            loaded = read(Path(self.optimizer), "an optimizer's state", do)
        return under(loaded, "optimizer", "optimizer_state_dict")


def _whole(step: Any, name: str | None) -> int:
    """A step as an int, of any kind that Python counts with. Raises TaskError."""
    try:
        truth = isinstance(step, bool) or getattr(step, "dtype", None) is torch.bool
        number = -1 if truth else operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise TaskError(
            "step of a checkpoint is out of its range",
            where=name,
            found=repr(step),
            wanted="a whole number ≥ 0, such as 10",
        )
    return number


def _apart(checkpoints: Iterable[Checkpoint], model: nn.Module) -> Iterator[Checkpoint]:
    """With weights that stay as they are now, whatever becomes of the model; each copied once."""
    live = {storage_of(value) for value in (*model.parameters(), *model.buffers())} - {0}
    copied: dict[int, Weights] = {}
    for checkpoint in checkpoints:
        given = checkpoint.weights
        if isinstance(given, dict) and any(storage_of(value) in live for value in given.values()):
            if id(given) not in copied:
                copied[id(given)] = apart_from(given, live)
            checkpoint = replace(checkpoint, weights=copied[id(given)])
        yield checkpoint


def _as_checkpoint(given: Any, index: int) -> Checkpoint:
    if isinstance(given, Checkpoint):
        return given
    if isinstance(given, str | Path):
        return Checkpoint(given, name=Path(given).stem)
    if isinstance(given, Mapping) and all(isinstance(v, Tensor) for v in given.values()):
        return Checkpoint(given)
    raise TaskError(
        f"checkpoint {index} is neither weights nor a path",
        found=type(given).__name__,
        wanted="a state dict, a path, or a tda.Checkpoint",
    )


def as_checkpoints(given: Any) -> list[Checkpoint]:
    """One checkpoint or several, in any form that `Task` takes. Raises TaskError."""
    if isinstance(given, str | Path | Mapping | Checkpoint):
        given = [given]
    if not isinstance(given, Iterable) or isinstance(given, nn.Module):
        raise TaskError(
            "these are no checkpoints",
            found=type(given).__name__,
            wanted="a list of state dicts, paths or tda.Checkpoint values, or one of these",
        )
    return [_as_checkpoint(one, index) for index, one in enumerate(given)]


def require_task(task: Any, wanted: str) -> None:
    """Raises TaskError for what is no task; wanted: the call as it should be."""
    if not isinstance(task, Task):
        raise TaskError("this is not a task", found=type(task).__name__, wanted=wanted)


class Task:
    """A model, its checkpoints and a measurement: everything a gradient depends on but the data.

    model: any ``nn.Module``; parameters with ``requires_grad=False`` are left out. It is copied,
    put in eval mode, and never changed. Of one within torch.compile, DataParallel or
    DistributedDataParallel it is the model inside, and so of their state dicts.
    checkpoints: state dicts, paths, or `Checkpoint` values, in the order of training; by default
    the weights the model has now. ``model.state_dict()`` is the model's own memory: of a training
    it is kept by ``copy.deepcopy``. Weights that share memory with the model are copied to the CPU,
    unless it is spread or sharded: then it is not to be trained on while the task is in use.
    measurement: the name of one of `tda.MEASUREMENTS`, a `Measurement`, or any callable
    ``(model, batch) -> loss [example]``.
    collate: from a list of examples to a batch, for data that cannot be stacked as it is.
    device: of the batches and the projection; the model goes there too, unless it is spread over
    several devices (a `device_map`) or sharded over processes (inside `tda.lead`): then it stays as
    it lies, and of one that is sharded the device is where its shards are.
    precision: "float32" (the model's own) or "bfloat16" (autocast) for the forward and backward.
    metric: what becomes of gradients before they are projected, by the moments m, v that Adam has
    at each checkpoint (each needs its ``optimizer``); ⊘ divides coordinate by coordinate.

        "euclidean"      ∇f
        "adam"           ∇f ⊘ √(√v̂ + ε), so that inner products are those of Adam's steps
        "second_moment"  ∇f ⊘ (√v̂ + ε), V^{−½}∇f (Chang et al. 2025, TrackStar)
        "adam_update"    training examples: −Γ, the step Adam would take on the example alone,
                         over its learning rate; queries: ∇f (Xia et al. 2024, LESS)

    Raises TaskError.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Any = None,
        measurement: Any = "cross_entropy",
        *,
        collate: Collate | None = None,
        device: str = "cpu",
        precision: str = "float32",
        metric: str = "euclidean",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TaskError(
                "the model is not a torch module",
                found=type(model).__name__,
                wanted="an nn.Module",
            )
        model = bare(model)
        sharded = is_sharded(model)
        if sharded:
            require_numbers(model)
            device = str(next(model.parameters()).device)
        else:
            require_whole(model)
        if checkpoints is None:
            checkpoints = session_of(model).gather() if sharded else model.state_dict()
        if precision not in _PRECISIONS:
            raise TaskError(f"unknown precision {precision!r}", wanted=", ".join(_PRECISIONS))
        try:
            torch.device(device)
        except RuntimeError as error:
            raise TaskError(
                f"there is no device {device!r}",
                wanted='"cpu", "cuda", "cuda:1" or another of torch',
            ) from error
        self.model = model
        self.checkpoints = tuple(as_checkpoints(checkpoints))
        self.measurement = as_measurement(measurement)
        self.collate = collate
        self.device = device
        self.precision = precision
        self.metric = metric
        if not self.checkpoints:
            raise TaskError("a task needs at least one checkpoint", found="an empty list")
        self._require_points()
        if not sharded and not is_spread(model):  # of these a copy may not fit
            self.checkpoints = tuple(_apart(self.checkpoints, model))
        if metric not in METRICS:
            raise TaskError(f"unknown metric {metric!r}", wanted=", ".join(METRICS))
        if metric != "euclidean":
            self._require_optimizers()

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the forward and backward pass, None for the model's own."""
        return _PRECISIONS[self.precision]

    def manifest(self) -> dict[str, Any]:
        """What identifies the task in a store: content hashes of weights and measurement."""
        parameters = {
            name: list(p.shape) for name, p in self.model.named_parameters() if p.requires_grad
        }
        return {
            **({} if self.metric == "euclidean" else {"metric": self.metric}),
            "model": {
                "class": class_of(self.model).__name__,
                "num_parameters": sum(
                    p.numel() for p in self.model.parameters() if p.requires_grad
                ),
                "parameters": parameters,
                "precision": self.precision,
            },
            "checkpoints": [self._record(index) for index in range(len(self.checkpoints))],
            "measurement": {
                "name": self.measurement.name,
                "digest": self.measurement.digest,
                "has_margin": self.measurement.has_margin,
            },
        }

    def weights(self, index: int) -> Weights:
        """Of a checkpoint, by the names of the model. Raises TaskError."""
        checkpoint = self.checkpoints[index]
        weights = without_wrapper(checkpoint.load(), self.model)
        if not checkpoint.noise:
            return weights
        return with_noise(weights, self.model, checkpoint.noise, checkpoint.noise_seed)

    def digest(self, index: int) -> str:
        """Of the weights of a checkpoint, as they are used."""
        checkpoint = self.checkpoints[index]
        return digest_of(self.weights(index) if checkpoint.noise else checkpoint.load())

    def optimizer_state(self, index: int) -> OptimizerState | None:
        """What the optimizer of a checkpoint tells; None without one. Raises TaskError."""
        given = self.checkpoints[index].load_optimizer()
        if given is None:
            return None
        state = read_state(given, self.model, self._where(index))
        if self.metric != "euclidean":
            state.require_moments(self.model, self._where(index))
        return state

    def _where(self, index: int) -> str:
        name = self.checkpoints[index].name
        return f"checkpoint {index}" + (f" ({name})" if name else "")

    def _require_points(self) -> None:
        """Raises TaskError where two state dicts are the memory of one point of training."""
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        seen: dict[Any, tuple[int, Weights]] = {}
        for index, checkpoint in enumerate(self.checkpoints):
            if not isinstance(given := checkpoint.weights, dict):
                continue
            weights = without_wrapper(given, self.model)
            places = tuple(place_of(weights[name]) for name in trained if name in weights)
            point = places, checkpoint.noise, checkpoint.noise_seed
            first, same = seen.setdefault(point, (index, given))
            if places and same is not given:
                raise TaskError(
                    "two checkpoints are state dicts of the same memory: they hold the same "
                    "weights, the last that were there",
                    where=f"{self._where(first)} and {self._where(index)}",
                    wanted="weights of different moments of training",
                    do="keep copy.deepcopy(model.state_dict()) at each of them",
                )

    def _require_optimizers(self) -> None:
        for index, checkpoint in enumerate(self.checkpoints):
            if checkpoint.optimizer is None:
                raise TaskError(
                    f"metric {self.metric!r} needs the optimizer's state of every checkpoint",
                    where=self._where(index),
                    found="no optimizer",
                    do="give tda.Checkpoint(weights, optimizer=…), saved with "
                    "torch.save(optimizer.state_dict(), path); or leave metric='euclidean'",
                )

    def _record(self, index: int) -> dict[str, Any]:
        """A checkpoint in the manifest: name, content hash, and what is known of its training."""
        checkpoint, state = self.checkpoints[index], self.optimizer_state(index)
        known: dict[str, Any] = {
            "learning_rate_sum": checkpoint.learning_rate_sum,
            "momentum": checkpoint.momentum,
            "weight_decay": checkpoint.weight_decay,
        }
        step, learning_rate = checkpoint.step, checkpoint.learning_rate
        if state is not None:
            step = state.step if step is None else step
            if learning_rate is None:
                learning_rate = state.learning_rate(self._where(index))
            for name in ("momentum", "weight_decay"):
                known[name] = getattr(state, name) if known[name] is None else known[name]
            known |= {"optimizer": state.kind, "optimizer_digest": digest_of(state.contents)}
        if checkpoint.noise:
            known |= {"noise": checkpoint.noise, "noise_of": digest_of(checkpoint.load())}
        return {
            "name": checkpoint.name or f"checkpoint-{index}",
            "step": step,
            "learning_rate": learning_rate,
            "digest": self.digest(index),
            **{name: value for name, value in known.items() if value is not None},
        }
