"""Transformers: a callback that records a training for `tda.recorded`.

trainer = Trainer(model, arguments, callbacks=[RecordingCallback("my_training", keep=100)])
trainer.train()
task = tda.Task(model, checkpoints=tda.recorded("my_training"), measurement="causal_lm")
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from tda.integrations.partner import partner
from tda.training.recorder import Recorder

_Callback: Any = partner("hf", "transformers").TrainerCallback


class RecordingCallback(_Callback):
    """A `tda.Recorder` of the model that a Trainer trains; see there for ``folder`` and ``keep``.

    part: the submodule that is attributed, by default the whole model. A training resumed from a
    checkpoint goes on with its record.
    """

    def __init__(self, folder: str | Path, keep: int | Collection[int], part: str = "") -> None:
        self._asked = folder, keep, part
        self._recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recorder is not None:  # an earlier training that did not come to its end
            self._recorder.leave()
        if state.is_world_process_zero:
            folder, keep, part = self._asked
            model = kwargs["model"].get_submodule(part)
            self._recorder = Recorder(folder, model, kwargs["optimizer"], keep, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recorder is not None:
            self._recorder.skip_to(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recorder is not None:
            self._recorder.close()
