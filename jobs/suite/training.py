"""How the networks of the suite are trained: once on everything, and again on every subset.

A `Course` says all of it. Its ``half`` trains on the subset as if there had never been more data;
its ``removal`` repeats the very batches of the whole training set and passes over what is left out,
so that, with one seed, two retrainings differ by the removed examples and by nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tda
from tda.evaluate import Ensemble
from tda.identity import source_of

Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False, kw_only=True)
class Course:
    """A network, its data and its optimiser.

    losses: ``(model, inputs, targets) -> [example]``; a step descends their mean over the batch.
    optimizer: "sgd" or "adamw". learning_rate falls linearly to a tenth over the last third.
    together: train many at once (`Ensemble`): small networks on SGD.
    num_models: independent models, seeds 0, 1, …; kept: shares of the steps of the first one after
    which a checkpoint is kept.
    """

    network: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    losses: Losses
    steps: int
    batch_size: int
    learning_rate: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    together: bool = False
    num_models: int = 10
    kept: Sequence[float] = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)

    def rate(self, step: int) -> float:
        return self.learning_rate * rate_share(step / self.steps)

    def half(self) -> Any:
        """The ``train`` of random halves."""
        return Together(self, False) if self.together else OneByOne(self, False)

    def removal(self) -> Any:
        """The ``train`` of small removals."""
        return Together(self, True) if self.together else OneByOne(self, True)

    def fresh(self, seed: int) -> nn.Module:
        """The network before its first step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network()

    def batches(self, rows: Tensor, seed: int) -> Tensor:
        """Those of ``rows`` every step sees ``[step, batch]``: in a new order each epoch."""
        random, wanted = torch.Generator().manual_seed(seed), self.steps * self.batch_size
        epochs = -(-wanted // len(rows))
        drawn = torch.cat([torch.randperm(len(rows), generator=random) for _ in range(epochs)])
        return rows[drawn[:wanted]].view(self.steps, self.batch_size)

    def recorded(self, seed: int, final: Any = None) -> tda.Training:
        """The run of a seed on everything, to be followed back; ``final``: what it ended with."""

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return self.losses(_Given(outputs), outputs, targets).mean()

        return tda.Training(
            model=self.fresh(seed),
            inputs=self.inputs,
            targets=self.targets,
            batches=self.batches(torch.arange(len(self.targets)), seed),
            loss=loss,
            optimizer=self.optimizer,
            learning_rate=self.rate,
            momentum=self.momentum if self.optimizer == "sgd" else 0.0,
            weight_decay=self.weight_decay,
            final=final,
        )

    @property
    def digest(self) -> str:
        """Changes with the numbers above."""
        numbers = (self.steps, self.batch_size, self.learning_rate, self.optimizer)
        parts = [repr((*numbers, self.momentum, self.weight_decay))]
        parts.append(source_of(rate_share))
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def rate_share(time: float) -> float:
    """Share of the learning rate at a share of the training: 1, then down to .1 from 2/3 on."""
    return 1 - 0.9 * max(0.0, 3 * time - 2)


@dataclass(frozen=True, eq=False)
class Together:
    """``train`` of a course for `Ensemble`'s many networks at once."""

    course: Course
    whole_order: bool
    group: int = 32

    @property
    def digest(self) -> str:
        return f"{self.course.digest}-{'removal' if self.whole_order else 'half'}-{self.group}"

    def __call__(self, subset: np.ndarray, seed: int) -> nn.Module:
        return self.many([(subset, seed)])[0]

    def many(
        self, given: Sequence[tuple[np.ndarray, int]], steps: int | None = None
    ) -> list[nn.Module]:
        """The networks of (subset, seed) pairs, after all steps or the first few."""
        return self._ensemble(steps or self.course.steps).many(given)

    def _ensemble(self, steps: int) -> Ensemble:
        course = self.course

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return course.losses(_Given(outputs), outputs, targets).mean()

        return Ensemble(
            model=course.network,
            inputs=course.inputs,
            targets=course.targets,
            steps=steps,
            batch_size=course.batch_size,
            learning_rate=course.rate,
            momentum=course.momentum,
            weight_decay=course.weight_decay,
            loss=loss,
            group=self.group,
            keep_order=self.whole_order,
        )


class _Given(nn.Module):
    """A "model" whose output is known: for the losses of outputs that were computed elsewhere."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outputs


@dataclass(frozen=True, eq=False)
class OneByOne:
    """``train(subset, seed)`` of a course, one network at a time, with torch's own optimisers."""

    course: Course
    whole_order: bool

    @property
    def digest(self) -> str:
        return f"{self.course.digest}-{'removal' if self.whole_order else 'half'}"

    def __call__(self, subset: np.ndarray, seed: int) -> nn.Module:
        *_, (_, model, _) = self.steps(subset, seed)
        return model

    def steps(
        self, subset: np.ndarray, seed: int
    ) -> Iterator[tuple[int, nn.Module, torch.optim.Optimizer]]:
        """(steps taken, model, optimiser) after each step."""
        course = self.course
        model = course.fresh(seed)
        optimizer = optimizer_of(course, model)
        inside = torch.zeros(len(course.targets), dtype=torch.bool)
        inside[torch.from_numpy(subset)] = True
        followed = np.arange(len(course.targets)) if self.whole_order else subset
        for step, rows in enumerate(course.batches(torch.from_numpy(followed), seed)):
            for group in optimizer.param_groups:
                group["lr"] = course.rate(step)
            optimizer.zero_grad()
            rows = rows[inside[rows]]
            losses = course.losses(model, course.inputs[rows], course.targets[rows])
            (losses.sum() / course.batch_size).backward()
            optimizer.step()
            yield step + 1, model, optimizer


def optimizer_of(course: Course, model: nn.Module) -> torch.optim.Optimizer:
    weights, decay = model.parameters(), course.weight_decay
    if course.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=course.learning_rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(
        weights, lr=course.learning_rate, momentum=course.momentum, weight_decay=decay
    )


class Lazily:
    """The ``train`` of a course made when first asked for: importing a job reads no data."""

    def __init__(self, make: Callable[[], Course], protocol: str = "half") -> None:
        self.make, self.protocol = make, protocol

    def made(self) -> Any:
        return getattr(self.make(), self.protocol)()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what pickle and inspect look for is not the course's
            raise AttributeError(name)
        return getattr(self.made(), name)

    def __call__(self, subset: np.ndarray, seed: int) -> nn.Module:
        return self.made()(subset, seed)


def checkpoints(course: Course, run_path: str | Path, which: str = "last") -> list[tda.Checkpoint]:
    """The checkpoints of a task, trained first where ``run_path`` has none.

    which: "last": the finished model of seed 0; "path": that run at ``kept`` moments; "models": the
    finished models of all seeds.
    """
    folder = Path(run_path) / "checkpoints"
    index = folder / "index.json"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        kept = _train_together(course, folder) if course.together else _train(course, folder)
        index.write_text(json.dumps(kept, indent=1) + "\n")
    kept = json.loads(index.read_text())
    chosen = {
        "last": [k for k in kept if k["seed"] == 0 and k["step"] == course.steps],
        "path": [k for k in kept if k["seed"] == 0],
        "models": [k for k in kept if k["step"] == course.steps],
    }[which]
    return [_checkpoint(course, folder, k) for k in chosen]


def _checkpoint(course: Course, folder: Path, kept: dict[str, Any]) -> tda.Checkpoint:
    file = folder / kept["file"]
    adam = {"optimizer": file} if course.optimizer == "adamw" else {"momentum": course.momentum}
    return tda.Checkpoint(
        file,
        step=kept["step"],
        learning_rate=course.rate(kept["step"] - 1),
        learning_rate_sum=sum(course.rate(step) for step in range(kept["step"])),
        weight_decay=course.weight_decay,
        name=file.stem,
        **adam,
    )


def _moments(course: Course) -> list[int]:
    return sorted({max(1, round(share * course.steps)) for share in course.kept})


def _train_together(course: Course, folder: Path) -> list[dict[str, Any]]:
    every, kept = np.arange(len(course.targets)), []
    for step in _moments(course):
        seeds = range(course.num_models if step == course.steps else 1)
        models = course.removal().many([(every, seed) for seed in seeds], step)
        for seed, model in zip(seeds, models, strict=True):
            file = f"seed-{seed}-step-{step:06}.safetensors"
            save_file(model.state_dict(), folder / file)
            kept.append({"file": file, "seed": seed, "step": step})
    return kept


def _train(course: Course, folder: Path) -> list[dict[str, Any]]:
    every, kept = np.arange(len(course.targets)), []
    moments = set(_moments(course))
    for seed in range(course.num_models):
        for step, model, optimizer in course.removal().steps(every, seed):
            if step == course.steps or (seed == 0 and step in moments):
                file = f"seed-{seed}-step-{step:06}.pt"
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, folder / file)
                kept.append({"file": file, "seed": seed, "step": step})
    return kept
