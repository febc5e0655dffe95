"""The table ``curvature`` holds the Gauss–Newton matrix, and is stored as every table is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import naive
import numpy as np
import problems
import pytest
import stored
import torch
from conftest import make_task
from test_gauss_newton import dense
from torch import nn
from torch.utils.data import default_collate

import tda
from tda.curvature.sampling import draw
from tda.errors import MismatchError, StoreError, TaskError
from tda.measurements import MEASUREMENTS
from tda.store import Table

EXACT = {"projection": "identity", "dtype": "float32", "progress": False}


def gauss_newton(problem: problems.Problem, checkpoint: int) -> np.ndarray:
    """mean_i J_iᵀ (diag p_i − p_i p_iᵀ) J_i [p, p] of a classifier, by explicit Jacobians."""
    model = problem.make()
    model.load_state_dict(problem.checkpoints[checkpoint].state)
    model = model.double().eval()
    total = 0.0
    for i in range(len(problem.train)):
        z = problems.predict(model, naive.as_double(default_collate([problem.train[i]])))[0][0]
        j = np.stack([naive.flat_gradient(one, model) for one in z])
        p = torch.softmax(z, 0).detach().numpy()
        total = total + j.T @ (np.diag(p) - np.outer(p, p)) @ j
    return total / len(problem.train)


def estimate(table: Table, checkpoint: int) -> np.ndarray:
    """(1/R) Σ_r curvature_r x_r x_rᵀ."""
    x = table.rows(checkpoint, 0, table.num_rows).double().numpy()
    h = table.column("curvature")[checkpoint].astype(float)
    return (x.T * h) @ x / table.num_rows


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def net() -> problems.Problem:
    return problems.problem("digits_mlp")


@pytest.fixture(scope="module")
def plain(net, tmp_path_factory) -> Path:
    """An indexed run without the table; copied by those who add to it."""
    path = tmp_path_factory.mktemp("plain") / "run"
    tda.index(make_task(net), net.train, path, chunk_rows=16, **EXACT)
    return path


@pytest.fixture
def run(plain, net, tmp_path) -> Any:
    shutil.copytree(plain, tmp_path / "run")
    return tda.open(tmp_path / "run", task=make_task(net))


# ---- what it holds


@pytest.mark.parametrize("name", ["digits_mlp", "cnn", "frozen"])
def test_all_pairs_give_the_gauss_newton_matrix(name, tmp_path):
    """(1/R) Σ h x xᵀ = mean_i J_iᵀ (diag p_i − p_i p_iᵀ) J_i, at every checkpoint."""
    problem = problems.problem(name)
    run = tda.index(make_task(problem), problem.train, tmp_path / "run", gauss_newton=True, **EXACT)
    table = run.store.table("curvature")
    for checkpoint in range(len(problem.checkpoints)):
        assert relative(estimate(table, checkpoint), gauss_newton(problem, checkpoint)) < 1e-5
    assert table.num_rows % len(problem.train) == 0  # every label of every example
    assert set(table.column("example")) == set(run.ids)


def test_pairs_are_drawn_in_proportion_and_weighted_so_that_sums_are_unbiased():
    """P(pair) = min(1, τ a); E (1/R) Σ weight·y = (1/n) Σ_i Σ_c y_ic, for any y."""
    generator = np.random.default_rng(0)
    a = generator.exponential(size=(12, 5)) ** 3
    y = generator.normal(size=a.shape)
    seeds, rows = 2000, 20
    counts, sums = np.zeros_like(a), np.zeros(seeds)
    for seed in range(seeds):
        sample = draw(a, rows, seed)
        picked = (sample.example, sample.label)
        assert len({*zip(*picked, strict=True)}) == rows  # no pair twice
        counts[picked] += 1
        sums[seed] = (sample.weight * y[picked]).mean()
    frequency = counts / seeds
    sure = frequency == 1
    assert sure.any() and a[sure].min() >= a[~sure].max()
    tau = (rows - sure.sum()) / a[~sure].sum()
    noise = 5 * np.sqrt(0.25 / seeds)
    np.testing.assert_allclose(frequency[~sure], tau * a[~sure], rtol=0, atol=noise)
    assert abs(sums.mean() - y.sum() / 12) < 5 * sums.std() / seeds**0.5


def test_as_many_rows_as_pairs_are_all_pairs_with_equal_weight():
    sample = draw(np.ones((4, 3)), 50)
    assert len(sample.example) == 12 and (sample.weight == 3).all()
    assert draw(np.array([[1.0, 0.0], [0.0, 0.0]]) + 1e-9, 3).weight.max() < np.inf


def test_few_rows_of_a_sure_model_give_nearly_all_of_the_matrix(tmp_path):
    """Where most pairs matter little, a seventh of the pairs is within a tenth of the matrix.

    As many pairs taken at random are not.
    """
    images, labels = problems.load_digits(return_X_y=True)
    x = torch.tensor(images[:100] / 16, dtype=torch.float32)
    y = torch.tensor(labels[:100])
    model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    run = tda.index(tda.Task(model), (x, y), tmp_path / "run", proj_dim=64, progress=False)
    run.add_curvature((x, y), num_rows=1000)
    table = run.store.table("curvature")
    exact = estimate(table, 0)
    rows = table.rows(0, 0, 1000).double().numpy()
    h = table.column("curvature")[0].astype(float)
    picked = np.random.default_rng(0).choice(1000, 140, replace=False)
    at_random = (rows[picked].T * h[picked]) @ rows[picked] / 140
    run.add_curvature((x, y), num_rows=140)
    assert relative(estimate(run.store.table("curvature"), 0), exact) < 0.1
    assert relative(at_random, exact) > 0.3


def causal() -> problems.Problem:
    """The small language model with the loss of its own text, of which 3 to 5 tokens count."""

    def loss(model: Any, batch: Any) -> Any:
        logits, labels = model(batch[0])[0, :-1], batch[1][0, 1:]
        kept = labels != -100
        picked = logits[kept].log_softmax(-1)[torch.arange(int(kept.sum())), labels[kept]]
        return -picked.mean()

    texts = [(x, torch.where(x == 0, -100, x)) for x in problems.padded(11, 6)]
    train, queries = problems.split(texts)
    known = problems.problem("tiny_lm")
    outcome = problems.plain(loss)
    return replace(known, train=train, queries=queries, measurement="causal_lm", outcome=outcome)


@pytest.mark.parametrize("name", ["multi_label", "several_outputs", "causal_lm"])
def test_rows_with_drawn_targets_have_the_gauss_newton_matrix_as_mean(name, tmp_path):
    """Of losses with many outputs: the estimate comes within sampling error of the matrix."""
    problem = causal() if name == "causal_lm" else problems.problem(name)
    problem = replace(problem, checkpoints=problem.checkpoints[:1])
    one = problems.Listed(problem.train.examples[:3])
    run = tda.index(make_task(problem), one, tmp_path / "run", **EXACT)
    run.add_curvature(one, num_rows=1000)
    table = run.store.table("curvature")
    assert table.num_rows == 1000 and "draw" in table.columns()
    exact = dense(problem, 3)
    found = estimate(table, 0)
    assert np.trace(found) == pytest.approx(np.trace(exact), rel=0.1)
    assert relative(found, exact) < 0.2


def test_influence_of_the_table_is_the_written_formula(run, net):
    """influence_gn = −(1/n) ∇ℓ_qᵀ (G + λI)⁻¹ ∇ℓ_i of opposite sign, mean of checkpoints."""
    from tda.recipe import Recipe
    from tda.recipes import get_recipe

    run.add_curvature(net.train)
    recipe: Recipe = get_recipe("influence_gn")
    found = run.scores(net.queries, recipe).compute()
    n, wanted = len(net.train), 0.0
    for c, weights in enumerate(net.checkpoints):
        g = gauss_newton(net, c)
        train = naive.rows(net.make(), weights.state, net.train, net.outcome).dl
        query = naive.rows(net.make(), weights.state, net.queries, net.outcome).dl
        damping = np.trace(g) / n
        wanted = wanted + query @ np.linalg.solve(g + damping * np.eye(len(g)), train.T) / n
    wanted = wanted / len(net.checkpoints)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 1 - 1e-6


# ---- how it is stored


def contents(path: Path) -> dict[str, bytes]:
    """Everything but derived files and locks."""
    parts = stored.contents(path)
    return {
        name: data for name, data in parts.items() if name.startswith(("curvature", "manifest"))
    }


def test_rows_do_not_depend_on_batches(run, net, plain, tmp_path):
    run.add_curvature(net.train, num_rows=30)
    first = run.store.table("curvature")
    shutil.copytree(plain, tmp_path / "other")
    other = tda.open(tmp_path / "other", task=make_task(net))
    other.add_curvature(net.train, num_rows=30, batch_size=7)
    second = other.store.table("curvature")
    assert (first.column("id") == second.column("id")).all()
    for name in ("weight", "curvature", "p", "slope"):
        np.testing.assert_allclose(first.column(name), second.column(name), rtol=1e-4, atol=1e-12)


def test_draws_do_not_depend_on_batches(tmp_path):
    problem = problems.problem("multi_label")
    losses = []
    for size in (64, 7):
        run = tda.index(make_task(problem), problem.train, tmp_path / str(size), **EXACT)
        run.add_curvature(problem.train, num_rows=30, batch_size=size)
        losses.append(run.store.table("curvature").column("loss"))
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("written", range(0, 24, 6))
def test_a_table_interrupted_anywhere_is_continued_to_the_same_bytes(
    run, net, plain, tmp_path, monkeypatch, written
):
    from tda.store import local

    left, write = iter(range(written)), local._write

    def fail(target: Path, parts: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(target, parts)

    monkeypatch.setattr(local, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        run.add_curvature(net.train, num_rows=40)
    monkeypatch.undo()
    tda.open(run.path, task=make_task(net)).add_curvature(net.train, num_rows=40)
    shutil.copytree(plain, tmp_path / "once")
    once = tda.open(tmp_path / "once", task=make_task(net))
    once.add_curvature(net.train, num_rows=40)
    assert contents(run.path) == contents(once.path)
    assert once.store.verify() == [] and len(contents(once.path)) > 30


def test_the_same_call_does_nothing_and_other_numbers_of_rows_begin_anew(run, net):
    run.add_curvature(net.train, num_rows=30)
    before = contents(run.path)
    run.add_curvature(net.train)  # whatever is there will do
    run.add_curvature(net.train, num_rows=30)
    assert contents(run.path) == before
    run.add_curvature(net.train, num_rows=20)
    assert run.store.table("curvature").num_rows == 20 and run.store.verify() == []
    run.add_curvature(net.train, num_rows=1000)
    everything = contents(run.path)
    assert run.store.table("curvature").num_rows == 100
    run.add_curvature(net.train, num_rows=2000)  # there are no more pairs
    assert contents(run.path) == everything


def test_a_training_set_that_grew_makes_the_table_anew(net, plain, tmp_path):
    """To the bytes of a run that was made at once; until then the old table stays usable."""
    longer = problems.Listed([*net.train.examples, *net.queries.examples])
    shutil.copytree(plain, tmp_path / "grown")
    run = tda.open(tmp_path / "grown", task=make_task(net))
    run.add_curvature(net.train, num_rows=50)
    run = tda.index(make_task(net), longer, run.path, chunk_rows=16, **EXACT)
    assert run.store.table("curvature").num_rows == 50 and run.store.verify() == []
    run.add_curvature(longer, num_rows=50)
    once = tda.index(make_task(net), longer, tmp_path / "once", chunk_rows=16, **EXACT)
    once.add_curvature(longer, num_rows=50)
    assert contents(run.path) == contents(once.path)


def test_an_added_checkpoint_is_missing_until_the_same_call_adds_it(net, tmp_path):
    task, more = make_task(net), make_task(net)
    task.checkpoints = task.checkpoints[:2]
    run = tda.index(task, net.train, tmp_path / "run", gauss_newton=True, **EXACT)
    before = stored.contents(run.path / "curvature/rows/c/0")
    run = tda.index(more, net.train, run.path, **EXACT)
    table = run.store.table("curvature")
    assert {checkpoint for checkpoint, _ in table.missing()} == {2}
    with pytest.raises(StoreError, match="add_curvature"):
        table.require_complete()
    run.add_curvature(net.train)
    assert run.store.verify() == []
    assert stored.contents(run.path / "curvature/rows/c/0") == before
    assert relative(estimate(run.store.table("curvature"), 2), gauss_newton(net, 2)) < 1e-5


def test_an_altered_chunk_is_found_and_it_alone_is_computed_again(run, net):
    run.add_curvature(net.train)
    before = contents(run.path)
    chunk = run.path / "curvature/rows/c/1/2/0"
    data = bytearray(chunk.read_bytes())
    data[9] ^= 1
    chunk.write_bytes(data)
    faults = run.store.verify()
    assert [(fault.path, fault.kind) for fault in faults] == [("curvature/rows/c/1/2/0", "altered")]
    assert "add_curvature" in faults[0].do
    assert run.store.table("curvature").missing() == [(1, 2)]
    run.add_curvature(net.train)
    assert contents(run.path) == before


def test_what_rides_along_stays_with_the_training_set(tmp_path):
    """Ids and pictures of examples that are drawn several times."""
    x = torch.randn(6, 5)
    data = {
        "input": x,
        "target": torch.arange(6) % 3,
        "id": [f"é/{i}" for i in range(6)],
        "image": np.zeros((6, 4, 4), np.uint8),
        "text": ["some"] * 6,
    }
    run = tda.index(
        tda.Task(models.perceptron()), data, tmp_path / "run", gauss_newton=True, **EXACT
    )
    table = run.store.table("curvature")
    assert table.num_rows == 18
    assert list(table.column("id")[:3]) == ["é/0/0", "é/0/1", "é/0/2"]
    assert not {"image", "text", "embedding"} & set(table.specs)
    assert run.store.verify() == []


# ---- what is refused


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_a_model_of_one_output_has_its_gauss_newton_matrix_without_a_table(name, tmp_path):
    """ℓ''(f) ∇f∇fᵀ is the whole of it: influence_gn and influence are one."""
    problem, path = problems.problem(name), tmp_path / "run"
    run = tda.index(make_task(problem), problem.train, path, gauss_newton=True, **EXACT)
    assert not (path / "curvature").exists()
    found, same = (run.scores(problem.queries, r).compute() for r in ("influence_gn", "influence"))
    np.testing.assert_allclose(found, same, rtol=1e-5, atol=1e-6 * np.abs(same).max())


def test_a_custom_measurement_of_one_output_takes_a_table_or_says_what_it_lacks(tmp_path):
    """Of its own link nothing is known but that draws of its likelihood give the matrix."""
    problem, own = problems.problem("ridge"), replace(MEASUREMENTS["squared_error"], name="own")
    first = make_task(problem).checkpoints[:1]
    same = tda.Task(problem.make(), first, "squared_error")
    exact = tda.index(same, problem.train, tmp_path / "exact", **EXACT)
    task = tda.Task(problem.make(), first, own)
    run = tda.index(task, problem.train, tmp_path / "drawn", **EXACT)
    run.add_curvature(problem.train, num_rows=2000)
    rows = exact.store.table("train").rows(0, 0, len(problem.train)).double().numpy()
    assert relative(estimate(run.store.table("curvature"), 0), rows.T @ rows / len(rows)) < 0.2
    assert run.scores(problem.queries, "influence_gn").compute().shape[0] == len(problem.queries)
    silent = tda.Task(problem.make(), first, replace(own, draw=None))
    with pytest.raises(TaskError, match=r"'own' is not known[^§]*no likelihood[^§]*`draw`"):
        tda.open(run.path, silent).add_curvature(problem.train)


def test_a_loss_without_a_likelihood_is_refused(tmp_path):
    problem = problems.problem("callable_loss")
    run = tda.index(make_task(problem), problem.train, tmp_path / "run", **EXACT)
    with pytest.raises(TaskError, match="no likelihood"):
        run.add_curvature(problem.train)


def test_other_data_than_the_training_set_are_refused(run, net):
    with pytest.raises(MismatchError, match="3 examples"):
        run.add_curvature(net.queries)
    other = problems.Listed([*net.train.examples[:9], net.queries.examples[0]])
    with pytest.raises(MismatchError, match="row 9"):
        run.add_curvature(other)
    with pytest.raises(StoreError, match="no curvature table"):
        run.store.table("curvature")
    with pytest.raises(TaskError, match="needs rows"):
        run.add_curvature(net.train, num_rows=0)
    with pytest.raises(TaskError, match="needs the task"):
        tda.open(run.path).add_curvature(net.train)


def test_a_configuration_asks_for_the_table_by_one_key(tmp_path):
    from tda.cli.planning import plan
    from tda.cli.workload import index_workload
    from tda.config import load_config

    (tmp_path / "job.py").write_text(
        "import torch, tda\n"
        "def task(): return tda.Task(torch.nn.Linear(4, 3))\n"
        "def train(): return torch.ones(9, 4), torch.arange(9) % 3\n"
    )
    (tmp_path / "c.toml").write_text(
        f'[run]\npath = "{tmp_path}/run"\n'
        '[workload]\ntask = "job.py:task"\ntrain = "job.py:train"\n'
        "[projection]\ndim = 5\n[index]\ngauss_newton = true\n"
    )
    config = load_config(tmp_path / "c.toml")
    path = index_workload(config)
    table = tda.open(path).store.table("curvature")
    assert table.num_rows == 20 and table.dtype == "bfloat16"  # 4 a dimension, of 27 pairs
    planned = plan(config)
    assert planned.num_curvature == 20
    without = plan(load_config(tmp_path / "c.toml", ["index.gauss_newton=false"]))
    assert without.num_curvature == 0 and without.bytes_on_disk < planned.bytes_on_disk
