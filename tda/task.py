"""What the user brings: a model, its checkpoints, and what to measure."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tda.data import Collate
from tda.errors import TaskError
from tda.measurements import as_measurement

Weights = Mapping[str, Tensor]
_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """Weights at one moment of training.

    weights: a state dict, or the path of a ``.pt``/``.pth`` (loaded with ``weights_only=True``) or
    ``.safetensors`` file; a dict in the file may hold them under ``model`` or ``state_dict``.
    step, learning_rate: of training at that moment; TracIn needs the learning rate.
    """

    weights: Weights | str | Path
    step: int | None = None
    learning_rate: float | None = None
    name: str | None = None

    def load(self) -> Weights:
        """The state dict. Raises TaskError naming the file if it cannot be had."""
        if isinstance(self.weights, Mapping):
            return self.weights
        path = Path(self.weights)
        if not path.is_file():
            raise TaskError(
                "a checkpoint is missing", where=path, do="check the path, or train the model first"
            )
        try:
            loaded = _read(path)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise TaskError(
                "a checkpoint cannot be read",
                where=path,
                found=(str(error).splitlines() or [type(error).__name__])[0],
                wanted="a state dict of tensors (files that carry code are not loaded)",
                do="save it with torch.save(model.state_dict(), path) or as safetensors",
            ) from error
        for key in ("model", "state_dict"):
            if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
        return loaded


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def digest_of(weights: Weights) -> str:
    """Hex digest of the names, types, shapes and bytes of a state dict."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


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


class Task:
    """A model, its checkpoints and a measurement: everything a gradient depends on but the data.

    model: any ``nn.Module``; parameters with ``requires_grad=False`` are left out. It is copied,
    put in eval mode, and never changed.
    checkpoints: state dicts, paths, or `Checkpoint` values, in the order of training; by default
    the weights the model has now.
    measurement: the name of one of `tda.MEASUREMENTS`, a `Measurement`, or any callable
    ``(model, batch) -> loss [example]``.
    collate: from a list of examples to a batch, for data that cannot be stacked as it is.
    precision: "float32" (the model's own) or "bfloat16" (autocast) for the forward and backward.

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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TaskError(
                "the model is not a torch module",
                found=type(model).__name__,
                wanted="an nn.Module",
            )
        given = [model.state_dict()] if checkpoints is None else checkpoints
        if isinstance(given, str | Path | Mapping | Checkpoint):
            given = [given]
        if precision not in _PRECISIONS:
            raise TaskError(f"unknown precision {precision!r}", wanted=", ".join(_PRECISIONS))
        self.model = model
        self.checkpoints = tuple(_as_checkpoint(c, i) for i, c in enumerate(given))
        self.measurement = as_measurement(measurement)
        self.collate = collate
        self.device = device
        self.precision = precision
        if not self.checkpoints:
            raise TaskError("a task needs at least one checkpoint", found="an empty list")

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
            "model": {
                "class": type(self.model).__name__,
                "num_parameters": sum(
                    p.numel() for p in self.model.parameters() if p.requires_grad
                ),
                "parameters": parameters,
                "precision": self.precision,
            },
            "checkpoints": [
                checkpoint_manifest(c, index) for index, c in enumerate(self.checkpoints)
            ],
            "measurement": {
                "name": self.measurement.name,
                "digest": self.measurement.digest,
                "has_margin": self.measurement.has_margin,
            },
        }


def checkpoint_manifest(checkpoint: Checkpoint, index: int) -> dict[str, Any]:
    """name, step, learning rate and content hash of a checkpoint."""
    return {
        "name": checkpoint.name or f"checkpoint-{index}",
        "step": checkpoint.step,
        "learning_rate": checkpoint.learning_rate,
        "digest": digest_of(checkpoint.load()),
    }
