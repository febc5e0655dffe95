"""Killed at any moment, the same call finishes: no more lost than one retraining a worker."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

NUM_SUBSETS = 12

RETRAIN = f"""
import sys, time
import numpy as np
import torch
import tda
from tda.evaluate import Design, ground_truth

path, log, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
X, y = np.eye(6, dtype="f4"), np.arange(6) % 2

def train(subset, seed):
    time.sleep(0.1)
    with open(log, "a") as file:
        file.write("one\\n")
    return torch.nn.Linear(6, 2)

if __name__ == "__main__":
    torch.manual_seed(0)
    task = tda.Task(torch.nn.Linear(6, 2))
    run = tda.index(task, (X, y), path, projection="identity", progress=False)
    ground_truth(run, train, (X, y), Design(num_subsets={NUM_SUBSETS}), workers=workers,
                 progress=False)
"""


def start(folder: Path, workers: int) -> subprocess.Popen:
    script = folder / "retrain.py"
    script.write_text(RETRAIN)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, str(script), str(folder / "run"), str(folder / "log"), str(workers)]
    return subprocess.Popen(command, env=environment)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_twice_it_loses_at_most_one_retraining_a_worker(tmp_path, workers):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert start(whole, 1).wait(120) == 0
    for marks in (3, 8):
        process = start(parts, workers)
        while len(list(parts.glob("run/evaluate/half/done/*-*.json"))) < marks:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(parts, workers).wait(120) == 0
    trained = len((parts / "log").read_text().splitlines())
    assert trained <= NUM_SUBSETS + 2 * workers
    place = "run/evaluate/half"
    assert digests(parts / place) == digests(whole / place)
