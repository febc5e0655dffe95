"""Real trainers record real trainings: their facts are those of the schedule's closed form."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tda
from tda.training.schedule import implied_damping
from tda.weights import digest_of

# Both trainers warn of what is meant here: no GPU, no loader workers, no logger.
pytestmark = pytest.mark.filterwarnings("ignore")


def checked_against(
    folder: Any, rates: list[float], weights: dict[int, Any], steps: list[int]
) -> list[tda.Checkpoint]:
    """The record of ``folder``, whose facts are those of books kept apart."""
    found = tda.recorded(folder)
    assert [checkpoint.step for checkpoint in found] == steps
    for checkpoint, step in zip(found, steps, strict=True):
        assert checkpoint.learning_rate == pytest.approx(rates[step - 1], rel=1e-9)
        assert checkpoint.learning_rate_sum == pytest.approx(sum(rates[:step]), rel=1e-9)
        assert digest_of(checkpoint.load()) == digest_of(weights[step])
    return found


class Fitted:
    """A Lightning module whose inner network is what is attributed."""

    def __new__(cls) -> Any:
        import pytorch_lightning

        class Module(pytorch_lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))

            def training_step(self, batch: Any, index: int) -> Any:
                return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.8)
                scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
                return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        return Module()


def test_lightning_records_what_it_trains(tmp_path):
    import pytorch_lightning as lightning

    from tda.integrations.lightning import RecordingCallback

    weights: dict[int, Any] = {}

    class Books(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            weights[trainer.global_step] = copy.deepcopy(module.net.state_dict())

    inputs, targets = torch.randn(16, 3), torch.arange(16) % 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), 2)

    def train(folder: str, epochs: int, **options: Any) -> Any:
        torch.manual_seed(5)
        module = Fitted()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            accumulate_grad_batches=2,  # a step is two batches
            callbacks=[RecordingCallback(tmp_path / folder, keep=3, part="net"), Books()],
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader, **options)
        trainer.save_checkpoint(tmp_path / f"{folder}-{epochs}.ckpt")
        return module

    module = train("whole", 2)
    # The scheduler steps with the optimizer: η halves after every step.
    rates = [0.1 * 0.5**step for step in range(8)]
    found = checked_against(tmp_path / "whole", rates, weights, [3, 6, 8])
    assert {c.momentum for c in found} == {0.8}
    run = tda.index(
        tda.Task(module.net, found), (inputs, targets), tmp_path / "run", progress=False
    )
    assert implied_damping(run.store.manifest["checkpoints"], 2) == pytest.approx(0.2 / sum(rates))
    assert np.isfinite(run.self_influence()).all()

    train("resumed", 1)
    train("resumed", 2, ckpt_path=tmp_path / "resumed-1.ckpt")
    again = {c.step: c for c in tda.recorded(tmp_path / "resumed")}
    assert set(again) == {3, 4, 6, 8}  # 4 was the end of the first part
    for checkpoint in found:
        same = again[checkpoint.step]
        assert same.learning_rate_sum == checkpoint.learning_rate_sum
        assert digest_of(same.load()) == digest_of(checkpoint.load())


def test_transformers_records_what_it_trains(tmp_path):
    import transformers

    from tda.integrations.transformers import RecordingCallback

    weights: dict[int, Any] = {}
    states: dict[int, Any] = {}

    class Books(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weights[state.global_step] = copy.deepcopy(kwargs["model"].state_dict())
            states[state.global_step] = copy.deepcopy(kwargs["optimizer"].state_dict())

    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 20, (12, 6), generator=random)
    texts = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens]
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip

    def train(folder: str, resume: str | None = None) -> Any:
        torch.manual_seed(6)
        model = transformers.GPT2LMHeadModel(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            weight_decay=0.1,
            save_steps=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        recording = RecordingCallback(tmp_path / folder, keep=2)
        trainer = transformers.Trainer(model, arguments, train_dataset=texts,
                                       callbacks=[recording, Books()])  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model

    model = train("record")
    rates = [1e-2 * (1 - step / 6) for step in range(6)]  # linear, no warm-up
    found = checked_against(tmp_path / "record", rates, weights, [2, 4, 6])
    task = tda.Task(model, found, measurement="causal_lm", metric="adam")
    order = states[6]["param_groups"][0]["params"] + states[6]["param_groups"][1]["params"]
    for index, step in enumerate((2, 4, 6)):
        state = task.optimizer_state(index)
        assert {m.step for m in state.moments.values()} == {step}
        kept = [states[step]["state"][key]["exp_avg_sq"].double().sum() for key in order]
        ours = [m.square.double().sum() for m in state.moments.values()]
        assert float(sum(ours)) == pytest.approx(float(sum(kept)), rel=1e-12)
        decayed = sum(p.numel() for p in model.parameters() if p.ndim == 2)
        every = sum(p.numel() for p in model.parameters())
        record = task.manifest()["checkpoints"][index]
        assert record["weight_decay"] == pytest.approx(0.1 * decayed / every)
        wanted = record["weight_decay"] + 1 / sum(rates[:step])
        assert implied_damping(task.manifest()["checkpoints"], index) == pytest.approx(wanted)
    texts_seen = [{"input_ids": row, "labels": row} for row in tokens]
    run = tda.index(
        tda.Task(model, found, measurement="causal_lm"), texts_seen, tmp_path / "run",
        proj_dim=64, progress=False,
    )  # fmt: skip
    assert [c["step"] for c in run.store.manifest["checkpoints"]] == [2, 4, 6]
    assert np.isfinite(run.self_influence("tracin")).all()

    before = [digest_of(c.load()) for c in found]
    train("record", str(tmp_path / "trainer" / "checkpoint-4"))  # takes steps 5 and 6 again
    again = tda.recorded(tmp_path / "record")
    assert [c.learning_rate_sum for c in again] == [c.learning_rate_sum for c in found]
    assert [digest_of(c.load()) for c in again] == before
    assert os.path.getsize(tmp_path / "record" / "learning_rates.f64") == 6 * 8
