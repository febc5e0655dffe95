"""The same projection on a GPU, and the job that measures it there, tried on a stand-in."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tda
from tda.evaluate import tail_patch
from tda.gradients import Dense
from tda.projection import KINDS
from tda.projection.sketches import CountSketch
from tda.projection.tiles import Tile

JOBS = Path(__file__).parents[1] / "jobs"
NUM, SHAPE, DIM = 6, (300, 41), 64


def columns(device: str) -> torch.Tensor:
    """P itself: the sketch of unit gradients."""
    size = SHAPE[0] * SHAPE[1]
    sketch, units = CountSketch(DIM, 5, {"w": SHAPE}), torch.eye(size).reshape(size, *SHAPE)
    buffer = sketch.zeros(size).to(device)
    sketch.add(buffer, "w", [Dense(units.to(device))])
    return sketch.rows(buffer).cpu()


@pytest.mark.gpu
def test_the_projection_is_the_same_bytes_on_a_gpu():
    assert torch.equal(columns("cuda"), columns("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "start"), [(64, 0), (64, 13), (100, 299), (2048, 5)])
def test_one_launch_adds_what_many_operations_do(dim, start):
    """From anywhere in a parameter; and the norms that it has seen."""
    sketch = CountSketch(dim, 1, {"w": (50, 41)})
    values = torch.randn(9, 50 * 41 - start, device="cuda")
    tile, sums = Tile(start, values), torch.zeros(2, 9, 2 * dim, device="cuda")
    square = sketch.add_tile(sums[0], tile, "w")
    sketch.add_rolled(sums[1], tile, "w")
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(square, values.square().sum(1))


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_has_the_rows_of_the_cpu(tied, tmp_path):
    """One whose head is its embedding, or is not; its batches are begun one ahead."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config), torch.arange(70 * 12).reshape(70, 12) % 50
    rows, losses = {}, {}
    for device, precision in (("cpu", "float32"), ("cuda", "float32"), ("cuda:0", "bfloat16")):
        task = tda.Task(model, measurement="causal_lm", device=device, precision=precision)
        run = tda.index(
            task, {"input_ids": ids}, tmp_path / device, proj_dim=512, batch_size=8,
            dtype="float32", progress=False,
        )  # fmt: skip
        train = run.store.table("train")
        rows[device], losses[device] = train.rows(0, 0, 70), train.column("loss")
    for device, tolerance in (("cuda", 1e-4), ("cuda:0", 0.03)):
        assert float((rows[device] - rows["cpu"]).norm() / rows["cpu"].norm()) < tolerance
        assert abs(losses[device] - losses["cpu"]).max() < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_rows_of_a_gpu_are_those_of_the_cpu(precision, tolerance, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10)
    )
    data = torch.randn(40, 3, 8, 8), torch.arange(40) % 10
    rows = {}
    for device in ("cpu", "cuda"):
        task = tda.Task(model, device=device, precision=precision)
        run = tda.index(
            task, data, tmp_path / device, proj_dim=256, dtype="float32", progress=False
        )
        rows[device] = run.store.table("train").rows(0, 0, 40)
    error = (rows["cuda"] - rows["cpu"]).norm() / rows["cpu"].norm()
    assert float(error) < tolerance


class Net(nn.Module):
    """Of an outer product, a bias, a norm and a lookup; its second half may lie elsewhere."""

    def __init__(self, recurrent: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 30)
        self.up = nn.LSTM(30, 40, batch_first=True) if recurrent else nn.Linear(30, 40)
        self.norm, self.down = nn.LayerNorm(40), nn.Linear(40, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.table(ids.to(self.table.weight.device)))
        x = torch.tanh(x[0] if isinstance(x, tuple) else x)[:, 0].to(self.down.weight.device)
        return self.down(self.norm(x)).to(ids.device)


DATA = torch.arange(80).reshape(40, 2) * 7 % 50, torch.arange(40) % 3
ASKED = DATA[0][:5], DATA[1][:5]


def rows(table: str, options: dict[str, Any], model: nn.Module, path: Path, **task: Any) -> Tensor:
    run = tda.index(
        tda.Task(model, **task), DATA, path, dtype="float32", progress=False,
        **{"proj_dim": 8, **options},
    )  # fmt: skip
    if table == "curvature":
        run.add_curvature(DATA, num_rows=90, progress=False)
    stored = run.store.table(table)
    return stored.rows(0, 0, stored.num_rows)


def scaled(metric: str, model: nn.Module, path: Path, **task: Any) -> Tensor:
    optimizer, draws = torch.optim.Adam(model.parameters()), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draws).to(p)
    optimizer.step()
    state = tda.Checkpoint(model.state_dict(), optimizer=optimizer.state_dict())
    return rows("train", {}, model, path, checkpoints=state, metric=metric, **task)


def scores(recipe: str, model: nn.Module, path: Path, **task: Any) -> Tensor:
    found = tda.attribute(tda.Task(model, **task), DATA, ASKED, recipe, progress=False)
    return torch.from_numpy(found)


def smooth(model: nn.Module, path: Path, **task: Any) -> Tensor:
    copies = tda.smoothed(model.state_dict(), 2)
    return rows("train", {}, model, path, checkpoints=copies, **task)


def patched(model: nn.Module, path: Path, **task: Any) -> Tensor:
    found = np.arange(10).reshape(5, 2)
    return torch.tensor([tail_patch(tda.Task(model, **task), DATA, ASKED, found, 0.1).value])


def replayed(model: nn.Module, path: Path, device: str) -> Tensor:
    training = tda.Training(
        model=model.to(device), inputs=DATA[0], targets=DATA[1], optimizer="adam",
        batches=torch.arange(40, device=device).reshape(8, 5),
    )  # fmt: skip
    return torch.from_numpy(training.influence(ASKED, progress=False))


WAYS = {
    **{f"rows_{kind}": partial(rows, "train", {"projection": kind}) for kind in KINDS},
    "rows_curvature": partial(rows, "curvature", {}),
    **{metric: partial(scaled, metric) for metric in ("adam", "second_moment", "adam_update")},
    **{name: partial(scores, name) for name in ("grad_cos", "influence_ekfac", "influence_cg")},
    "smoothed": smooth,
    "tail_patch": patched,
    "replay": replayed,
}


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["whole", "recurrent", "spread", "autocast", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_on_a_gpu_what_it_gives_on_a_cpu(way, form, tmp_path):
    """spread: half of the model on another device, a GPU where there are two."""
    compare(way, form, tmp_path, "cuda")


def compare(way: str, form: str, path: Path, device: str) -> None:
    if way == "replay" and form in ("spread", "autocast", "bfloat16"):
        pytest.skip("a replay has one device and the precision of a float32 model")
    if way == "rows_eigenbasis" and form == "bfloat16":
        pytest.skip("which coordinates are the largest hangs on the rounding")
    torch.manual_seed(0)
    plain, found = Net(form == "recurrent"), {}
    task = {"precision": "bfloat16"} if form == "autocast" else {}
    plain = plain.bfloat16() if form == "bfloat16" else plain
    for there in ("cpu", device):
        model = copy.deepcopy(plain)
        if form == "spread" and there == "cuda":
            second = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
            model.to("cuda:0"), model.norm.to(second), model.down.to(second)
        found[there] = WAYS[way](model, path / there, device=there, **task)
    error = (found[device] - found["cpu"]).norm() / found["cpu"].norm()
    assert float(error) < (0.1 if form in ("autocast", "bfloat16") else 1e-3)


@pytest.mark.gpu
def test_data_may_lie_on_the_gpu(tmp_path):
    x, y = torch.randn(20, 6), torch.randn(20)
    found = {}
    for device in ("cpu", "cuda"):
        data = x.to(device), y.to(device)
        torch.manual_seed(0)
        task = tda.Task(nn.Linear(6, 1), measurement="squared_error", device=device)
        run = tda.index(task, data, tmp_path / device, dtype="float32", progress=False)
        found[device] = run.store.table("train").rows(0, 0, 20)
        found[device] *= torch.from_numpy(run.store.table("train").column("loss")[0])[:, None]
    torch.testing.assert_close(found["cuda"], found["cpu"])


@pytest.mark.slow
def test_the_job_runs_on_a_stand_in(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, str(JOBS / "gpu_smollm2.py"), "--tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--examples", "12", "--length", "9", "--batch-size", "4", "--repeats", "1"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(JOBS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for line, weights in zip(done.stdout.splitlines(), ("bfloat16", "float32"), strict=True):
        found = json.loads(line)
        assert found["weights"].startswith(weights)
        assert found["tokens_per_second"] > 0
        assert 0 < found["share_of_bare"] < 2
        assert found["target_met"] == {"tokens": False, "share": found["share_of_bare"] >= 0.85}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_the_job_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(JOBS / "gpu_smollm2.py")], cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
