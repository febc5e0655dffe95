"""A run of a million rows stays interactive."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from explorer_run import Known, examples, manifest
from fastapi.testclient import TestClient

import tda
from tda.examples import Examples
from tda.explorer import Explorer, create_app
from tda.store import Store

NUM_TRAIN, DIM, LIMIT = 1_000_000, 64, 0.3


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "run"
    store = Store.create(path, {**manifest(DIM, 1, False, 4096), "dtype": "bfloat16"})
    rng = np.random.default_rng(0)
    number = np.arange(NUM_TRAIN).astype(str)
    columns = {
        "label": rng.integers(0, 10, NUM_TRAIN),
        "source": np.array(["a", "b", "c"])[rng.integers(0, 3, NUM_TRAIN)],
        "text": np.char.add("the text of example ", number),
    }
    digests = rng.integers(0, 256, (NUM_TRAIN, 16), dtype=np.uint8)
    rows = rng.standard_normal((1, NUM_TRAIN, DIM), dtype=np.float32)
    p = rng.uniform(0.05, 0.95, (1, NUM_TRAIN)).astype(np.float32)
    known = Examples(np.char.add("row-", number), digests, columns)
    Known(rows, p).write(store.plan("train", known))
    Known.draw(1, 100, DIM, 2).write(store.plan("queries/test", examples(100, "test")))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["grad_dot", "influence", "trak"])
def test_a_warm_view_of_another_query_takes_less_than_300_ms(large, recipe):
    """The page of a query not asked before; the best of eight, as other programs run too."""
    web = TestClient(create_app(Explorer(tda.open(large))), base_url="http://localhost")
    assert web.get(f"/?query=0&recipe={recipe}").status_code == 200
    seconds = []
    for query in range(1, 9):
        start = time.perf_counter()
        assert web.get(f"/?query={query}&recipe={recipe}").status_code == 200
        seconds.append(time.perf_counter() - start)
    print(f"{recipe}: {1000 * min(seconds):.0f} to {1000 * max(seconds):.0f} ms")
    assert min(seconds) < LIMIT
