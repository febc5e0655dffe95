"""What is read, in which batches, and when: rows do not depend on it, and slow data are hidden."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tda
from tda.errors import StoreError
from tda.reading import ahead, behind, by_length
from tda.store import Table

NUM, VOCABULARY = 24, 30


BATCH, COUNT = 4, 20


class Numbered:
    """Examples that carry their number, and say which was read last."""

    last = -1

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.last = index
        return torch.full((4,), float(index)), index % 3


class Patient(torch.nn.Linear):
    """A model that waits, with each batch, until an example of the next has been read."""

    def __init__(self, data: Numbered) -> None:
        super().__init__(4, 3)
        self.data = data
        self.overlapped: list[bool] = []

    def __deepcopy__(self, memo: dict) -> Patient:
        copied = Patient(self.data)
        copied.overlapped = self.overlapped
        return copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last = int(x[0, 0]), int(x[-1, 0])
        if last - first == BATCH - 1 == len(x) - 1 and last < COUNT - 1:
            end = time.monotonic() + 5
            while self.data.last <= last and time.monotonic() < end:
                time.sleep(0.001)
            self.overlapped.append(self.data.last > last)
        return super().forward(x)


def test_the_next_batch_is_read_while_one_is_computed(tmp_path):
    """So that a data set as slow as the model costs nothing but its first batch."""
    data = Numbered()
    model = Patient(data)
    run = tda.index(tda.Task(model), data, tmp_path / "run", batch_size=BATCH, progress=False)
    assert run.store.verify() == []
    assert model.overlapped == [True] * (COUNT // BATCH - 1)


def test_items_arrive_in_order_and_an_error_in_its_turn():
    def broken():
        yield from range(3)
        raise KeyError("fourth")

    seen = []

    def use() -> None:
        for item in ahead(broken()):
            seen.append(item)

    with pytest.raises(KeyError, match="fourth"):
        use()
    assert seen == [0, 1, 2]
    assert list(ahead([])) == []


def test_leaving_early_leaves_no_thread_behind():
    before = threading.active_count()
    for item in ahead(range(10)):
        if item == 2:
            break
    assert threading.active_count() == before


def test_batches_by_length_hold_every_example_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(1, 200, 500)
    parts = list(by_length(lengths, 16))
    assert sorted(np.concatenate(parts).tolist()) == list(range(500))
    padded = [len(part) * lengths[part].max() for part in parts]
    assert max(padded) <= max(16 * lengths.mean(), lengths.max())
    in_order = sum(16 * lengths[i : i + 16].max() for i in range(0, 500, 16))
    assert sum(padded) < 0.6 * in_order


def test_equal_lengths_stay_in_order():
    parts = list(by_length(np.full(10, 7), 4))
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


class Words(torch.nn.Module):
    """A causal model: the mean of the embeddings so far, through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, 8)
        self.out = torch.nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids).cumsum(1)
        return self.out(torch.tanh(x / torch.arange(1, x.shape[1] + 1)[:, None]))


def pad(examples: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(e["input_ids"]) for e in examples)
    return {
        "input_ids": torch.stack(
            [F.pad(e["input_ids"], (0, longest - len(e["input_ids"]))) for e in examples]
        ),
        "attention_mask": torch.stack(
            [(torch.arange(longest) < len(e["input_ids"])).long() for e in examples]
        ),
    }


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2**-7)])
def test_rows_of_texts_do_not_depend_on_how_they_are_batched(tmp_path, dtype, rtol):
    """Padded by other lengths and in another order: the rows of one batch an example."""
    torch.manual_seed(0)
    texts = [
        {"input_ids": torch.randint(0, VOCABULARY, (int(n),)), "id": f"t{i}"}
        for i, n in enumerate(torch.randint(2, 40, (NUM,)))
    ]
    task = tda.Task(Words(), measurement="causal_lm", collate=pad)
    rows, columns = {}, {}
    for size in (1, 5, NUM):
        run = tda.index(
            task, texts, tmp_path / str(size), batch_size=size, dtype=dtype,
            chunk_rows=10, proj_dim=64, progress=False,
        )  # fmt: skip
        table = run.store.table("train")
        rows[size], columns[size] = table.rows(0, 0, NUM), table.column("loss")
        assert run.ids.tolist() == [f"t{i}" for i in range(NUM)]
    for size in (5, NUM):
        torch.testing.assert_close(rows[size], rows[1], rtol=rtol, atol=1e-6)
        np.testing.assert_allclose(columns[size], columns[1], rtol=1e-5)


def finishing(monkeypatch, before: Callable[[Table, int], None]) -> None:
    """``before(table, chunk)`` whenever a chunk is about to be finished."""
    put = Table.put

    def patched(table: Table, checkpoint: int, chunk: int, *parts: Any) -> Callable[[], None]:
        finish = put(table, checkpoint, chunk, *parts)

        def later() -> None:
            before(table, chunk)
            finish()

        return later

    monkeypatch.setattr(Table, "put", patched)


def test_a_chunk_is_finished_while_the_next_is_computed(tmp_path, monkeypatch):
    """So that a disk as slow as the model costs nothing but its last chunk."""
    data, overlapped = Numbered(), []

    def patient(table: Table, chunk: int) -> None:
        last = table.chunk_range(chunk)[1] - 1
        if last < COUNT - 1:
            end = time.monotonic() + 5
            while data.last <= last and time.monotonic() < end:
                time.sleep(0.001)
            overlapped.append(data.last > last)

    finishing(monkeypatch, patient)
    task = tda.Task(torch.nn.Linear(4, 3), measurement="cross_entropy")
    tda.index(task, data, tmp_path / "run", batch_size=BATCH, chunk_rows=BATCH, progress=False)
    assert overlapped == [True] * (COUNT // BATCH - 1)
    assert tda.open(tmp_path / "run").verify() == []


def test_what_fails_in_writing_is_raised_and_the_rest_is_kept(tmp_path, monkeypatch):
    def failing(table: Table, chunk: int) -> None:
        if chunk == 2:
            raise StoreError("the disk is full")

    finishing(monkeypatch, failing)
    task = tda.Task(torch.nn.Linear(4, 3), measurement="cross_entropy")
    with pytest.raises(StoreError, match="the disk is full"):
        tda.index(
            task, Numbered(), tmp_path / "run", batch_size=BATCH, chunk_rows=BATCH, progress=False
        )
    missing = tda.open(tmp_path / "run").store.table("train").missing()
    assert missing == [(0, 2), (0, 3), (0, 4)]


def test_the_writer_is_done_when_the_work_fails():
    done = []

    def work() -> None:
        with behind() as write:
            write(lambda: (time.sleep(0.05), done.append(1)))
            raise ValueError("elsewhere")

    with pytest.raises(ValueError, match="elsewhere"):
        work()
    assert done == [1]
