"""Killed at any moment, the same call finishes the run: nothing lost, nothing different."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHUNK_ROWS = 16
NUM_ROWS = 120
NUM_CHUNKS = 2 * -(-NUM_ROWS // CHUNK_ROWS)  # of two checkpoints

# One batch a chunk, so that the log has one line for each chunk computed.
INDEX = f"""
import os, sys, time
import torch
from sklearn.datasets import load_digits
import tda
from tda.featurizer import Featurizer

path, log, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
first = {{name: value.clone() for name, value in model.state_dict().items()}}
second = {{name: value * 1.5 for name, value in first.items()}}
images, labels = load_digits(return_X_y=True)
data = ((images[:{NUM_ROWS}] / 16).astype("float32"), labels[:{NUM_ROWS}])
featurize = Featurizer.start

def logged(self, batch, num_examples, train=False):
    with open(log, "a") as file:
        file.write("batch\\n")
    time.sleep(pause)
    return featurize(self, batch, num_examples, train)

Featurizer.start = logged
tda.index(tda.Task(model, [first, second]), data, path, proj_dim=64, progress=False,
          batch_size={CHUNK_ROWS}, chunk_rows={CHUNK_ROWS})
"""


def start(path: Path, log: Path, pause: float) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INDEX, str(path), str(log), str(pause)]
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1])


def digests(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def num_marks(path: Path) -> int:
    return len(list(path.glob("train/done/c*.json")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder / "run", folder / "log", 0).wait(120) == 0
    return digests(folder / "run")


def kill_and_finish(tmp_path: Path, moments: list[tuple[int, float]]) -> tuple[dict, int, int]:
    """Kill when so many chunks are marked and so many seconds passed; then let it finish."""
    path, log = tmp_path / "run", tmp_path / "log"
    kills = 0
    for marks, delay in moments:
        process = start(path, log, 0.03)
        while process.poll() is None and num_marks(path) < marks:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert start(path, log, 0).wait(120) == 0
    return digests(path), len(log.read_text().splitlines()), kills


def check(tmp_path: Path, undisturbed: dict[str, str], moments: list[tuple[int, float]]) -> None:
    finished, computed, kills = kill_and_finish(tmp_path, moments)
    assert kills == len(moments), "a process ended before it was killed"
    assert computed <= NUM_CHUNKS + kills, "more than one chunk was computed again after a kill"
    assert finished == undisturbed


def test_a_run_killed_early_midway_and_late_is_byte_identical(tmp_path, undisturbed):
    check(tmp_path, undisturbed, [(1, 0.0), (NUM_CHUNKS // 2, 0.017), (NUM_CHUNKS - 1, 0.005)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_killed_five_times_at_random_is_byte_identical(tmp_path, undisturbed, seed):
    chance = random.Random(seed)
    marks = sorted(chance.randrange(0, NUM_CHUNKS) for _ in range(5))
    check(tmp_path, undisturbed, [(m, chance.random() * 0.06) for m in marks])


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    from tda.errors import StoreError
    from tda.store.lock import sole_writer

    process = start(tmp_path / "run", tmp_path / "log", 0.2)
    while not num_marks(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.005)
    with (
        pytest.raises(StoreError, match=f"process {process.pid} on "),
        sole_writer(tmp_path / "run"),
    ):
        pass
    process.kill()
    process.wait()
    with sole_writer(tmp_path / "run"):  # the lock of a killed process is no lock
        pass
