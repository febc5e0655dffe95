"""What is kept beside a store is never trusted, and the store on disk is scored as its rows say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from memory_store import MemoryStore, make_store
from test_scorer import CASES, close, influence, matrix, trak, variant

from tda.errors import StoreError
from tda.examples import Examples
from tda.recipes import RECIPES
from tda.scorer import prepare, scores, top_k
from tda.store import Store


def test_a_curvature_is_computed_once_per_store(tmp_path):
    store = make_store(tmp_path).mark()
    recipe = RECIPES["influence"]
    first = matrix(store, recipe)
    store.train.reads.clear()
    prepare(store, dataclasses.replace(recipe, damping=0.5), store.queries)
    assert store.train.reads == []  # one eigendecomposition serves every damping
    np.testing.assert_array_equal(matrix(store, recipe), first)
    changed = store.with_train(values=store.train.values * 2).mark()
    close(matrix(changed, recipe), influence(changed))
    assert sum(changed.train.reads) > changed.train.num_rows


def test_a_damaged_cache_is_computed_again(tmp_path):
    store = make_store(tmp_path).mark()
    recipe = variant("influence", normalize="both")
    expected = matrix(store, recipe)
    kept = sorted((tmp_path / "cache").iterdir())
    assert {path.suffix for path in kept} == {".npz"}
    for damage in (lambda b: b[: len(b) // 2], lambda b: b"", lambda b: flip(b, len(b) // 2)):
        for path in kept:
            path.write_bytes(damage(path.read_bytes()))
        np.testing.assert_array_equal(matrix(store, recipe), expected)
    assert sorted((tmp_path / "cache").iterdir()) == kept


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :]


def test_a_store_that_cannot_be_written_answers_all_the_same(tmp_path):
    store = make_store(tmp_path).mark()
    (tmp_path / "cache").write_text("not a folder")
    close(matrix(store, RECIPES["influence"]), influence(store))


# The same against the store on disk.


def on_disk(memory: MemoryStore, path: Path, dtype: str, chunk_rows: int = 32) -> Store:
    manifest = {
        "format": 1,
        "model": {"name": "made"},
        **memory.manifest,
        "projection": {"kind": "identity", "dim": memory.train.dim, "seed": 0},
        "dtype": dtype,
        "chunk_rows": chunk_rows,
        "versions": {},
    }
    store = Store.create(path, manifest)
    for name, made in memory.tables.items():
        n = made.num_rows
        digests = np.random.default_rng(0).integers(0, 256, (n, 16)).astype(np.uint8)
        table = store.plan(name, Examples(made.column("id"), digests, {}), None)
        for c, chunk in table.missing():
            span = slice(*table.chunk_range(chunk))
            columns = {column: values[c, span] for column, values in made.columns.items()}
            columns |= {k: np.ones(span.stop - span.start) for k in ("loss", "p", "grad_norm")}
            table.write(c, chunk, made.values[c, span], columns, None)
    return store


def as_stored(store: Store, memory: MemoryStore) -> MemoryStore:
    """The memory tables with the rows as the store decodes them."""
    tables = {}
    for name, made in memory.tables.items():
        table = store.table(name)
        rows = [table.rows(c, 0, table.num_rows).numpy() for c in range(table.num_checkpoints)]
        tables[name] = dataclasses.replace(made, values=np.stack(rows))
    return dataclasses.replace(memory, tables=tables)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4", "ternary"])
def test_a_store_on_disk_is_scored_as_its_rows_say(dtype, tmp_path):
    memory = make_store(tmp_path, num_train=50)
    store = on_disk(memory, tmp_path / "run", dtype)
    stored = as_stored(store, memory)
    queries = store.table("queries/q")
    for case in ("grad_cos", "trak", "influence"):
        recipe, formula = CASES[case]
        prepared = prepare(store, recipe, queries)
        close(scores(prepared).compute(scheduler="threads"), formula(stored))
        found = top_k(prepared, 4).proponents
        best = np.argsort(-formula(stored), axis=1)[:, :4]
        np.testing.assert_array_equal(found.ids, memory.train.column("id")[best])


@pytest.mark.slow  # starting a process imports torch
def test_a_store_on_disk_is_scored_by_worker_processes(tmp_path):
    memory = make_store(tmp_path)
    store = on_disk(memory, tmp_path / "run", "float32")
    lazy = scores(prepare(store, RECIPES["trak"], store.table("queries/q")))
    close(lazy.compute(scheduler="processes", num_workers=1), trak(memory))


def test_an_unfinished_store_is_not_scored(tmp_path):
    memory = make_store(tmp_path)
    store = on_disk(memory, tmp_path / "run", "float32")
    next((tmp_path / "run" / "train" / "done").glob("c1-*.json")).unlink()
    with pytest.raises(StoreError):
        prepare(store, RECIPES["trak"], store.table("queries/q"))
