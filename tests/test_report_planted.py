"""A real run with planted faults, from the command line: the report finds them and is checked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from report_run import Page, numbers_of
from sklearn.datasets import load_digits
from typer.testing import CliRunner

import tda
from tda import valuation
from tda.cli import app
from tda.report.difference import read_before
from tda.valuation import significance_of

JOB = """
import numpy as np
import torch
from sklearn.datasets import load_digits

import tda

digits = load_digits()
X = torch.tensor(digits.data / 16, dtype=torch.float32)
TRUE = torch.tensor(digits.target)
N = 260                         # then 8 copies of the first, then 5 test images
WRONG = np.arange(20, 32)
INDEX = np.concatenate([np.arange(N), np.arange(8), np.arange(500, 505)])
Y = TRUE[INDEX].clone()
Y[WRONG] = (Y[WRONG] + 1 + torch.arange(12) % 9) % 10


def network():
    return torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10))


def train(subset, seed, relabel=None):
    torch.manual_seed(seed)
    model, labels = network(), Y.clone()
    for index, label in (relabel or {}).items():
        labels[index] = label
    x, y = X[INDEX][subset], labels[subset]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def task():
    states = [train(np.arange(len(INDEX)), seed).state_dict() for seed in range(3)]
    steps = [tda.Checkpoint(s, step=60, learning_rate=0.5, momentum=0.8) for s in states]
    return tda.Task(network(), checkpoints=steps)


def train_set():
    source = ["scan" if i % 2 else "form" for i in range(len(INDEX))]
    return {"input": X[INDEX], "target": Y, "id": [f"t{i}" for i in range(len(INDEX))],
            "source": source}


def test():
    return {"input": X[500:580], "target": TRUE[500:580], "id": [f"q{i}" for i in range(80)]}
"""

CONFIG = """
[run]
path = "{path}"
[workload]
task = "job.py:task"
train = "job.py:train_set"
queries = {{ test = "job.py:test" }}
[projection]
dim = 256
[index]
dtype = "float32"
[evaluate]
train = "job.py:train"
num_subsets = 4
seeds = [0]
"""


def ran(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "job.py").write_text(JOB)
    file = folder / "planted.toml"
    file.write_text(CONFIG.format(path=folder / "run"))
    ran("index", file)
    ran("evaluate", file, "--recipe", "influence")
    ran("report", file, "--retrain")
    return file


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    return config.parent / "run"


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    return parquet.read_table(path).to_pylist()


def test_planted_faults_are_found_and_proposed(run):
    """Copies and leaks all, 9 of 12 wrong labels, with the true one suggested."""
    with (run / "actions.csv").open() as file:
        actions = {row["id"]: row for row in csv.DictReader(file)}
    wanted = {f"t{i}" for i in range(260, 273)}
    assert wanted <= {name for name, row in actions.items() if row["action"] == "remove"}
    target = load_digits().target
    found = [actions.get(f"t{i}") for i in range(20, 32)]
    right = [row is not None and row["label"] == str(target[20 + i]) for i, row in enumerate(found)]
    assert sum(right) >= 9
    relabelled = [row for row in actions.values() if row["action"] == "relabel"]
    assert len(relabelled) < 30


def test_values_of_the_file_are_those_of_the_library(run):
    found = valuation.values(tda.open(run), "test", "influence")
    table = rows(run / "values.parquet")
    assert list(table[0])[:7] == [
        "id", "value", "ci_lo", "ci_hi", "self_influence", "group", "flags"
    ]  # fmt: skip
    per_query = significance_of(found.replicates[:, 0] / 80)
    for name, wanted in (
        ("value", per_query.value),
        ("ci_lo", per_query.low),
        ("ci_hi", per_query.high),
    ):
        got = np.array([row[name] for row in table])
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-8)
    flags = {row["id"]: row["flags"] for row in table}
    assert "duplicate" in flags["t0"] and "duplicate" in flags["t260"]
    assert "leaked" in flags["t270"] and "leaked" not in flags["t100"]


def test_answers_of_the_file_are_those_of_the_engine(run):
    top = tda.open(run).top_k("test", k=6, recipe="influence")
    table = [row for row in rows(run / "top_k.parquet") if row["query"] == "q7"]
    mine = [row["train"] for row in table if row["side"] == "proponents"]
    assert mine == top.proponents.ids[7][: len(mine)].tolist() and len(mine) >= 5
    assert all(row["score"] < 0 for row in table if row["side"] == "opponents")


def test_the_page_says_what_was_retrained_and_every_number_is_in_the_summary(run, summary):
    page = Page((run / "report.html").read_text())
    known = numbers_of(summary)
    shown = [float(v) for tag, a in page.elements if tag == "data" for v in a.values()]
    assert [value for value in shown if value not in known] == []
    assert summary["trust"]["checks"]["lds_half"]["value"] is not None
    assert summary["trust"]["checks"]["projection"]["value"] > 0.5
    assert len(summary["card"]["checkpoints"]) == 3
    assert all(each["damping"] > 0 for each in summary["card"]["checkpoints"])
    measured = {each["name"]: each for each in summary["removal"]["measured"]}
    assert measured["proposed removals"]["count"] >= 13
    assert (
        measured["proposed labels"]["relabelled"] == summary["decisions"]["num_actions"]["relabel"]
    )


def test_removing_the_valuable_hurts_more_than_removing_the_harmful(summary):
    """What was predicted, and what retraining shows."""
    measured = {each["name"]: each for each in summary["removal"]["measured"]}
    for key in ("predicted", "change"):
        valuable = measured["most valuable 10% left out (influence)"][key]
        assert valuable > measured["most harmful 10% left out (influence)"][key]


def test_measured_is_what_retraining_by_hand_gives(config, summary):
    """mean_q ℓ(q; without the proposed) − ℓ(q; all), the same function called directly."""
    import torch

    from tda.code import load_code

    train = load_code("job.py:train", config.parent)
    job = train.__globals__
    with (config.parent / "run" / "actions.csv").open() as file:
        actions = list(csv.DictReader(file))
    removed = [int(row["index"]) for row in actions if row["action"] == "remove"]
    labels = {int(r["index"]): int(r["label"]) for r in actions if r["action"] == "relabel"}

    def loss(subset: np.ndarray, **how: Any) -> float:
        torch.manual_seed(0)
        model = train(subset, 0, **how).eval()
        with torch.no_grad():
            logits = model(job["X"][500:580]).double()
        return float(torch.nn.functional.cross_entropy(logits, job["TRUE"][500:580]))

    every = np.arange(273)
    without, before = np.setdiff1d(every, removed), loss(every)
    measured = {each["name"]: each["change"] for each in summary["removal"]["measured"]}
    by_hand = {
        "proposed removals": loss(without) - before,
        "proposed labels": loss(every, relabel=labels) - before,
        "all that is proposed": loss(without, relabel=labels) - before,
    }
    for name, change in by_hand.items():
        assert measured[name] == pytest.approx(change, abs=1e-4)


def test_value_rolls_up_and_slices_add_up_to_the_whole(run, tmp_path):
    """Σ_slice n_slice · value[slice, i] = n · value[i]."""
    ran("value", run, "--out", tmp_path / "all.parquet", "--show", 1)
    written = ran("value", run, "--by", "label", "--bags", 5).output.split()
    assert written[-2:] == [
        str(run / "value" / f"values-by-label{x}") for x in (".parquet", "-groups.parquet")
    ]
    (run / "value" / "values-by-label.parquet").rename(tmp_path / "by.parquet")
    ran("value", run, "--slice", "label=3", "--out", tmp_path / "three.parquet")
    whole = {row["id"]: row["value"] for row in rows(tmp_path / "all.parquet")}
    labels = tda.open(run).store.table("queries/test").column("label").astype(str).tolist()
    total = dict.fromkeys(whole, 0.0)
    by = rows(tmp_path / "by.parquet")
    for row in by:
        total[row["id"]] += labels.count(row["slice"]) * row["value"]
    for name, value in whole.items():
        assert total[name] == pytest.approx(80 * value, rel=1e-6, abs=1e-9)
    threes = {row["id"]: row["value"] for row in by if row["slice"] == "3"}
    for row in rows(tmp_path / "three.parquet"):
        assert row["value"] == pytest.approx(threes[row["id"]], abs=1e-12)
        assert row["slice"] == "label=3"
    assert {"knn_shapley", "data_oob"} <= set(by[0])
    groups = rows(tmp_path / "all-groups.parquet")
    assert {row["column"] for row in groups} == {"label", "source"}
    shares = sum(row["share_of_absolute"] for row in groups if row["column"] == "source")
    assert shares == pytest.approx(1)


def test_a_run_given_twice_counts_once(run, tmp_path):
    out = tmp_path / "two.parquet"
    output = ran("value", run, "--run", run, "--out", out).output
    assert output == ran("value", run, "--out", out).output and "nan" not in output
    once = valuation.values(tda.open(run), "test", "influence").value[0] / 80
    np.testing.assert_allclose([row["value"] for row in rows(out)], once, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["value", "{run}", "--by", "label", "--slice", "label=3"], "--by and --slice"),
        (["value", "{run}", "--slice", "label=42"], "42"),
        (["value", "{run}", "--slice", "colour=red"], "label"),
        (["value", "{run}", "--by", "../label"], "label"),
        (["report", "{run}", "--retrain"], "configuration"),
        (["report", "{run}", "--diff", "{folder}"], "tda report"),
        (["report", "{run}", "--fail-if", "trust.nothing > 1"], "trust.num_failed"),
        (["report", "{run}", "--fail-if", "import os"], "KEY OP NUMBER"),
    ],
)
def test_an_error_says_what_to_do(config, run, arguments, says):
    names = {"run": run, "folder": config.parent}
    result = ran(*(argument.format(**names) for argument in arguments), code=1)
    assert result.stderr.startswith("error: ") and says in result.stderr


def test_a_gate_that_fires_ends_in_exit_code_1_after_the_page_is_written(run):
    result = ran("report", run, "--fail-if", "decisions.num_leaked_queries >= 5", code=1)
    assert "gate: decisions.num_leaked_queries >= 5 (it is 5)" in result.stderr
    assert str(run / "report.html") in result.output
    ran("report", run, "--fail-if", "decisions.num_leaked_queries > 5")


def test_the_difference_to_itself_is_none_and_to_another_recipe_is_told(run, tmp_path):
    from tda.report import write_report

    opened = tda.open(run)
    before = tmp_path / "before"
    page = write_report(opened, before / "report.html", recipe="influence")
    write_report(opened, tmp_path / "same" / "report.html", recipe="influence", against=before)
    write_report(opened, tmp_path / "other" / "report.html", recipe="grad_dot", against=before)
    same, other = (
        json.loads((tmp_path / name / "summary.json").read_text())["difference"]
        for name in ("same", "other")
    )
    assert same["rank_correlation"] == pytest.approx(1) and not same["moved"] and not same["card"]
    assert (same["num_common"], same["num_added"], same["num_gone"]) == (273, 0, 0)
    assert ["recipe", "influence", "grad_dot"] in other["card"]
    assert other["rank_correlation"] < 1 and len(other["moved"]) == 12
    assert "What changed since" in (tmp_path / "other" / "report.html").read_text()
    assert "What changed since" not in page.read_text()
    ids = np.array([row["id"] for row in rows(before / "values.parquet")])
    np.testing.assert_array_equal(read_before(before).ids, ids)


def test_a_damaged_report_to_compare_with_is_an_error(run, tmp_path):
    from tda.errors import StoreError

    for name in ("summary.json", "values.parquet"):
        (tmp_path / name).write_bytes(b"{")
    with pytest.raises(StoreError, match="cannot be read"):
        read_before(tmp_path)
