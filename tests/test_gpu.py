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
