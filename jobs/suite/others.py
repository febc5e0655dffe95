"""The peers: which of their methods are asked, their environments, and what they are given.

Each runs as a script of jobs/peers in an environment of its own under data/peers/, made on first
use from the pinned jobs/peers/PEER.txt.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

PEERS = Path(__file__).resolve().parents[1] / "peers"
ENVIRONMENTS = Path("data/peers")
SCRIPTS = {
    "traker": "traker_trak.py",
    "dattri": "dattri_methods.py",
    "kronfluence": "kronfluence_ekfac.py",
    "captum": "tracincp.py",
}
# (peer, method, damping, checkpoints, how many of them)
METHODS = (
    ("kronfluence", "ekfac", "1e-8, its default", "last", 1),
    ("kronfluence", "ekfac λ=0.1·mean", "0.1 × mean, its heuristic", "last", 1),
    ("kronfluence", "ekfac λ=0.1·mean", "0.1 × mean, its heuristic", "models", 5),
    ("kronfluence", "ekfac λ=0.1·mean", "0.1 × mean, its heuristic", "models", 10),
    ("traker", "trak", "0, its default", "last", 1),
    ("traker", "trak", "0, its default", "models", 5),
    ("traker", "trak k=512", "0, its default", "last", 1),
    ("traker", "trak k=512", "0, its default", "models", 5),
    ("dattri", "ekfac", "0, its default", "last", 1),
    ("captum", "tracin", "–", "path", 6),
    ("dattri", "trak", "0, its default", "last", 1),
    ("dattri", "trak", "0, its default", "models", 5),
    ("dattri", "tracin", "–", "path", 6),
    ("dattri", "ekfac λ=1e-3", "0.001", "last", 1),
)
MORE_METHODS = (
    ("traker", "trak", "0, its default", "models", 10),
    ("dattri", "trak k=2048", "0, its default", "last", 1),
    ("dattri", "trak", "0, its default", "models", 10),
    ("dattri", "if_cg", "0.01", "last", 1),
    ("dattri", "if_arnoldi", "0.01", "last", 1),
    ("dattri", "if_datainf", "0.01", "last", 1),
)


def command(bundle: Path, cell: Any) -> list[str]:
    """What runs a cell; where its result goes comes last."""
    python = environment_of(cell.peer)
    script = PEERS / SCRIPTS[cell.peer]
    about = [str(bundle), cell.method, cell.checkpoints, str(cell.number)]
    return [str(python), str(script), *about]


def environment_of(peer: str) -> Path:
    """The interpreter of a peer's environment, which is made first where there is none."""
    folder = ENVIRONMENTS / peer
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {peer} into {folder}/", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pinned = PEERS / f"{peer}.txt"
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "-r", str(pinned)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise OSError(f"{peer} cannot be installed: {last_words(done.stderr)}")
        (folder / "ready").touch()
    return python


def bundle(work: Any, path: Path, quick: bool) -> Path:
    """What every peer is given (see jobs/peers/bundle.py), written once."""
    folder = path / "bundle"
    if (folder / "about.json").exists():
        return folder
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    given: dict[str, list[dict[str, Any]]] = {}
    for which in ("last", "path", "models"):
        given[which] = []
        for checkpoint in work.task(str(path), which, quick).checkpoints:
            file = f"checkpoints/{checkpoint.name}.pt"
            torch.save(dict(checkpoint.load()), folder / file)
            given[which].append({"file": file, "learning_rate": checkpoint.learning_rate})
    arrays: dict[str, Any] = {
        f"{name}_{part}s": np.asarray(data[part])
        for name, data in (("train", work.train_set(quick)), ("query", work.test_set(quick)))
        for part in ("input", "target")
    }
    np.savez(folder / "data.npz", **arrays)
    shutil.copy(Path(__file__).with_name("networks.py"), folder)
    (folder / "about.json").write_text(json.dumps({"task": work.name, "checkpoints": given}))
    return folder


def last_words(stderr: str, returncode: int = 1) -> str:
    """Why a process failed, in one line: what killed it, its last "SomeError: …", or its last line,
    a warning's only where there is no other."""
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    lines = [line.rstrip() for line in stderr.splitlines() if line.strip()]
    said = [line for line in lines if not line[0].isspace() and "Warning: " not in line]
    errors = [line for line in said if re.match(r"[\w.]*(Error|Exception|Interrupt)(: |$)", line)]
    return (errors or said or lines or ["it ended without a word"])[-1].strip()[:200]
