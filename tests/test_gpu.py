"""The same projection on a GPU, and the job that measures it there, tried on a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tda
from tda.gradients import Dense
from tda.projection.sketches import CountSketch

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


@pytest.mark.slow
def test_the_job_runs_on_a_stand_in(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, str(JOBS / "gpu_smollm2.py"), "--tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--examples", "12", "--length", "9", "--batch-size", "4"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(JOBS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
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
