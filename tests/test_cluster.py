"""A cluster changes where work is done and how fast, never a byte of what comes of it."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import problems
import pytest
import torch
import zarr

import tda
from tda.cli.answers import write_scores
from tda.cluster import Cluster, delivery, is_open, pool, run
from tda.cluster.pool import Workers
from tda.config import load_config
from tda.errors import ClusterError, ConfigError, GradientError, MismatchError, TdaError
from tda.scorer.ranking import Heaps, merged


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Two processes; work goes there only inside ``taking_work()``."""
    with Cluster(workers=2).started() as started:
        yield started


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store but those that may be deleted at any time."""
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("cache/")}


@pytest.fixture
def index(tmp_path: Path, task_of: Callable) -> Callable[..., tda.Run]:
    def call(name: str, folder: str, **options: Any) -> tda.Run:
        problem = problems.problem(name)
        given = {"proj_dim": 8, "progress": False, "batch_size": 2, "chunk_rows": 4, **options}
        return tda.index(task_of(problem), problem.train, tmp_path / folder, **given)

    return call


# The store.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits_mlp", {"gauss_newton": True}),
        ("cnn", {"projection": "kronecker", "dtype": "int8"}),
    ],
)
def test_workers_write_what_the_plain_loop_writes(workers, index, name: str, options: dict) -> None:
    queries = problems.problem(name).queries
    alone = index(name, "alone", **options)
    alone.add_queries(queries, "q")
    with workers.taking_work():
        together = index(name, "together", **options)
        together.add_queries(queries, "q")
    assert files(together.path) == files(alone.path)
    assert together.store.verify() == []


def test_what_a_plain_loop_began_workers_finish(workers, index) -> None:
    whole = files(index("digits_mlp", "whole").path)
    table = index("digits_mlp", "run").store.table("train")
    for number in (0, 2):
        (table.folder / "done" / f"c0-{number}.json").unlink()
    left = table.folder / "rows/c/0/2/0.somewhere-123.tmp"  # by a worker that was killed
    left.write_bytes(b"half")
    with workers.taking_work():
        assert files(index("digits_mlp", "run").path) == whole


def test_an_example_without_a_gradient_is_named_as_in_the_plain_loop(workers, tmp_path) -> None:
    X, y = np.ones((12, 3), "f4"), np.arange(12) % 2
    X[7] = np.inf
    task = tda.Task(torch.nn.Linear(3, 2))
    given: dict[str, Any] = {"projection": "identity", "chunk_rows": 4, "progress": False}
    told = []
    for folder in ("alone", "together"):
        place = workers.taking_work() if folder == "together" else nullcontext()
        with place, pytest.raises(GradientError) as caught:
            tda.index(task, (X, y), tmp_path / folder, **given)
        told.append(str(caught.value))
    assert told[0] == told[1]
    assert "row 7" in told[0]


# How work gets there.


class Loaded:
    """A work that notes where it was unpacked, and that each piece arrives alone."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")

    def __call__(self, piece: int, tick: Any) -> tuple[int, int]:
        time.sleep(0.02)
        tick(1)
        return piece * piece, os.getpid()


def test_work_is_unpacked_once_a_worker_and_results_keep_their_order(workers, tmp_path) -> None:
    with workers.taking_work():
        found = run(Loaded(tmp_path / "log"), range(20))
    assert [square for square, _ in found] == [i * i for i in range(20)]
    used = {pid for _, pid in found}
    assert os.getpid() not in used
    assert sorted((tmp_path / "log").read_text().split()) == sorted(str(pid) for pid in used)


def test_few_pieces_are_on_their_way_at_a_time(workers, tmp_path, monkeypatch) -> None:
    """A scheduler holds a few pieces a worker, however many there are."""
    ahead = []
    take = pool._Dispatch._take

    def noted(self: Any, future: Any) -> None:
        ahead.append(len(self.given))
        take(self, future)

    monkeypatch.setattr(pool._Dispatch, "_take", noted)
    with workers.taking_work():
        run(Loaded(tmp_path / "log"), range(30))
    assert max(ahead) <= 2 * pool.WINDOW


def test_functions_and_classes_of_a_script_travel_by_value(workers, tmp_path) -> None:
    """As they would from a notebook: their module cannot be imported by a worker."""
    source = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
    def forward(self, x):
        return self.layer(x).tanh()
class Data:
    def __len__(self): return 6
    def __getitem__(self, i): return torch.full((3,), i / 6), i % 2
def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""
    script: dict[str, Any] = {"__name__": "__main__"}
    exec(source, script)
    task = tda.Task(script["Net"](), measurement=script["loss"])
    given: dict[str, Any] = {"projection": "identity", "chunk_rows": 2, "progress": False}
    alone = tda.index(task, script["Data"](), tmp_path / "alone", **given)
    with workers.taking_work():
        together = tda.index(task, script["Data"](), tmp_path / "together", **given)
    assert files(together.path) == files(alone.path)


JOB = """
import os, torch, tda
def task():
    torch.manual_seed(0)
    return tda.Task(torch.nn.Linear(500, 2))
def train():
    generator = torch.Generator().manual_seed(int(os.path.exists("other") and os.getpid()))
    return torch.randn(40, 500, generator=generator), torch.arange(40) % 2
def retrain(subset, seed):
    return torch.nn.Linear(500, 2)
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    text = '[run]\npath = "run"\n[workload]\ntask = "job.py:task"\ntrain = "job.py:train"\n'
    text += 'queries = { q = "job.py:train" }\n[projection]\ndim = 16\n[index]\nchunk_rows = 5\n'
    (tmp_path / "job.toml").write_text(text)
    return tmp_path / "job.toml"


def test_a_configuration_travels_as_itself(workers, config) -> None:
    """Not its 80,000 bytes of data: a worker builds its own."""
    from tda.cli.workload import index_workload, task_of, train_of

    loaded = load_config(config)
    assert len(delivery.pack((task_of(loaded), train_of(loaded)))) < 4096
    index_workload(load_config(config, ["run.path=alone"]))
    with workers.taking_work():
        index_workload(loaded)
    assert files(Path("run")) == files(Path("alone"))


def test_a_worker_that_builds_something_else_is_refused(workers, config) -> None:
    from tda.cli.workload import index_workload

    Path("other").touch()
    with workers.taking_work(), pytest.raises(MismatchError, match="a worker has another example"):
        index_workload(load_config(config))


def test_what_does_not_pickle_is_refused_with_advice(workers, tmp_path) -> None:
    class Open(problems.Listed):
        def __init__(self) -> None:
            super().__init__(problems.problem("digits_mlp").train.examples)
            self.file = (tmp_path / "file").open("w")

    data = Open()
    task = tda.Task(problems.problem("digits_mlp").make())
    with data.file, workers.taking_work(), pytest.raises(ClusterError, match="cannot be sent"):
        tda.index(task, data, tmp_path / "run", progress=False)


def test_what_a_worker_cannot_load_is_told(workers) -> None:
    class Absent:
        def __reduce__(self) -> tuple:
            return eval, ("__import__('no_such_module')",)

    with workers.taking_work(), pytest.raises(ClusterError, match=r"(?s)loaded.*no_such_module"):
        run(Absent(), [0])  # type: ignore[arg-type]


# The value.


@pytest.mark.parametrize(
    "given",
    [
        {"workers": -1},
        {"workers": 1.5},
        {"threads": 0},
        {"kind": "pbs", "workers": 1},
        {"kind": "slurm"},
        {"workers": 2, "scheduler": "tcp://a:1"},
        {"workers": 2, "options": {"queue": "a"}},
    ],
)
def test_a_cluster_that_contradicts_itself_is_none(given: dict) -> None:
    with pytest.raises(ConfigError):
        Cluster(**given)


@pytest.mark.parametrize("scheduler", ["nowhere.json", "tcp://127.0.0.1:1"])
def test_a_scheduler_that_is_not_there_is_named(scheduler: str, monkeypatch) -> None:
    monkeypatch.setattr("tda.cluster.start._TIMEOUT", 0.3)
    with pytest.raises(ClusterError, match=scheduler), Cluster.of(scheduler).open():
        pass


def test_no_cluster_is_no_cluster() -> None:
    with Cluster().open():
        assert not is_open()
        assert run(lambda piece, tick: piece + 1, [1, 2]) == [2, 3]


def test_an_address_is_a_cluster(workers) -> None:
    with Cluster.of(workers.client.scheduler.address).open():
        pids = run(lambda piece, tick: os.getpid(), range(4))
    assert os.getpid() not in pids


def test_threads_and_memory_are_set_for_workers(workers) -> None:
    def look(piece: str, tick: Any) -> Any:
        return os.environ.get(piece, torch.get_num_threads())

    with workers.taking_work():
        found = run(look, ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "threads"])
    assert found == ["536870912", "1", 1]


# Retraining.


def test_retraining_gives_the_same_on_workers(workers, config) -> None:
    from tda.cli.workload import index_workload, queries_of, task_of

    index_workload(load_config(config))
    loaded = load_config(config, ["evaluate.train=job.py:retrain"])
    opened = tda.open("run", task_of(loaded))
    truth = functools.partial(
        tda.evaluate.ground_truth,
        opened,
        loaded.build_retraining(),
        queries_of(loaded, "q"),
        tda.evaluate.Design(num_subsets=4),
        progress=False,
    )
    alone = truth(name="alone")
    with workers.taking_work():
        together = truth(name="together")
    np.testing.assert_array_equal(alone.outputs, together.outputs)
    assert issubclass(ClusterError, TdaError)


# Asking.


def test_workers_answer_as_the_plain_loop_does(workers, index, tmp_path) -> None:
    """Also where a second moment is merged from parts, and where the last part has fewer than k."""
    problem = problems.problem("digits_mlp")
    opened = index("digits_mlp", "run")
    opened.add_queries(problem.queries, "q")
    recipes = ("influence", "trak", "grad_cos")
    alone = [opened.top_k("q", k=7, recipe=name) for name in recipes]
    matrices = [opened.scores("q", recipe=name).compute() for name in recipes]
    shutil.rmtree(opened.path / "cache")  # curvatures, too, are computed anew
    with workers.taking_work():
        for recipe, want, matrix in zip(recipes, alone, matrices, strict=True):
            found = opened.top_k("q", k=7, recipe=recipe)
            for one, other in (
                (found.proponents, want.proponents),
                (found.opponents, want.opponents),
            ):
                np.testing.assert_array_equal(one.indices, other.indices)
                rounding = 1e-6 * float(np.abs(other.scores).max())
                np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=rounding)
            write_scores(opened.scores("q", recipe), tmp_path / recipe, queries="q", recipe=recipe)
            rounding = 1e-6 * float(np.abs(matrix).max())
            written = zarr.open_array(tmp_path / recipe)[:]
            np.testing.assert_allclose(written, matrix, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("cuts", [[0, 40], [0, 3, 7, 40], list(range(41))])
def test_the_smallest_of_parts_are_the_smallest(cuts: list[int]) -> None:
    """With equal values, of which the first column comes first, and parts shorter than k."""
    values = torch.randint(0, 4, (5, 40), generator=torch.Generator().manual_seed(0)).float()

    def found(low: int, high: int) -> Any:
        heaps = Heaps(5, min(6, high - low))
        heaps.add(values[:, low:high].contiguous(), low)
        return heaps.finish()

    columns, kept = merged([found(*cut) for cut in itertools.pairwise(cuts)], 6)
    order = values.sort(dim=1, stable=True)
    np.testing.assert_array_equal(columns, order.indices[:, :6])
    np.testing.assert_array_equal(kept, order.values[:, :6])
