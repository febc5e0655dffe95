"""Keeps, while a model trains, what attribution needs to know of it later.

    with tda.Recorder("my_training", model, optimizer, keep=100):
        ...                                              # any loop that calls optimizer.step()
    task = tda.Task(model, checkpoints=tda.recorded("my_training"))

A folder holds one training:

    recording.json       what was kept, in the order of training
    learning_rates.f64   η_t of every step, float64 little-endian, written as the step is taken
    step-00000100.pt     the state dict; and where the optimizer is Adam, its moments
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tda.errors import TaskError
from tda.layout import bare, sharded_by
from tda.task import Checkpoint
from tda.training.optimizer import OptimizerState, read_state

FORMAT = 1
_INDEX, _RATES = "recording.json", "learning_rates.f64"
_PLAIN = (bool, int, float, str, type(None), Tensor)


class Recorder:
    """Follows an optimizer, and keeps the model after some of its steps.

    keep: every so many steps, or the steps meant; the last one always (`close`, or the end of a
    ``with`` block). start: steps taken before, of a training that goes on from its checkpoint: what
    was recorded after it is dropped, as those steps are taken again.

    η_t is read after each ``optimizer.step()``, before a scheduler changes it; where groups have
    several it is their mean over the trained numbers, as weight decay is. For another optimizer
    than torch's SGD, Adam and AdamW, momentum and moments stay unknown.

    One process holds the whole model and its optimizer: in data-parallel training, record in one.
    Raises TaskError where the folder holds another training, or the optimizer does not train the
    model.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep: int | Collection[int],
        start: int = 0,
    ) -> None:
        if not isinstance(keep, int | Collection) or (isinstance(keep, int) and keep < 1):
            wanted = "1 or more, or the steps meant"
            raise TaskError("keep is not a number of steps", found=repr(keep), wanted=wanted)
        self.folder = Path(folder)
        self._model = bare(model)
        self._require_whole(optimizer)
        self._optimizer = _unwrapped(optimizer)
        self._keep = keep
        self._state()  # what does not fit is said before training, not after
        self._kept, self._rates = self._earlier(start)
        self._write_index()
        self._file = (self.folder / _RATES).open("ab", buffering=0)
        self._hook = self._optimizer.register_step_post_hook(lambda *_: self._took(self._rate()))

    def _require_whole(self, optimizer: Any) -> None:
        """Raises TaskError where a process holds but a part of the model, or of its optimizer."""
        by = sharded_by(self._model)
        if by is None and type(optimizer).__module__.startswith("deepspeed"):
            by = "DeepSpeed ZeRO"
        if by is not None:
            raise TaskError(
                "a training is recorded where model and optimizer are whole",
                where=self.folder,
                found=f"a training sharded by {by}",
                do="keep checkpoints yourself: at each step that counts let all processes "
                "call torch's get_state_dict(model, optimizer, options=StateDictOptions("
                "full_state_dict=True, cpu_offload=True)) (of DeepSpeed: save_checkpoint, then "
                "zero_to_fp32.py), one of them torch.save both, and give tda.Checkpoint(weights, "
                "step=…, learning_rate_sum=…, optimizer=…)",
            )

    @property
    def step(self) -> int:
        """Steps so far."""
        return len(self._rates)

    def skip_to(self, step: int) -> None:
        """Count steps that a trainer counts and did not take (gradients overflowed): η_t = 0."""
        while self.step < step:
            self._took(0.0)

    def save(self) -> None:
        """Keep the model as it is now."""
        if self._kept and self._kept[-1]["step"] == self.step:
            return
        state, file = self._state(), f"step-{self.step:08}.pt"
        about = None if state is None else _known(state, self._model)
        content: dict[str, Any] = {"model": self._model.state_dict()}
        if about is not None and about.kind == "adam":
            content["optimizer"] = state
        _replace(self.folder / file, lambda path: torch.save(content, path))
        self._kept.append(
            {
                "file": file,
                "step": self.step,
                "learning_rate": self._rates[-1] if self._rates else None,
                "learning_rate_sum": math.fsum(self._rates),
                "momentum": None if about is None else about.momentum,
                "weight_decay": None if about is None else about.weight_decay,
                "moments": "optimizer" in content,
            }
        )
        self._write_index()

    def close(self) -> None:
        """Keep the last step, and follow no longer."""
        if not self._file.closed:
            self.save()
        self.leave()

    def leave(self) -> None:
        """Follow no longer, and keep nothing more."""
        self._hook.remove()
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.leave() if kind else self.close()

    def _took(self, rate: float) -> None:
        self._rates.append(rate)
        self._file.write(array("d", [rate]).tobytes())
        due = self.step % self._keep == 0 if isinstance(self._keep, int) else (
            self.step in self._keep
        )  # fmt: skip
        if due:
            self.save()

    def _rate(self) -> float:
        """η of the step just taken."""
        rates = [float(group["lr"]) for group in self._groups()]
        if len(set(rates)) == 1:
            return rates[0]
        names = self._names()
        sizes = [sum(p.numel() for p in g["params"] if id(p) in names) for g in self._groups()]
        return sum(r * s for r, s in zip(rates, sizes, strict=True)) / sum(sizes)

    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self._model.named_parameters()}

    def _state(self) -> dict[str, Any] | None:
        """The optimizer's state of the model's parameters, with their names.

        None where `read_state` cannot use it. Raises TaskError naming a parameter that it lacks.
        """
        names, given = self._names(), self._optimizer.state_dict()
        groups: list[dict[str, Any]] = []
        state: dict[Any, Any] = {}
        for group, own in zip(given["param_groups"], self._groups(), strict=True):
            keys = [
                (key, names[id(parameter)])
                for key, parameter in zip(group["params"], own["params"], strict=True)
                if id(parameter) in names
            ]
            settings = {name: value for name, value in group.items() if _is_plain(value)}
            of_model = {"params": [k for k, _ in keys], "param_names": [name for _, name in keys]}
            groups += [{**settings, **of_model}] if keys else []
            state |= {k: given["state"][k] for k, _ in keys if k in given["state"]}
        held = {name for group in groups for name in group["param_names"]}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and name not in held:
                raise TaskError(
                    f"the optimizer does not train parameter {name!r}",
                    where=self.folder,
                    wanted="all parameters with requires_grad=True, as the model holds them",
                    do="give the model and the optimizer of this training, whole (not sharded over "
                    "processes); what is not trained takes no part with requires_grad_(False)",
                )
        found = {"state": state, "param_groups": groups}
        return found if _known(found, self._model) else None

    def _earlier(self, start: int) -> tuple[list[dict[str, Any]], array[float]]:
        """What the folder holds of the first ``start`` steps. Raises TaskError."""
        rates = array("d")
        file, index = self.folder / _RATES, self.folder / _INDEX
        written = file.read_bytes() if file.is_file() else b""
        taken = len(written) // rates.itemsize
        if not start and taken:
            raise TaskError(
                "this folder holds the record of another training",
                where=self.folder,
                found=f"{taken} steps",
                do="choose another folder, remove this one, or go on with it: start= the steps "
                "that the checkpoint you resume from has taken",
            )
        if start > taken:
            raise TaskError(
                "the record does not reach the step that training goes on from",
                where=self.folder,
                found=f"{taken} steps",
                wanted=f"at least {start}",
                do="give the folder that this training was recorded in from its first step",
            )
        rates.frombytes(written[: start * rates.itemsize])
        kept = _read(self.folder)["checkpoints"] if start and index.exists() else []
        _replace(file, lambda path: path.write_bytes(rates.tobytes()))
        return [each for each in kept if each["step"] <= start], rates

    def _write_index(self) -> None:
        about = {
            "format": FORMAT,
            "model": type(self._model).__name__,
            "optimizer": type(self._optimizer).__name__,
            "torch": torch.__version__.partition("+")[0],
            "checkpoints": self._kept,
        }
        text = json.dumps(about, indent=1) + "\n"
        _replace(self.folder / _INDEX, lambda path: path.write_text(text, encoding="utf-8"))


def recorded(folder: str | Path) -> list[Checkpoint]:
    """The checkpoints that a `Recorder` kept, in the order of training, for `tda.Task`.

    Those of several trainings: ``tda.recorded("seed-0") + tda.recorded("seed-1")``.
    Raises TaskError where the folder holds no record, or nothing was kept.
    """
    folder = Path(folder)
    kept = _read(folder)["checkpoints"]
    if not kept:
        raise TaskError(
            "nothing was kept of this training",
            where=folder,
            do="train until a step that `keep` means, or to the end",
        )
    return [
        Checkpoint(
            folder / each["file"],
            name=Path(each["file"]).stem,
            optimizer=folder / each["file"] if each["moments"] else None,
            **{name: each[name] for name in _FACTS},
        )
        for each in kept
    ]


_FACTS = ("step", "learning_rate", "learning_rate_sum", "momentum", "weight_decay")


def _read(folder: Path) -> dict[str, Any]:
    """The index of a recording. Raises TaskError."""
    path, wanted = folder / _INDEX, {"file", "moments", *_FACTS}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sound = found["format"] == FORMAT and all(wanted <= set(c) for c in found["checkpoints"])
    except FileNotFoundError as error:
        raise TaskError(
            "there is no record of a training",
            where=folder,
            wanted=f"a folder with {_INDEX}, written by tda.Recorder",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        sound, found = False, error
    if not sound:
        raise TaskError(
            "the record of this training cannot be read",
            where=path,
            found=found if isinstance(found, Exception) else f"format {found.get('format')!r}",
            wanted=f"format {FORMAT}, as tda.Recorder writes it",
            do="restore the file from a copy, or name the checkpoints one by one",
        )
    return found


def _known(state: Mapping[str, Any], model: nn.Module) -> OptimizerState | None:
    """What the state tells; None where the optimizer is not one of those that are understood."""
    try:
        return read_state(state, model, "the optimizer")
    except TaskError:
        return None


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, within those of accelerate and its like."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` gives it back."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write(partial)`` make a file, and put it in its place, whole. Raises TaskError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise TaskError(
            "the training could not be recorded",
            where=path,
            found=getattr(error, "strerror", None) or error,
            do="free some space or choose another folder; `start=` goes on from a checkpoint",
        ) from error
