"""Anything may happen to a run, in any order: what it answers is what a perfect memory would."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import tda
from tda.errors import TdaError
from tda.growing import compact, relabel
from tda.recipes import RECIPES
from tda.repair import repair
from tda.store import Table
from tda.store.local import TMP

DIM, CHUNK, LAMBDA = 3, 4, 0.1
INFLUENCE = dataclasses.replace(RECIPES["influence"], damping=LAMBDA)
PLACES, WAYS = st.integers(0, 2**20), ("flip", "cut", "gone")
OPTIONS: dict[str, Any] = {"projection": "identity", "dtype": "float32", "progress": False}


class Memory:
    """Linear regression, f = w·x and ℓ = ½(f − y)², remembered example by example in float64."""

    def __init__(self) -> None:
        self.x: list[np.ndarray] = []
        self.y: list[float] = []
        self.ids: list[str] = []
        self.deleted: set[str] = set()
        self.weights: list[np.ndarray] = []
        self.chance = np.random.default_rng(0)
        self.queries = self.chance.normal(size=(2, DIM)).astype("f4"), np.array([0.5, -1], "f4")

    def add_example(self) -> None:
        self.x.append(self.chance.normal(size=DIM).astype("f4"))
        self.y.append(float(np.float32(self.chance.normal())))
        self.ids.append(f"e{len(self.ids)}-{self.chance.integers(1000)}")

    def add_checkpoint(self) -> None:
        self.weights.append(self.chance.normal(size=DIM).astype("f4"))

    @property
    def left(self) -> list[int]:
        return [i for i, name in enumerate(self.ids) if name not in self.deleted]

    def data(self) -> list[dict[str, Any]]:
        both = zip(self.ids, self.x, self.y, strict=True)
        return [{"id": n, "input": torch.tensor(x), "target": torch.tensor(y)} for n, x, y in both]

    def asked(self) -> list[dict[str, Any]]:
        both = zip(*self.queries, strict=True)
        return [
            {"id": f"q{y}", "input": torch.tensor(x), "target": torch.tensor(y)} for x, y in both
        ]

    def task(self) -> tda.Task:
        model = nn.Sequential(nn.Linear(DIM, 1, bias=False), nn.Flatten(0))
        states = [{"0.weight": torch.tensor(w)[None]} for w in self.weights]
        checkpoints = [tda.Checkpoint(s, step=i, learning_rate=0.1) for i, s in enumerate(states)]
        return tda.Task(model, checkpoints=checkpoints, measurement="squared_error")

    def scores(self) -> dict[str, np.ndarray]:
        """grad_dot and influence [query, those left] by their formulas."""
        x = np.array([self.x[i] for i in self.left], float)
        y = np.array([self.y[i] for i in self.left], float)
        q, z = (np.asarray(part, float) for part in self.queries)
        h = x.T @ x / len(x)
        inverse = np.linalg.inv(h + LAMBDA * np.trace(h) / DIM * np.eye(DIM))
        dot, influence = [], []
        for w in np.array(self.weights, float):
            g, gq = (x @ w - y)[:, None] * x, (q @ w - z)[:, None] * q
            dot.append(gq @ g.T)
            influence.append(gq @ inverse @ g.T / len(x))
        return {"grad_dot": np.mean(dot, 0), "influence": np.mean(influence, 0)}


class Machine(RuleBasedStateMachine):
    """whole: nothing is unfinished or damaged, as far as anyone who plays fair can know; killed:
    something is unfinished, and nothing is damaged."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path, self.runs = self.folder / "run-0", 1
        self.fsync = mock.patch.object(os, "fsync")  # nobody pulls the plug here
        self.fsync.start()
        self.memory = Memory()
        for _ in range(5):
            self.memory.add_example()
        self.memory.add_checkpoint()
        self.manifest = b""
        self.whole, self.killed = True, False
        self.before: dict[Path, bytes] = {}  # what is damaged, as it was when all was whole
        self.index()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.fsync.stop()
            shutil.rmtree(self.folder)

    def open(self) -> tda.Run:
        return tda.open(self.path, task=self.memory.task())

    def index(self) -> None:
        memory = self.memory
        run = tda.index(memory.task(), memory.data(), self.path, chunk_rows=CHUNK, **OPTIONS)
        run.add_queries(memory.asked(), "q")
        self.manifest = (self.path / "manifest.json").read_bytes()

    # ---- what happens to a run

    @rule(count=st.integers(1, 4))
    @precondition(lambda self: self.whole)
    def append(self, count: int) -> None:
        for _ in range(count):
            self.memory.add_example()
        self.index()

    @rule()
    @precondition(lambda self: self.whole and len(self.memory.weights) < 3)
    def add_a_checkpoint(self) -> None:
        self.memory.add_checkpoint()
        self.index()

    @rule(data=st.data())
    @precondition(lambda self: self.whole)
    def delete(self, data: Any) -> None:
        some = data.draw(st.sets(st.sampled_from(self.memory.ids), max_size=3))
        if len(self.memory.deleted | some) < len(self.memory.ids):
            before = len(self.memory.deleted)
            self.memory.deleted |= some
            assert self.open().delete(sorted(some)) == len(self.memory.deleted) - before
            self.manifest = (self.path / "manifest.json").read_bytes()

    @rule(data=st.data())
    @precondition(lambda self: self.whole and self.memory.deleted)
    def restore(self, data: Any) -> None:
        some = data.draw(st.sets(st.sampled_from(sorted(self.memory.deleted)), min_size=1))
        self.memory.deleted -= some
        assert self.open().restore(sorted(some)) == len(some)
        self.manifest = (self.path / "manifest.json").read_bytes()

    @rule(data=st.data())
    @precondition(lambda self: self.whole)
    def change_a_label(self, data: Any) -> None:
        place = data.draw(st.integers(0, len(self.memory.ids) - 1))
        self.memory.y[place] += 1.0
        done = relabel(self.open(), self.memory.data())
        assert done.ids.tolist() == [self.memory.ids[place]]
        assert len(done.computed) == len(self.memory.weights)  # its chunk, at every checkpoint
        self.manifest = (self.path / "manifest.json").read_bytes()

    @rule(after=st.integers(0, 3), grow=st.booleans(), put=st.booleans())
    @precondition(lambda self: self.whole)
    def be_killed_while_indexing(self, after: int, grow: bool, put: bool) -> None:
        """put: the last chunk is there, but not finished."""
        for _ in range(5):
            self.memory.add_example()
        if grow and len(self.memory.weights) < 3:
            self.memory.add_checkpoint()
        write, left = Table.put, [after]

        def some(table: Table, *what: Any) -> Callable[[], None]:
            left[0] -= 1
            if left[0] < 0:
                (table.folder / f"rows{TMP}").write_bytes(b"half a file")
                if put:
                    write(table, *what)
                raise KeyboardInterrupt
            return write(table, *what)

        with mock.patch.object(Table, "put", some):
            try:
                self.index()
            except KeyboardInterrupt:
                self.whole, self.killed = False, True
        self.manifest = (self.path / "manifest.json").read_bytes()

    @rule(which=PLACES, where=PLACES, by=st.integers(1, 255), way=st.sampled_from(WAYS))
    def be_damaged(self, which: int, where: int, by: int, way: str) -> None:
        """What is drawn does not depend on what lies there: the same draws are the same story."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and "cache" not in p.parts)
        file = files[(which * 2654435761 >> 7) % len(files)]  # small numbers are drawn most often
        content = bytearray(file.read_bytes())
        if self.whole or self.before:
            self.before.setdefault(file, bytes(content))
        if way == "flip" and content:
            content[where % len(content)] ^= by
        else:
            del content[len(content) // 2 :]
        file.write_bytes(content)
        if way == "gone":
            file.unlink()
        self.whole = self.killed = False

    @rule()
    def lose_the_cache(self) -> None:
        shutil.rmtree(self.path / "cache", ignore_errors=True)

    # ---- what mends it

    @rule()
    @precondition(lambda self: self.killed)
    def be_resumed(self) -> None:
        self.index()
        self.whole, self.killed = True, False
        assert self.open().verify() == []

    @rule()
    def be_repaired(self) -> None:
        (self.path / "manifest.json").write_bytes(self.manifest)  # its owner has a copy
        done = repair(self.open(), self.memory.data()[: self.planned()], {"q": self.memory.asked()})
        assert done.after == []
        for file, content in self.before.items():  # also where no answer depends on it
            assert file.read_bytes() == content, file
        self.before = {}
        self.whole, self.killed = True, False
        self.index()  # what was interrupted before it was planned
        assert self.open().verify() == []

    def planned(self) -> int:
        import json

        record = json.loads(self.manifest)["data"]["train"]
        return max(record["num_rows"], self.stored_rows())

    def stored_rows(self) -> int:
        try:
            return Table(self.path, "train").num_rows
        except TdaError:
            return 0

    @rule()
    @precondition(lambda self: self.whole)
    def be_compacted(self) -> None:
        new = self.folder / f"run-{self.runs}"
        self.runs += 1
        compact(self.path, new)
        memory = self.memory
        memory.x, memory.y, memory.ids = (
            [values[i] for i in memory.left] for values in (memory.x, memory.y, memory.ids)
        )
        memory.deleted = set()
        self.path = new
        self.manifest = (new / "manifest.json").read_bytes()

    # ---- what it answers

    @invariant()
    def answers_are_right_or_refused(self) -> None:
        memory = self.memory
        ids = [memory.ids[i] for i in memory.left]
        wanted, refused = memory.scores(), None
        try:
            run = self.open()
            found = {"grad_dot": run.scores("q", recipe="grad_dot").compute()}
            found["influence"] = run.scores("q", recipe=INFLUENCE).compute()
            top = run.top_k("q", k=2, recipe=INFLUENCE)
            named = run.ids.tolist()
        except TdaError as error:
            refused = error
        if refused is not None:
            assert not self.whole and refused.where is not None, refused
            return
        if not self.whole and named != ids:
            return  # as it was before an addition that was interrupted when nothing was planned
        assert named == ids and not set(top.proponents.ids.ravel()) & memory.deleted
        for recipe, matrix in wanted.items():
            np.testing.assert_allclose(
                found[recipe], matrix, rtol=1e-3, atol=1e-4 * abs(matrix).max()
            )
        best = np.argsort(-wanted["influence"], axis=1)[:, 0]
        assert top.proponents.ids[:, 0].tolist() == [ids[i] for i in best]


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def play(examples: int, steps: int) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=QUIET,
        derandomize=True,
    )
    run_state_machine_as_test(Machine, settings=chosen)


def test_a_run_answers_as_a_perfect_memory_would():
    play(6, 10)


@pytest.mark.slow
def test_a_run_answers_as_a_perfect_memory_would_for_long():
    play(60, 40)
