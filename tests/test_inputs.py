"""Equal inputs are known by a digest of their own: under several labels too, whatever the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import saturated
from sklearn.datasets import make_moons
from stored import contents, flip
from test_upkeep import asked, data, make_task

import tda
from tda import indexing, valuation
from tda.data import as_dataset
from tda.examples import describe
from tda.growing import compact, relabel
from tda.repair import repair
from tda.run import Run

COLUMN = "input_digest"
NUM, PLANTED = 200, 40


def moons(path: Path) -> Run:
    """Two moons read by a small network that they saturate. The last PLANTED training examples are
    the first ones with the other label, and the last queries those that follow them."""
    x, y = make_moons(2 * NUM, noise=0.1, random_state=0)
    inputs, labels = torch.tensor(x).float(), torch.tensor(y)
    model = saturated(inputs[:NUM], labels[:NUM])
    train, test = (
        (torch.cat([inputs[own], inputs[copied]]), torch.cat([labels[own], 1 - labels[copied]]))
        for own, copied in (
            (slice(0, NUM), slice(0, PLANTED)),
            (slice(NUM, None), slice(PLANTED, 2 * PLANTED)),
        )
    )
    run = tda.index(tda.Task(model), train, path, proj_dim=64, progress=False)
    run.add_queries(test, "test")
    return run


@pytest.fixture
def before(monkeypatch) -> None:
    """Runs are begun as they were when there was no such column."""

    def without(*given: Any) -> Any:
        return dataclasses.replace(describe(*given), inputs=None)

    monkeypatch.setattr(indexing, "describe", without)


def test_equal_inputs_under_several_labels_are_found_in_a_saturated_network(tmp_path):
    run = moons(tmp_path / "run")
    copies, leaks = valuation.duplicates(run), valuation.leakage(run, "test")
    first = np.arange(PLANTED)
    wanted = (first, NUM + first), (NUM + first, PLANTED + first)
    for pairs, (left, right) in zip((copies.pairs, leaks.pairs), wanted, strict=True):
        assert pairs.left.tolist() == left.tolist() and pairs.right.tolist() == right.tolist()
        assert pairs.same_input.all() and not pairs.exact.any() and (pairs.similarity == 1).all()
        assert (pairs.gradient < 0).all()
    assert copies.conflicting.all() and len(copies.member) == 2 * PLANTED
    assert leaks.to_frame()["same_input"].all()


def test_without_the_column_the_model_tells(tmp_path, before):
    run = moons(tmp_path / "run")
    assert COLUMN not in run.store.table("train").columns()
    assert COLUMN in run.store.table("queries/test").columns()  # asked today: of no use alone
    for pairs in valuation.duplicates(run).pairs, valuation.leakage(run, "test").pairs:
        assert len(pairs) < PLANTED and (pairs.same_input == pairs.exact).all()


def test_without_last_layers_equal_inputs_have_opposed_gradients(tmp_path):
    """Examples are then compared by their gradients: the cosine of the space is not theirs."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    x[9:] = x[:3]
    y = torch.arange(12) % 2
    y[9:] = torch.tensor([0, 0, 0])  # as, unlike and as the first three

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return (inputs * self.weight).sum(1, keepdim=True)

    task = tda.Task(Scaled(), measurement="binary_cross_entropy")
    run = tda.index(task, (x, y), tmp_path / "run", proj_dim=16, progress=False)
    assert run.store.table("train").hidden is None
    found = valuation.duplicates(run).pairs
    assert (found.similarity == 1).all()
    np.testing.assert_allclose(found.gradient, [1, -1, 1], atol=1e-4)
    assert found.same_input.tolist() == [True] * 3
    assert found.exact.tolist() == [True, False, True]


def kept(run: Run, name: str = "train") -> np.ndarray | None:
    table = run.store.table(name)
    return table.column(COLUMN) if COLUMN in table.columns() else None


def index(path: Path, examples: list[dict[str, Any]]) -> Run:
    return tda.index(make_task(), examples, path, proj_dim=16, chunk_rows=6, progress=False)


def test_the_column_stays_while_a_run_changes(tmp_path):
    """Resumed, grown, relabelled, compacted, repaired: it is that of the inputs there are."""
    every, path = data(), tmp_path / "run"
    wanted = describe(as_dataset(every)).inputs
    run = index(path, every[:10])
    np.testing.assert_array_equal(kept(run), wanted[:10])
    np.testing.assert_array_equal(kept(index(path, every[:10])), wanted[:10])
    np.testing.assert_array_equal(kept(index(path, every)), wanted)
    run = tda.open(path, task=make_task())
    run.add_queries(asked(), "q")
    np.testing.assert_array_equal(kept(run, "queries/q"), wanted[:4])
    assert relabel(run, data(relabelled=3)).ids.tolist() == ["e3"]
    np.testing.assert_array_equal(kept(run), wanted)  # another label, the same input
    whole = contents(path / "train")
    flip(path / "train" / COLUMN / "c" / "0" / "0")
    assert not repair(run, data(relabelled=3)).after
    assert contents(path / "train") == whole
    run.delete(["e0"])
    np.testing.assert_array_equal(kept(run), wanted[1:])
    compact(path, tmp_path / "compact")
    np.testing.assert_array_equal(kept(tda.open(tmp_path / "compact")), wanted[1:])


def test_a_run_begun_without_the_column_goes_on_without_it(tmp_path, before, monkeypatch):
    """Not a byte is another one when it resumes, and it grows, changes and is repaired."""
    every, path = data(), tmp_path / "run"
    index(path, every[:10])
    whole = contents(path / "train")
    monkeypatch.undo()
    run = index(path, every[:10])
    assert contents(path / "train") == whole and kept(run) is None and not run.verify()
    run = index(path, every)
    relabel(run, data(relabelled=3))
    flip(path / "train" / "rows" / "c" / "0" / "1" / "0")
    assert not repair(run, data(relabelled=3)).after
    assert len(run.ids) == len(every) and kept(run) is None
    compact(path, tmp_path / "compact")
    assert kept(tda.open(tmp_path / "compact")) is None


X, Y = torch.randn(6, 4), torch.arange(6) % 2
WITH_TARGET: dict[str, Any] = {
    "tuple": lambda y: (X, y),
    "target last": lambda y: {"input": X, "target": y},
    "target in the middle": lambda y: {"attention": X > 0, "labels": y, "type": X.half()},
    "target first": lambda y: {"label": y, "pixels": X},
    "several inputs": lambda y: (X, X.bool(), y),
    "another label shown": lambda y: {"input": X, "target": y, "label": Y},
    "one by one": lambda y: [*zip(X, y, strict=True)],
    "text": lambda y: [{"sentence": str(x), "target": one} for x, one in zip(X, y, strict=True)],
}


@pytest.mark.parametrize("name", WITH_TARGET)
def test_the_digest_of_an_input_is_blind_to_the_target_alone(name):
    made = WITH_TARGET[name]
    one, other = (describe(as_dataset(made(y))) for y in (Y, 1 - Y))
    assert one.inputs is not None
    np.testing.assert_array_equal(one.inputs, other.inputs)
    assert (one.digests != other.digests).any(1).all()
    assert len(np.unique(one.inputs, axis=0)) == len(X)


@pytest.mark.parametrize(
    "made",
    [
        X,
        {"input_ids": Y[:, None], "attention_mask": Y[:, None]},
        {"labels": Y[:, None]},  # a target and nothing it is asked of
        [(x,) for x in X],
        [{"input": X[0], "target": 1}, {"input": X[1]}],
    ],
    ids=["array", "tokens", "a target alone", "one by one", "one without"],
)
def test_without_targets_there_is_no_digest_of_inputs(made):
    assert describe(as_dataset(made)).inputs is None
