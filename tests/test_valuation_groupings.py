"""Groups named in a file beside the data: read whole, or refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from explorer_run import make_run
from pyarrow import parquet
from typer.testing import CliRunner

from tda import valuation
from tda.cli import app
from tda.errors import DataError, RecipeError
from tda.recipes import RECIPES
from tda.valuation.groupings import ABSENT, TAKEN
from tda.valuation.metrics import for_metric

IDS = np.array(["a", "b", "c", "d"])


def written(path: Path, text: str) -> Path:
    file = path / "groups.csv"
    file.write_bytes(text.encode())
    return file


def test_columns_are_joined_by_id_whatever_the_order(tmp_path):
    """Numbers and dates stay the strings they are; an empty cell is as a missing example."""
    text = '\ufeffid,licence,day\nd,MIT,007\nb,"GPL, 3",2024-01-02\nother,MIT,x\na,MIT,\n'
    found = valuation.read_groups(written(tmp_path, text), IDS)
    assert found.columns["licence"].tolist() == ["MIT", "GPL, 3", ABSENT, "MIT"]
    assert found.columns["day"].tolist() == [ABSENT, "2024-01-02", ABSENT, "007"]
    (note,) = found.notes
    assert "does not name 1 of" in note


def test_what_groups_nothing_is_left_out_and_said(tmp_path):
    text = "id,label,name,one\na,1,w,x\nb,1,x,x\nc,2,y,x\nd,2,z,x\n"
    found = valuation.read_groups(written(tmp_path, text), IDS, known=["label"])
    assert list(found.columns) == ["one"]
    assert [word in " ".join(found.notes) for word in ("'label'", "'name'")] == [True, True]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,licence\na,MIT\n", "no table of groups"),
        ("id\na\n", "no table of groups"),
        ("id,x,x\na,1,2\n", "no table of groups"),
        ("id,x\na,1\na,2\n", "twice"),
        ("id,x\nA,1\nB,2\n", "none of the training examples"),
        ("id,x\n", "none of the training examples"),
        ("id,value\na,1\nb,1\n", "cannot be called 'value'"),
        ("id,x\na,1,2\n", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, text, says):
    with pytest.raises(DataError, match=says):
        valuation.read_groups(written(tmp_path, text), IDS)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        valuation.read_groups(tmp_path / "none.csv", IDS)
    (tmp_path / "bytes.csv").write_bytes(b"id,x\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="cannot be read"):
        valuation.read_groups(tmp_path / "bytes.csv", IDS)


def test_value_and_report_roll_up_by_the_columns_of_a_file(tmp_path):
    """Each group's value is the mean over its examples of what values.parquet says of them."""
    made = make_run(tmp_path / "run")
    ids = made.run.ids.tolist()
    licence = [("free", "bought", "found")[i % 7 % 3] for i in range(len(ids))]
    lines = [f"{name},{of}" for name, of in zip(ids, licence, strict=True)]
    file = written(tmp_path, "id,licence\n" + "\n".join(reversed(lines)) + "\n")
    asked = ["--queries", "test", "--recipe", "grad_dot", "--groups", str(file)]
    for command in ("value", "report"):
        done = CliRunner().invoke(app, [command, str(made.run.path), *asked])
        assert done.exit_code == 0, done.output
    folder = made.run.path / "value"
    values = parquet.read_table(folder / "values.parquet").to_pydict()
    rolled = parquet.read_table(folder / "groups.parquet").to_pylist()
    summary = json.loads((made.run.path / "summary.json").read_text())["rollups"]
    assert values["licence"] == licence
    assert set(values) - TAKEN == {"id", "label", "source", "group", "licence"}
    value, of = made.grad_dot.mean(0), np.array(licence)
    by_name = {part["name"]: part for part in summary["licence"]["slices"]}
    for name in ("free", "bought", "found"):
        (row,) = [r for r in rolled if r["column"] == "licence" and r["group"] == name]
        for found in (row["value"], by_name[name]["mean"]):
            np.testing.assert_allclose(found, value[of == name].mean(), rtol=1e-4)
        assert row["count"] == by_name[name]["count"] == (of == name).sum()
    assert "licence" in parquet.read_table(made.run.path / "values.parquet").column_names
    assert "By licence" in (made.run.path / "report.html").read_text()


@pytest.mark.parametrize("metric", ["loss", "margin", "accuracy"])
def test_values_for_a_metric_are_its_own_gradient(tmp_path, metric):
    """Σ_q mean_c ⟨∇m_q, −∇ℓ_i⟩ with ∇m = (1−p)∇f, ∇f, p(1−p)∇f, from the rows themselves."""
    made = make_run(tmp_path / "run")
    p = made.queries.p.astype(np.float64)
    weight = {"loss": 1 - p, "margin": np.ones_like(p), "accuracy": p * (1 - p)}[metric]
    toward = weight[..., None] * made.queries.rows
    wanted = np.einsum("cqk,cik->i", toward, -made.train.gradients) / len(p)
    found = valuation.values(made.run, "test", "grad_dot", metric=metric)
    np.testing.assert_allclose(found.value[0], wanted, rtol=1e-4, atol=1e-6)
    asked = ["value", str(made.run.path), "--recipe", "grad_dot", "--metric", metric]
    assert CliRunner().invoke(app, asked).exit_code == 0
    file = made.run.path / "value" / "values.parquet"
    table = parquet.read_table(file)
    np.testing.assert_allclose(table["value"], wanted / 9, rtol=1e-4, atol=1e-6)
    assert table.schema.metadata[b"metric"] == metric.encode()


@pytest.mark.parametrize(
    ("recipe", "metric", "says"),
    [
        ("grad_dot", "causal_lm", "cannot tell values for 'causal_lm'"),
        ("grad_cos", "accuracy", "makes them all as long"),
    ],
)
def test_a_metric_that_takes_another_index_is_refused(tmp_path, recipe, metric, says):
    made = make_run(tmp_path / "run")
    with pytest.raises(RecipeError, match=says):
        valuation.values(made.run, "test", recipe, metric=metric)


def test_a_measurement_without_a_margin_has_none():
    with pytest.raises(RecipeError, match="squared_error has no margin"):
        for_metric(RECIPES["grad_dot"], "margin", {"name": "squared_error", "has_margin": False})
