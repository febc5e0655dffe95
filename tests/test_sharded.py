"""A model that FSDP2 has spread over two processes is indexed and asked as it would be whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sharded_run
import torch
import torch.distributed as dist
from sharded_run import TRAIN, Adapted, InPlace, Recurrent, Transformer, X, Y, log_loss, made
from torch import Tensor, nn
from typer.testing import CliRunner
from workload_file import CONFIG

import tda
from tda.cli import app
from tda.gradients.sharded.session import is_open

SCRIPT = Path(sharded_run.__file__)
LIMIT = 600  # seconds, of processes that hang


def spawned(folder: Path, world: int) -> list[subprocess.Popen]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, str(rank), str(world)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a pair of processes has found."""
    folder = tmp_path_factory.mktemp("pair")
    pair = spawned(folder, 2)
    try:
        said = [process.communicate(timeout=LIMIT)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], "\n".join(said)
    return torch.load(folder / "found.pt", weights_only=False)


def entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def slopes(model: nn.Module) -> Tensor:
    """ℓ'(f) = −(1 − p) of f = log(p/(1 − p)), the rows of cross entropy being ∇f."""
    with torch.no_grad():
        return -(1 - torch.exp(-entropy(model, (X, Y))))


def gradients(kind: Callable[[], nn.Module]) -> Tensor:
    """∇ℓ_i ``[example, parameter]`` of the whole model, by plain autograd."""
    model = made(kind).eval()
    texts = kind is Transformer
    examples = (
        [(x[None],) for (x,) in TRAIN] if texts else list(zip(X.split(1), Y.split(1), strict=True))
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for example in examples:
        loss = (log_loss if texts else entropy)(model, example).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    stacked = torch.stack(rows)
    return stacked if texts else stacked / slopes(model)[:, None]


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("kept after forward", Transformer),
        ("given back", Transformer),
        ("each layer", Transformer),
        ("adapted", Adapted),
        ("in place", InPlace),
    ],
)
def test_rows_are_those_of_the_whole_model(
    found: dict[str, Any], layout: str, kind: Callable[[], nn.Module]
) -> None:
    rows, path = found[layout]
    assert path == "tap"
    torch.testing.assert_close(rows, gradients(kind), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_separated_is_looped_over_in_step(found: dict[str, Any]) -> None:
    rows, path = found["recurrent"]
    assert path == "loop"
    torch.testing.assert_close(rows, gradients(Recurrent), rtol=1e-4, atol=1e-5)


def test_in_the_precision_of_the_shards_policy_rows_are_near(found: dict[str, Any]) -> None:
    rows, path = found["bfloat16"]
    wanted = gradients(Transformer)
    assert path == "tap"
    assert not torch.equal(rows, wanted)
    assert (rows - wanted).norm(dim=1).div(wanted.norm(dim=1)).max() < 0.1


def test_processes_divide_a_batch_by_example(found: dict[str, Any]) -> None:
    """As evenly as can be; an error in one of them is the leader's, and they go on."""
    divided = found["divided"]
    assert divided["ranks of 5"] == [0, 0, 1, 1, 1]
    assert divided["ranks of 2"] == [0, 1]
    assert divided["ranks of 1"] == [0]
    assert divided["said"] == "ValueError: on rank 1"
    log_odds = torch.special.logit(torch.exp(-entropy(made(Adapted), (X, Y))))
    torch.testing.assert_close(divided["outputs"], log_odds, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", sharded_run.RECIPES)
def test_scores_are_those_of_the_whole_model(
    found: dict[str, Any], whole_scores: dict[str, np.ndarray], recipe: str
) -> None:
    wanted = whole_scores[recipe]
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found["scores"][recipe], wanted, rtol=1e-3, atol=1e-4 * scale)


@pytest.fixture(scope="module")
def whole_scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The same questions to a model that is whole."""
    return sharded_run.queries_of(made(Transformer), tmp_path_factory.mktemp("whole"))


def test_a_run_goes_on_where_an_error_has_stopped_it(found: dict[str, Any]) -> None:
    """The leader's error comes out, the other process is let go, and both begin anew."""
    resumed = found["resumed"]
    assert "stopped" in resumed["said"]
    assert 0 < len(resumed["missing"]) < 4
    torch.testing.assert_close(resumed["rows"], gradients(Transformer), rtol=1e-4, atol=1e-5)


def test_afterwards_the_model_is_as_it_was_and_trains_on(found: dict[str, Any]) -> None:
    assert found["as it was"]
    np.testing.assert_allclose(found["losses"], sharded_run.steps(made(Transformer)), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("a task outside", "no tda.lead around this call"),
        ("an index outside", "no tda.lead around this call"),
        ("a whole model", "the model is whole in this process"),
        ("no function", "a model and a function"),
        ("a root that is whole", "call fully_shard\\(model\\) on the model as a whole"),
        ("lead in lead", "open already"),
        ("another model", "another model than that of tda.lead"),
        ("other weights", "missing .*unexpected \\['w'\\]"),
        ("conjugate gradients", "influence_gn"),
        ("workers", "does not leave the processes"),
        ("a bad measurement", "does not give one scalar an example"),
    ],
)
def test_what_cannot_be_is_refused_by_name(found: dict[str, Any], call: str, said: str) -> None:
    """By the leader alone, and whoever follows is none the worse: what came after went well."""
    assert re.search(said, found["refusals"][call], re.DOTALL), found["refusals"].get(call)


JOB = """
import os
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import tda

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1) > 0).long()

def task():
    if "RANK" in os.environ and not dist.is_initialized():
        store = dist.FileStore(os.environ["STORE"], int(os.environ["WORLD_SIZE"]))
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(2)
    model = torch.nn.Linear(6, 2)
    weights = model.state_dict()
    return tda.Task(fully_shard(model) if dist.is_initialized() else model, weights)

def train():
    return {"input": X[:33], "target": Y[:33]}

def test():
    return {"input": X[33:], "target": Y[33:]}
"""


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """A configuration whose task shards its model where processes are connected."""
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "workload.toml").write_text(CONFIG.format(path=tmp_path / "run"))
    return tmp_path / "workload.toml"


def scores_of(path: Path) -> np.ndarray:
    return np.asarray(tda.open(path).scores("test", recipe="grad_dot"))


def test_a_command_leads_where_its_task_is_sharded(tmp_path: Path, workload: Path) -> None:
    """And lets go as it ends: the next can, and what is whole needs nobody."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for command in ("index", "verify"):
            given = [command, str(workload), *(["--deep"] if command == "verify" else [])]
            done = CliRunner().invoke(app, given)
            assert done.exit_code == 0, done.output
            assert not is_open()
    finally:
        dist.destroy_process_group()
    sharded = scores_of(tmp_path / "run")
    path = tmp_path / "whole"
    done = CliRunner().invoke(app, ["index", str(workload), "--set", f"run.path={path}"])
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(sharded, scores_of(path), rtol=1e-5)


@pytest.mark.slow
def test_a_command_in_two_processes_is_one_command(tmp_path: Path, workload: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "STORE": str(tmp_path / "store")}
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", "tda.cli", "index", str(workload)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=LIMIT)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert said == [f"{tmp_path / 'run'}\n", ""]
    assert scores_of(tmp_path / "run").shape == (7, 33)
