"""Lightning: a callback that records a training for `tda.recorded`.

trainer = L.Trainer(callbacks=[RecordingCallback("my_training", keep=100)])
trainer.fit(module, loader)
task = tda.Task(module, checkpoints=tda.recorded("my_training"))
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tda.errors import TaskError
from tda.integrations.partner import partner
from tda.training.recorder import Recorder

# Lightning has two names, and they share no class: the one in use, or else the newer.
_NAMES = sorted(
    ("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules
)
_Callback: Any = partner("lightning", *_NAMES).Callback


class RecordingCallback(_Callback):
    """A `tda.Recorder` of the module that a Trainer fits; see there for ``folder`` and ``keep``.

    part: the submodule that is attributed ("net"), by default the whole module. A training resumed
    from a checkpoint goes on with its record. Raises TaskError for several optimizers.
    """

    def __init__(self, folder: str | Path, keep: int | Collection[int], part: str = "") -> None:
        super().__init__()
        self._asked = folder, keep, part
        self._recorder: Recorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if len(trainer.optimizers) != 1:
            raise TaskError(
                "a record is of one optimizer",
                where=type(pl_module).__name__,
                found=f"{len(trainer.optimizers)} optimizers",
                do="record by hand: one tda.Recorder an optimizer, in folders of their own",
            )
        folder, keep, part = self._asked
        model = pl_module.get_submodule(part)
        self._recorder = Recorder(folder, model, trainer.optimizers[0], keep, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        if self._recorder is not None:
            self._recorder.skip_to(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._recorder is not None:
            self._recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._recorder is not None:
            self._recorder.leave()
