"""Scores are those of the examples, never those of how the work was cut, ordered or interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import naive
import numpy as np
import problems
import pytest
import torch
from torch import Tensor, nn

import tda
from tda.errors import TdaError
from tda.run import Run

TOLERANCE = 1e-5
RECIPES = ("tracin", "trak", "influence")
NAMES = ("digits_mlp", "cnn", "tiny_lm", "encoder_layer", "norms")


def scores(run: Run, queries: Any) -> dict[str, np.ndarray]:
    return {recipe: run.scores(queries, recipe=recipe).compute() for recipe in RECIPES}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for recipe in wanted:
        assert naive.relative_error(found[recipe], wanted[recipe]) < TOLERANCE, recipe


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store but those that may be deleted at any time."""
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("cache/")}


@pytest.fixture
def index(tmp_path: Path, task_of: Callable) -> Callable[..., Run]:
    """Index a problem (or part of it) into ``tmp_path / folder``, sketched to 32 numbers."""

    def call(name: str, folder: str, dataset: Any = None, task: Any = None, **options: Any) -> Run:
        problem = problems.problem(name)
        given = {"proj_dim": 32, "dtype": "float32", "progress": False, **options}
        data = problem.train if dataset is None else dataset
        return tda.index(task or task_of(problem), data, tmp_path / folder, **given)

    return call


# How the work is cut.


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_chunks_do_not_matter(name: str, index: Callable) -> None:
    """Batches of one, short last batches, chunks smaller and larger than a batch."""
    queries = problems.problem(name).queries
    wanted = scores(index(name, "all", batch_size=10, chunk_rows=10), queries)
    for batch_size, chunk_rows in ((1, 10), (4, 3), (100, 7)):
        run = index(
            name, f"{batch_size}-{chunk_rows}", batch_size=batch_size, chunk_rows=chunk_rows
        )
        assert_same(scores(run, queries), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_training_examples_permutes_columns(name: str, index: Callable) -> None:
    problem = problems.problem(name)
    order = np.random.default_rng(0).permutation(len(problem.train))
    shuffled = problems.Listed([problem.train[i] for i in order])
    wanted = scores(index(name, "straight", batch_size=4, chunk_rows=4), problem.queries)
    run = index(name, "shuffled", shuffled, batch_size=4, chunk_rows=4)
    found = scores(run, problem.queries)
    assert_same(found, {recipe: matrix[:, order] for recipe, matrix in wanted.items()})


def test_the_order_and_company_of_queries_permute_rows(index: Callable) -> None:
    problem = problems.problem("digits_mlp")
    run = index("digits_mlp", "run")
    together = scores(run, problem.queries)
    alone = [scores(run, problems.Listed([query])) for query in problem.queries.examples]
    for recipe, matrix in together.items():
        stacked = np.concatenate([found[recipe] for found in alone])
        assert naive.relative_error(stacked, matrix) < TOLERANCE, recipe


@pytest.mark.parametrize("chunk_rows", [2, 4, 100])
def test_appending_is_indexing_at_once(chunk_rows: int, index: Callable) -> None:
    problem = problems.problem("digits_mlp")
    at_once = index("digits_mlp", "once", chunk_rows=chunk_rows, batch_size=4)
    for stop in (5, 7, 10):
        part = problems.Listed(problem.train.examples[:stop])
        grown = index("digits_mlp", "grown", part, chunk_rows=chunk_rows, batch_size=4)
        assert grown.scores(problem.queries, recipe="trak").shape == (3, stop)
    assert_same(scores(grown, problem.queries), scores(at_once, problem.queries))


def test_an_example_in_another_place_is_another_data_set(index: Callable) -> None:
    problem = problems.problem("digits_mlp")
    index("digits_mlp", "run")
    with pytest.raises(TdaError):
        index("digits_mlp", "run", problems.Listed(problem.train.examples[::-1]))


def test_workers_do_not_matter(index: Callable) -> None:
    problem = problems.problem("digits_mlp")
    run = index("digits_mlp", "run", chunk_rows=2)
    with dask.config.set(scheduler="synchronous"):
        wanted = scores(run, problem.queries)
    with dask.config.set(scheduler="threads", num_workers=4):
        found = scores(run, problem.queries)
    for recipe, matrix in wanted.items():
        np.testing.assert_array_equal(found[recipe], matrix)


def test_a_block_of_scores_is_a_block_of_the_matrix(index: Callable) -> None:
    problem = problems.problem("digits_mlp")
    lazy = index("digits_mlp", "run", chunk_rows=3).scores(problem.queries, recipe="influence")
    np.testing.assert_array_equal(lazy[1:, 4:9].compute(), lazy.compute()[1:, 4:9])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.04), ("int4", 0.3)]
)
def test_short_rows_lose_only_their_rounding(dtype: str, tolerance: float, index: Callable) -> None:
    """bfloat16 keeps 8 bits of each number, int8 7 bits of the row's largest, int4 3 of 32."""
    queries = problems.problem("digits_mlp").queries
    wanted = scores(index("digits_mlp", "float"), queries)
    found = scores(index("digits_mlp", "short", dtype=dtype), queries)
    for recipe, matrix in wanted.items():
        assert naive.relative_error(found[recipe], matrix) < tolerance, recipe


# The seed.


@pytest.mark.parametrize("projection", ["count_sketch", "rademacher"])
@pytest.mark.parametrize("name", ["digits_mlp", "encoder_layer"])
def test_a_seed_decides_every_byte(name: str, projection: str, index: Callable) -> None:
    """With dropout in the model, and whatever the state of torch's own generator."""
    runs = {}
    for folder, seed, state in (("one", 1, 11), ("again", 1, 12), ("other", 2, 11)):
        torch.manual_seed(state)
        runs[folder] = index(name, folder, seed=seed, projection=projection, batch_size=4)
    one, again, other = (files(run.store.path) for run in runs.values())
    assert one == again
    assert one.keys() == other.keys()
    rows = [name for name in one if name.startswith("train/rows/c")]
    assert rows
    assert all(one[name] != other[name] for name in rows)


# Interruption.


class PowerCutError(Exception):
    """What stops a run in the middle."""


class Counted(nn.Module):
    """A model that counts its forward passes and stops before the one numbered ``limit``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.counter = {"calls": 0, "limit": -1}  # shared with any copy

    def forward(self, x: Tensor) -> Tensor:
        if self.counter["calls"] == self.counter["limit"]:
            raise PowerCutError
        self.counter["calls"] += 1
        return self.model(x)

    def __deepcopy__(self, memo: dict) -> Counted:
        copied = Counted(problems.problem("digits_mlp").make())
        copied.load_state_dict(self.state_dict())
        copied.counter = self.counter
        return copied


class Breaking(problems.Listed):
    """A data set whose ``limit``-th reading fails."""

    reads, limit = 0, -1

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        if self.reads == self.limit:
            raise PowerCutError
        return super().__getitem__(i)


def counted_task() -> tuple[Any, dict[str, int]]:
    model = Counted(problems.problem("digits_mlp").make())
    saved = [
        tda.Checkpoint({f"model.{name}": value for name, value in weights.state.items()}, step=step)
        for step, weights in enumerate(problems.problem("digits_mlp").checkpoints)
    ]
    return tda.Task(model, checkpoints=saved, measurement="cross_entropy"), model.counter


CUT = {"batch_size": 2, "chunk_rows": 4}


def test_indexing_twice_computes_nothing(index: Callable) -> None:
    task, counter = counted_task()
    first = index("digits_mlp", "run", task=task, **CUT)
    before, calls = files(first.store.path), counter["calls"]
    assert calls > 0
    index("digits_mlp", "run", task=task, **CUT)
    assert counter["calls"] == calls
    assert files(first.store.path) == before


def test_asking_twice_computes_nothing(index: Callable) -> None:
    task, counter = counted_task()
    run, queries = index("digits_mlp", "run", task=task), problems.problem("digits_mlp").queries
    run.scores(queries, recipe="trak").compute()
    calls = counter["calls"]
    for recipe in ("trak", "influence", "grad_dot"):
        run.scores(queries, recipe=recipe).compute()
    assert counter["calls"] == calls


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.8, 0.97])
def test_an_interrupted_model_resumes_to_the_same_bytes(fraction: float, index: Callable) -> None:
    task, counter = counted_task()
    whole = files(index("digits_mlp", "whole", task=task, **CUT).store.path)
    total = counter["calls"]
    counter |= {"calls": 0, "limit": int(fraction * total)}
    with pytest.raises((PowerCutError, TdaError)):
        index("digits_mlp", "run", task=task, **CUT)
    counter |= {"calls": 0, "limit": -1}
    run = index("digits_mlp", "run", task=task, **CUT)
    assert files(run.store.path) == whole
    # One chunk is two batches, one pass counts classes; what was finished is not computed again.
    assert counter["calls"] <= total - int(fraction * total) + 3 + len(task.checkpoints)
    assert run.store.verify() == []


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.9, 1.0])
def test_an_interrupted_data_set_resumes_to_the_same_bytes(
    fraction: float, index: Callable
) -> None:
    data = Breaking(problems.problem("digits_mlp").train.examples)
    whole = files(index("digits_mlp", "whole", data, **CUT).store.path)
    data.limit, data.reads = max(1, int(fraction * data.reads)), 0
    with pytest.raises((PowerCutError, TdaError)):
        index("digits_mlp", "run", data, **CUT)
    run = index("digits_mlp", "run", data, **CUT)
    assert files(run.store.path) == whole
    assert run.store.verify() == []
