"""Ground truth by retraining: right where it can be worked out, kept, resumed, and never mixed."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from test_cli import CONFIG, JOB, ran
from torch import nn

import tda
from tda import evaluate
from tda.errors import ConfigError, DataError, MismatchError, StoreError, TaskError
from tda.evaluate import Design, GroundTruth, ground_truth, record
from tda.evaluate.ensemble import Ensemble

NUM_TRAIN, NUM_QUERIES, WIDTH, RIDGE = 40, 5, 4, 2.0


class Regression:
    """Ridge regression: train on a subset by solving θ = (XᵀX + ρI)⁻¹ Xᵀy."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.X, self.Q = rng.normal(size=(NUM_TRAIN, WIDTH)), rng.normal(size=(NUM_QUERIES, WIDTH))
        truth = rng.normal(size=WIDTH)
        self.y = self.X @ truth + rng.normal(size=NUM_TRAIN)
        self.z = self.Q @ truth + rng.normal(size=NUM_QUERIES)
        self.calls: list[int] = []

    def inverse(self) -> np.ndarray:
        return np.linalg.inv(self.X.T @ self.X + RIDGE * np.eye(WIDTH))

    def solve(self, subset: np.ndarray) -> np.ndarray:
        X, y = self.X[subset], self.y[subset]
        return np.linalg.solve(X.T @ X + RIDGE * np.eye(WIDTH), X.T @ y)

    def train(self, subset: np.ndarray, seed: int) -> nn.Module:
        self.calls.append(len(subset))
        model = nn.Linear(WIDTH, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(self.solve(subset))[None])
        return model

    @property
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        return self.X.astype("f4"), self.y.astype("f4")

    @property
    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        return self.Q.astype("f4"), self.z.astype("f4")


@pytest.fixture
def regression() -> Regression:
    return Regression()


@pytest.fixture
def run(regression, index_exactly) -> Any:
    model = regression.train(np.arange(NUM_TRAIN), 0)
    regression.calls.clear()
    return index_exactly(tda.Task(model, measurement="squared_error"), regression.data)


def retrain(run, regression, design, train=None, **options: Any) -> GroundTruth:
    given = {"queries": regression.queries, "progress": False, **options}
    return ground_truth(run, train or regression.train, design=design, **given)


def digests(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


# ---- what is measured


def test_leave_one_out_of_ridge_regression_has_a_closed_form(run, regression):
    """θ_{−i} = θ − (XᵀX + ρI)⁻¹ x_i e_i / (1 − h_i),  e = y − Xθ,  h_i = x_iᵀ(XᵀX + ρI)⁻¹x_i."""
    design = Design(kind="leave_one_out", num_subsets=NUM_TRAIN)
    truth = retrain(run, regression, design)
    X, inverse = regression.X, regression.inverse()
    theta = inverse @ X.T @ regression.y
    leverage = np.einsum("ij,jk,ik->i", X, inverse, X)
    moved = (inverse @ X.T * ((regression.y - X @ theta) / (1 - leverage))).T
    left_out = (truth.masks == 0).argmax(1)
    predicted = regression.Q @ (theta - moved[left_out]).T
    expected = -0.5 * (predicted - regression.z[:, None]).T ** 2
    np.testing.assert_allclose(truth.outputs[:, 0], expected, rtol=1e-4, atol=1e-5)
    trace = (X**2).sum() / NUM_TRAIN
    recipe = replace(tda.RECIPES["influence"], damping=RIDGE / NUM_TRAIN / (trace / WIDTH))
    scores = run.scores(regression.queries, recipe=recipe)
    assert evaluate.leave_one_out_correlation(scores, truth).value > 0.97
    assert evaluate.lds(scores, truth).value > 0.97


def test_outputs_of_a_margin_are_the_margin(index_exactly):
    X = np.random.default_rng(0).normal(size=(6, 3)).astype("f4")
    y = np.array([0, 1, 1, 0, 1, 0])
    model = nn.Linear(3, 2)
    run = index_exactly(tda.Task(model), (X, y))
    truth = ground_truth(
        run, lambda subset, seed: model, (X, y), Design(num_subsets=1), progress=False
    )
    p = torch.softmax(model(torch.from_numpy(X)), 1).detach().numpy()[np.arange(6), y]
    np.testing.assert_allclose(truth.outputs[0, 0], np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)


def test_train_may_return_the_outputs_and_is_seeded(run, regression):
    def train(subset, seed):
        return [seed % 1000, len(subset), *torch.rand(NUM_QUERIES - 2)]

    design = Design(kind="removal", fraction=0.1, num_subsets=2, seeds=(5, 6))
    taskless = tda.open(run.path)
    truth = retrain(taskless, regression, design, train)
    np.testing.assert_array_equal(truth.outputs[:, :, 0], [[5, 6], [5, 6]])
    np.testing.assert_array_equal(truth.outputs[:, :, 1], 36)
    np.testing.assert_array_equal(truth.outputs[0], truth.outputs[1])
    assert (truth.outputs[:, 0, 2:] != truth.outputs[:, 1, 2:]).all()
    with pytest.raises(TaskError, match="needs the task"):
        retrain(taskless, regression, design, name="other")


@pytest.mark.parametrize(
    ("outputs", "error"),
    [([1.0, 2.0], DataError), ([1, 2, np.nan, 4, 5], TaskError), ([np.inf] * 5, TaskError)],
)
def test_outputs_that_cannot_be_kept_are_refused(run, regression, outputs, error):
    with pytest.raises(error):
        retrain(run, regression, Design(num_subsets=1), lambda subset, seed: outputs)


def test_an_error_in_train_keeps_its_type_and_says_which_retraining(run, regression):
    def train(subset, seed):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        retrain(run, regression, Design(num_subsets=1), train)
    assert "subset 0, seed 0" in caught.value.__notes__[0]


def test_tail_patch_of_a_linear_model_by_hand(regression):
    """θ′ = θ − η·mean_i (x_i·θ − y_i) x_i ; gain = ½(q·θ − z)² − ½(q·θ′ − z)²."""
    model = regression.train(np.arange(NUM_TRAIN), 0)
    theta, top = regression.solve(np.arange(NUM_TRAIN)), np.array([[1, 2, 3]] * NUM_QUERIES)
    top[0] = [7, 8, 9]
    X, errors = regression.X, regression.X @ theta - regression.y
    gains = []
    for q, z, some in zip(regression.Q, regression.z, top, strict=True):
        moved = theta - 0.1 * (X[some] * errors[some, None]).mean(0)
        gains.append((q @ theta - z) ** 2 / 2 - (q @ moved - z) ** 2 / 2)
    task = tda.Task(model, measurement="squared_error")
    found = evaluate.tail_patch(task, regression.data, regression.queries, top, 0.1)
    assert found.value == pytest.approx(np.mean(gains), rel=1e-4)
    torch.testing.assert_close(model.weight[0].double(), torch.from_numpy(theta), check_dtype=False)
    with pytest.raises(DataError):
        evaluate.tail_patch(task, regression.data, regression.queries, top[1:], 0.1)


class Twice(nn.Module):
    """⟨w, x⟩, w under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, 1, bias=False)
        self.same = nn.Linear(WIDTH, 1, bias=False)
        self.same.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.one(x) + self.same(x)) / 2


def test_tail_patch_takes_weights_that_lack_a_tied_key_and_no_others(regression):
    """As safetensors writes them; they count once, and are those of the checkpoint."""
    plain = regression.train(np.arange(NUM_TRAIN), 0)
    top = np.array([[1, 2, 3]] * NUM_QUERIES)

    def found(model: nn.Module, *names: str) -> float:
        task = tda.Task(model, [dict.fromkeys(names, plain.weight)], "squared_error")
        return evaluate.tail_patch(task, regression.data, regression.queries, top, 0.1).value

    wanted = found(plain, "weight")
    assert found(Twice(), "same.weight") == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(TaskError, match="does not fit"):
        found(Twice(), "same.weight", "other")


# ---- kept and resumed


def stopped_after(count: int, regression: Regression) -> Callable:
    @functools.wraps(regression.train)
    def train(subset, seed):
        if len(regression.calls) == count:
            raise KeyboardInterrupt
        return regression.train(subset, seed)

    train.digest = "the same"  # type: ignore[attr-defined]
    return train


def test_a_function_made_with_another_rate_is_another_function(run, regression):
    def made(scale: float) -> Callable:
        return lambda subset, seed: np.full(5, scale * subset.sum(), np.float32)

    def scaled(subset, seed, scale):
        return made(scale)(subset, seed)

    design = Design(num_subsets=2)
    for name, one, other in (
        ("closure", made(1.0), made(5.0)),
        ("partial", functools.partial(scaled, scale=1.0), functools.partial(scaled, scale=5.0)),
    ):
        first = retrain(run, regression, design, one, name=name)
        again = retrain(run, regression, design, one, name=name)
        np.testing.assert_array_equal(first.outputs, again.outputs)
        with pytest.raises(MismatchError):
            retrain(run, regression, design, other, name=name)


def test_an_interrupted_ground_truth_resumes_to_the_same_bytes(run, regression):
    design = Design(num_subsets=5, seeds=(0, 1))
    whole = retrain(run, regression, design, stopped_after(99, regression), name="whole")
    regression.calls.clear()
    for kept in (3, 7):  # stopped twice
        with pytest.raises(KeyboardInterrupt):
            retrain(run, regression, design, stopped_after(kept, regression), name="parts")
    assert len(regression.calls) == 7
    parts = retrain(run, regression, design, stopped_after(99, regression), name="parts")
    assert len(regression.calls) == 10
    np.testing.assert_array_equal(parts.outputs, whole.outputs)
    assert digests(run.path / "evaluate/parts") == digests(run.path / "evaluate/whole")
    retrain(run, regression, design, stopped_after(0, regression), name="parts")  # nothing to do


def test_the_progress_of_retraining_counts_models(run, regression, capsys):
    retrain(run, regression, Design(num_subsets=4), name="told", progress=True)
    assert capsys.readouterr().err.startswith("retraining: 4 of 4 models, ")


def test_a_larger_design_trains_only_what_is_new(run, regression, monkeypatch):
    monkeypatch.setattr(record, "_MASK_ROWS", 4)  # the larger one has more chunks of masks
    small = retrain(run, regression, Design(num_subsets=3))
    large = retrain(run, regression, Design(num_subsets=9, seeds=(0, 1)))
    assert len(regression.calls) == 18
    np.testing.assert_array_equal(large.outputs[:3, :1], small.outputs)
    again = retrain(run, regression, Design(num_subsets=3))
    assert len(regression.calls) == 18
    np.testing.assert_array_equal(again.outputs, small.outputs)
    retrain(run, regression, Design(num_subsets=9, seeds=(0, 1)), name="fresh")
    assert digests(run.path / "evaluate/half") == digests(run.path / "evaluate/fresh")


def test_a_damaged_retraining_is_done_again(run, regression):
    design = Design(num_subsets=3)
    retrain(run, regression, design)
    folder = run.path / "evaluate/half"
    before, chunk = digests(folder), folder / "outputs/c/1/0/0"
    data = bytearray(chunk.read_bytes())
    data[2] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="not finished"):
        GroundTruth.open(folder)
    retrain(run, regression, design)
    assert len(regression.calls) == 4
    assert digests(folder) == before


@pytest.mark.slow
def test_worker_processes_change_nothing(run, regression):
    design = Design(num_subsets=6)
    alone = retrain(run, regression, design)
    together = retrain(run, regression, design, name="together", workers=2)
    np.testing.assert_array_equal(alone.outputs, together.outputs)


def test_any_zarr_reader_opens_it(run, regression):
    truth = retrain(run, regression, Design(num_subsets=3, seeds=(0, 1)))
    group = zarr.open_group(run.path / "evaluate/half", mode="r")
    outputs, masks = group["outputs"], group["masks"]
    np.testing.assert_array_equal(outputs[:], truth.outputs)
    np.testing.assert_array_equal(masks[:], truth.masks)
    assert outputs.metadata.dimension_names == ("subset", "seed", "query")
    assert masks.metadata.dimension_names == ("subset", "train")
    assert np.isnan(outputs.fill_value)
    assert "Crc32cCodec" in str(outputs.metadata.codecs)
    opened = GroundTruth.open(run.path / "evaluate/half")
    np.testing.assert_array_equal(opened.outputs, truth.outputs)
    assert run.store.verify() == []


def test_another_workload_is_never_mixed_in(run, regression, index_exactly):
    retrain(run, regression, Design(num_subsets=2, seeds=(1,)))
    others: list[tuple[str, dict[str, Any], Design]] = [
        ("queries", {"queries": regression.data}, Design(num_subsets=2, seeds=(1,))),
        ("train_function", {"train": lambda subset, seed: None}, Design(seeds=(1,))),
        ("design", {}, Design(fraction=0.4, seeds=(1,))),
        ("seeds", {}, Design(seeds=(2,))),
    ]
    before = digests(run.path / "evaluate")
    for name, options, design in others:
        with pytest.raises(MismatchError, match=name):
            retrain(run, regression, design, **options)
    assert digests(run.path / "evaluate") == before
    more = [np.concatenate([a, a[:1] + 1]) for a in regression.data]
    grown = index_exactly(run.task, tuple(more), run.path)
    with pytest.raises(MismatchError, match="train"):
        retrain(grown, regression, Design(num_subsets=2, seeds=(1,)))
    with pytest.raises(ConfigError):
        retrain(run, regression, Design(), name="../outside")


def test_a_comparison_refuses_other_queries(run, regression):
    truth = retrain(run, regression, Design(num_subsets=4))
    name = run.add_queries(regression.data, "other")
    with pytest.raises(MismatchError, match="query set"):
        evaluate.compare(run, truth, name, ["influence"])


# ---- many networks at once


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))


def squared(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output[:, 0] - target).square().mean()


def ensemble(regression: Regression, **options: Any) -> Ensemble:
    inputs, targets = map(torch.from_numpy, regression.data)
    given = {"steps": 12, "batch_size": 6, "momentum": 0.9, "weight_decay": 0.01, "group": 4}
    return Ensemble(
        model=network,
        inputs=inputs,
        targets=targets,
        learning_rate=lambda step: 0.1 / (1 + step),
        loss=squared,
        **{**given, **options},
    )


def test_networks_trained_together_are_those_torch_trains_one_by_one(regression):
    together = ensemble(regression)
    given = [(np.arange(i, NUM_TRAIN, 2), i) for i in range(4)]
    for (subset, seed), found in zip(given, together.many(given), strict=True):
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for step, rows in enumerate(together.order(subset, seed)):
            assert set(rows.tolist()) <= set(subset.tolist())
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.zero_grad()
            squared(model(together.inputs[rows]), together.targets[rows]).backward()
            optimizer.step()
        for a, b in zip(model.parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_ensemble_resumes_to_the_same_bytes(run, regression):
    design, train = Design(num_subsets=6), ensemble(regression)
    whole = retrain(run, regression, design, train)
    folder = run.path / "evaluate/half"
    before = digests(folder)
    for unit in (1, 5):
        (folder / f"done/{unit}-0.json").unlink()
        (folder / f"outputs/c/{unit}/0/0").unlink()
    again = retrain(run, regression, design, train)
    np.testing.assert_array_equal(again.outputs, whole.outputs)
    assert digests(folder) == before
    assert np.unique(whole.outputs[:, 0, 0]).size == 6
    with pytest.raises(MismatchError, match="train_function"):
        retrain(run, regression, design, ensemble(regression, momentum=0.5))


def test_networks_with_buffers_are_refused(regression):
    train = replace(ensemble(regression), model=lambda: nn.BatchNorm1d(WIDTH))
    with pytest.raises(TaskError, match="buffers"):
        train(np.arange(10), 0)


class Tied(nn.Module):
    """Wᵀ tanh(W V x), V fixed and of each network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fixed = nn.Linear(8, WIDTH, bias=False), nn.Linear(WIDTH, 8)
        self.last = nn.Linear(8, WIDTH, bias=False)
        self.last.weight = self.first.weight
        self.fixed.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(self.fixed(x)).tanh() @ self.last.weight


@pytest.mark.parametrize("keep_order", [False, True])
def test_what_is_tied_stays_tied_and_what_is_fixed_stays_as_it_was_made(regression, keep_order):
    """As a replay trains the same, to the same weights."""
    train = replace(ensemble(regression, keep_order=keep_order), model=Tied)
    whole = np.arange(NUM_TRAIN)
    for seed, found in enumerate(train.many([(whole, seed) for seed in range(3)])):
        assert found.last.weight is found.first.weight
        torch.testing.assert_close(found.fixed.state_dict(), train.fresh(seed).fixed.state_dict())
        wanted = tda.Training.of(train, seed).run()
        torch.testing.assert_close(found.state_dict(), wanted.state_dict(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found.first.weight, train.fresh(seed).first.weight, atol=1e-2)


class Attending(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 1, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x[None], x[None], x[None])[0][0]


def dropping(dropout: float) -> nn.Module:
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(WIDTH, 1))


@pytest.mark.parametrize("make", [dropping, Attending])
def test_dropout_is_refused_where_it_is_active(regression, make):
    """Of one seed there would be another network each time."""
    train = replace(ensemble(regression), model=lambda: make(0.5))
    with pytest.raises(TaskError, match="random numbers"):
        train(np.arange(10), 0)
    for inactive in (lambda: make(0.0), lambda: make(0.5).eval()):
        one, other = (replace(train, model=inactive)(np.arange(10), 0) for _ in range(2))
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


# ---- the command

EVALUATE = """
[evaluate]
train = "job.py:retrain"
num_subsets = 6
seeds = [0, 1]
"""

RETRAIN = """
def retrain(subset, seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(6, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(X[subset]), Y[subset]).backward()
        optimizer.step()
    return model
"""


def test_evaluate_command_prints_and_keeps_a_table(tmp_path):
    (tmp_path / "job.py").write_text(JOB + RETRAIN)
    file = tmp_path / "workload.toml"
    file.write_text(CONFIG.format(path=tmp_path / "run") + EVALUATE)
    ran("index", file)
    output = ran("evaluate", file).output
    for name in tda.RECIPES:
        assert name in output
    results = tmp_path / "run/evaluate/half/results.json"
    assert output.splitlines()[-1] == str(results.absolute())
    found = json.loads(results.read_text())
    assert (found["num_subsets"], found["num_seeds"], found["num_queries"]) == (6, 2, 4)
    assert {row["recipe"] for row in found["rows"]} == set(tda.RECIPES)
    values = [row["lds"]["value"] for row in found["rows"] if row["lds"]]
    assert len(values) > 5
    assert all(row["lds"] or row["why_not"] for row in found["rows"])
    assert values == sorted(values, reverse=True)
    assert max(values) > 0
    assert 0 <= found["noise_ceiling"]["value"] <= 1
    only = ran("evaluate", file, "--recipe", "trak", "--set", "evaluate.num_subsets=4").output
    assert "trak" in only
    assert "grad_dot" not in only
    two = ("evaluate", file, "--set", "workload.queries.more=job.py:more")
    assert "name one with --queries" in ran(*two, code=1).output
    few = ("--name", "few", "--recipe", "trak", "--set", "evaluate.num_subsets=2")
    assert "3 queries 'more'" in ran(*two, "--queries", "more", *few).output
    text = file.read_text()
    file.write_text(text[: text.index("[evaluate]")])
    assert "[evaluate] train" in ran("evaluate", file, code=1).output
