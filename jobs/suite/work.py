"""What a task of the suite consists of: its data, and how its network is trained and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import tda
from tda.code import load_code
from tda.measurements import Measurement

HERE = Path(__file__).parent
Course = load_code("training.py:Course", HERE)
Lazily = load_code("training.py:Lazily", HERE)
checkpoints_of = load_code("training.py:checkpoints", HERE)
network_of = load_code("networks.py:network", HERE)
losses_of = load_code("networks.py:losses", HERE)


Measured = str | Callable[..., Any] | Measurement


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """A task of the suite, and a quick trial of everything that has fewer of all.

    data: "input", "target" and other columns of the training examples, then of the queries.
    num_train, num_queries: of it, in the trial ``trial_sizes``. measurement: what is attributed;
    output: what D-TRAK differentiates in place of it. training: of the `Course`; trial_training:
    what is another in the trial. initial: makes the network before its first step, where that is
    not torch's. truth: num_halves, num_seeds, num_removals, and removed, the share of a removal.
    """

    name: str
    data: Callable[[], Mapping[str, Any]]
    num_train: int
    num_queries: int
    trial_sizes: tuple[int, int] = (200, 20)
    measurement: Measured
    training: Mapping[str, Any]
    trial_training: Mapping[str, Any]
    output: Measured | None = None
    initial: Callable[[], nn.Module] | None = None
    truth: Mapping[str, float] = field(default_factory=dict)

    def course(self, quick: bool = False) -> Any:
        """The training of one network."""
        data = self.train_set(quick)
        return Course(
            network=self.initial or partial(network_of, self.name),
            inputs=data["input"],
            targets=data["target"],
            losses=partial(losses_of, self.name),
            **{**self.training, **(self.trial_training if quick else {})},
        )

    def task(self, run_path: str, checkpoints: str = "last", quick: bool = False) -> tda.Task:
        """checkpoints: "last", "path" (one run) or "models" (independent seeds)."""
        given = checkpoints_of(self.course(quick), run_path, checkpoints)
        model = network_of(self.name)
        return tda.Task(model, checkpoints=given, measurement=self.measurement)

    def train_set(self, quick: bool = False) -> dict[str, Any]:
        return self._examples("train", 0, self.trial_sizes[0] if quick else self.num_train)

    def test_set(self, quick: bool = False) -> dict[str, Any]:
        number = self.trial_sizes[1] if quick else self.num_queries
        return self._examples("query", self.num_train, number)

    @property
    def train(self) -> Any:
        """(subset, seed) -> the network trained on the subset, for `tda evaluate`."""
        return Lazily(self.course)

    @property
    def train_removal(self) -> Any:
        """The same for small removals from the run that is attributed."""
        return Lazily(self.course, "removal")

    def _examples(self, kind: str, start: int, number: int) -> dict[str, Any]:
        part = {name: column[start : start + number] for name, column in self.data().items()}
        return {**part, "id": [f"{kind}-{i:05}" for i in range(number)]}
