"""Where results go: each partner holds what the run says, joined by id, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from explorer_run import make_run
from pyarrow import parquet

import tda
from tda.data import as_dataset
from tda.errors import ConfigError, DataError, StoreError
from tda.integrations.partner import partner
from tda.integrations.sheet import ids_of, sheet
from tda.report import write_report
from tda.run import Run

N = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with its report; it has ids train-0 … train-39."""
    made = make_run(tmp_path_factory.mktemp("partners") / "run", num_train=N, num_queries=9)
    write_report(made.run, with_knn=False)
    return made.run


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Values of which every cell is known by heart; two are harmful, one has no interval."""
    path = tmp_path_factory.mktemp("values") / "values.parquet"
    flags = [["harmful", "mislabelled"], [], ["harmful"], ["inert"]]
    columns = {
        "id": ["a", "b", "c", "d"],
        "value": [-3.0, 2.0, -1.0, 0.0],
        "ci_lo": [-4.0, 1.0, -2.0, None],
        "ci_hi": [-2.0, 3.0, -0.5, None],
        "reliable": [True, True, True, False],
        "flags": pa.array(flags, pa.list_(pa.string())),
    }
    parquet.write_table(pa.table(columns), path)
    return path


# ---- pandas


def test_values_as_a_frame_are_mean_scores(run):
    from tda.integrations.frames import values_frame

    frame = values_frame(run)
    mean = np.asarray(run.scores("test", "influence"), np.float64).mean(0)
    assert frame["id"].tolist() == run.ids.tolist()
    np.testing.assert_allclose(frame["value"], mean, rtol=1e-5, atol=1e-9)
    assert ((frame["ci_lo"] <= frame["value"]) & (frame["value"] <= frame["ci_hi"])).all()
    assert frame.attrs["recipe"] == "influence"


def test_scores_and_top_k_as_frames_are_those_of_the_run(run, tmp_path):
    from tda.integrations.frames import pandas, scores_frame, top_k_frame

    scores = np.asarray(run.scores("test", "trak"))
    frame = scores_frame(run, "test", "trak")
    assert len(frame) == scores.size
    wide = frame.pivot(index="query", columns="train", values="score")
    queries = run.store.table("queries/test").column("id")
    np.testing.assert_array_equal(wide.loc[list(queries), list(run.ids)].to_numpy(), scores)

    top = top_k_frame(run, "test", 3, "trak")
    for index, query in enumerate(queries):
        order = np.argsort(-scores[index], kind="stable")
        for side, wanted in (("proponents", order[:3]), ("opponents", order[::-1][:3])):
            mine = top[(top["query"] == query) & (top["side"] == side)]
            assert mine["train"].tolist() == run.ids[wanted].tolist()
            assert mine["rank"].tolist() == [1, 2, 3]
            assert mine["score"].tolist() == scores[index, wanted].tolist()
    frame.to_parquet(tmp_path / "scores.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "scores.parquet"), frame)


# ---- what all of them read


def test_a_join_finds_each_id_whatever_the_order_and_leaves_strangers_empty(file):
    found = sheet(file).of(["c", "x", "a"], ("value", "flags"))
    assert found == {"value": [-1.0, None, -3.0],
                     "flags": [["harmful"], None, ["harmful", "mislabelled"]]}  # fmt: skip


def test_what_cannot_be_joined_is_an_error(file, tmp_path):
    values = sheet(file)
    with pytest.raises(DataError, match="none of these examples"):
        values.of(["x", "y"], ("value",))
    with pytest.raises(DataError, match="no column 'p'"):
        values.of(["a"], ("p",))
    with pytest.raises(StoreError, match="no values here") as caught:
        sheet(tmp_path)
    assert "tda report" in str(caught.value)
    (tmp_path / "torn.parquet").write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StoreError, match="cannot be read"):
        sheet(tmp_path / "torn.parquet")
    twice = tmp_path / "slices.parquet"
    parquet.write_table(pa.concat_tables([values.table, values.table]), twice)
    with pytest.raises(DataError, match="several values"):
        sheet(twice)


def test_ids_are_a_column_or_the_hashes_of_the_content():
    import datasets

    rows = {"input": [[0.0, 1.0], [2.0, 3.0]], "target": [0, 1]}
    plain = datasets.Dataset.from_dict(rows)
    described = tda.examples.describe([plain[0], plain[1]]).ids.tolist()
    assert ids_of(plain) == described
    named = datasets.Dataset.from_dict({**rows, "id": [7, 8], "name": ["a", "b"]})
    assert ids_of(named) == ["7", "8"]
    assert ids_of(named, "name") == ["a", "b"]
    with pytest.raises(DataError, match="no column 'key'"):
        ids_of(named, "key")


# ---- Hugging Face datasets


def test_of_several_data_sets_one_is_asked_for():
    import datasets

    several = datasets.DatasetDict(train=datasets.Dataset.from_dict({"input": [[0.0]]}))
    with pytest.raises(DataError, match=r"several data sets[^§]*data\['train'\]"):
        as_dataset(several)


def test_a_data_set_gets_columns_joined_by_id(file):
    import datasets

    from tda.integrations.hf_datasets import with_values

    given = datasets.Dataset.from_dict({"name": ["c", "d", "new", "a"], "text": list("wxyz")})
    found = with_values(given, file, id_column="name")
    assert found["text"] == given["text"]
    assert list(found["tda_value"]) == [-1.0, 0.0, None, -3.0]
    assert list(found["tda_ci_lo"]) == [-2.0, None, None, -4.0]
    assert list(found["tda_reliable"]) == [True, False, None, True]
    assert list(found["tda_flags"])[3] == ["harmful", "mislabelled"]
    assert found.features["tda_value"].dtype == "float64"
    kept = found.filter(lambda row: "harmful" not in (row["tda_flags"] or ()))
    assert list(kept["name"]) == ["d", "new"]
    with pytest.raises(DataError, match="'tda_value' already"):
        with_values(found, file, id_column="name")
    with pytest.raises(DataError, match="one data set"):
        with_values(datasets.DatasetDict(train=given), file, id_column="name")


def test_the_data_set_that_was_indexed_joins_without_ids(tmp_path):
    import datasets

    from tda.integrations.hf_datasets import with_values

    rows = {"input": [[float(i), 1.0] for i in range(6)], "target": [i % 2 for i in range(6)]}
    given = datasets.Dataset.from_dict(rows)
    model = torch.nn.Linear(2, 2, dtype=torch.float64)  # lists of floats come as float64
    run = tda.index(tda.Task(model), given, tmp_path / "run", progress=False)
    run.add_queries(given, "test")
    write_report(run, with_knn=False)
    shuffled = with_values(given.shuffle(seed=1), run, columns=("value",))
    wanted = np.asarray(run.scores("test", "influence")).mean(0)
    found = {row["input"][0]: row["tda_value"] for row in shuffled}
    np.testing.assert_allclose([found[float(i)] for i in range(6)], wanted, rtol=1e-5)


# ---- cleanlab


def test_a_datalab_lists_the_harmful_worst_first(file, capsys):
    import datasets
    from cleanlab import Datalab

    import tda.integrations.cleanlab as integration

    data = datasets.Dataset.from_dict({"name": ["d", "c", "b", "new", "a"], "y": [0, 1, 0, 1, 0]})
    lab = Datalab(data, label_name="y", verbosity=0)
    asked = {"values": file, "id_column": "name"}
    lab.find_issues(issue_types={integration.HarmfulValueIssueManager.issue_name: asked})
    issues = lab.get_issues("harmful_value")
    assert issues["is_harmful_value_issue"].tolist() == [False, True, False, False, True]
    assert issues["harmful_value_score"].tolist() == [0.625, 0.375, 0.875, 1.0, 0.125]
    told = lab.get_info("harmful_value")
    assert (told["value"], told["num_not_in_run"]) == ([0.0, -1.0, 2.0, None, -3.0], 1)
    summary = lab.get_issue_summary("harmful_value")
    assert (summary["num_issues"][0], summary["score"][0]) == (2, pytest.approx(0.6))
    capsys.readouterr()
    lab.report()
    assert "harmful_value issues" in capsys.readouterr().out


# ---- FiftyOne, whose database is not to be had from a package index: its documented interface


class Samples:
    """`values` and `set_values` of a FiftyOne collection, as its documentation defines them."""

    def __init__(self, fields: dict[str, list[Any]]) -> None:
        self.fields = fields

    def values(self, names: list[str]) -> list[list[Any]]:
        return [self.fields[name] for name in names]

    def set_values(self, name: str, values: dict[Any, Any], key_field: str) -> None:
        keys = self.fields[key_field]
        column = self.fields.setdefault(name, [None] * len(keys))
        for key, value in values.items():
            column[keys.index(key)] = value  # of one sample, which must be there


def test_samples_get_fields_joined_by_any_of_theirs(file):
    from tda.integrations.fiftyone import add_values

    samples = Samples({"id": ["1", "2", "3"], "filepath": ["b", "new", "a"]})
    add_values(samples, file, key_field="filepath")
    assert samples.fields["tda_value"] == [2.0, None, -3.0]
    assert samples.fields["tda_reliable"] == [True, None, True]
    assert samples.fields["tda_flags"] == [[], None, ["harmful", "mislabelled"]]
    with pytest.raises(DataError, match="none of these"):
        add_values(samples, file, key_field="id")


# ---- MLflow


@pytest.fixture
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A real tracking store in files."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # it needs no database's packages
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow

        mlflow.set_tracking_uri((tmp_path / "store").as_uri())
        yield mlflow
        mlflow.set_tracking_uri(None)


def test_a_report_is_logged_with_its_numbers_files_and_hashes(run, tracking):
    from tda.integrations.mlflow import log_report

    with tracking.start_run() as active:
        tracking.log_metric("accuracy", 0.5)
        assert log_report(run.path) == active.info.run_id
    alone = log_report(run.path)
    assert tracking.active_run() is None
    client, summary = tracking.MlflowClient(), json.loads(
        (run.path / "summary.json").read_text()
    )  # fmt: skip
    for run_id in (active.info.run_id, alone):
        logged = client.get_run(run_id)
        assert logged.info.status == "FINISHED"
        metrics, tags = logged.data.metrics, logged.data.tags
        assert metrics["tda.values.gini"] == summary["values"]["gini"]
        assert metrics["tda.num_train"] == N
        assert (
            metrics["tda.decisions.num_actions.remove"]
            == (summary["decisions"]["num_actions"]["remove"])
        )
        assert (tags["tda.recipe"], tags["tda.query_set"]) == ("influence", "test")
        assert tags["tda.digest.measurement"] == "c"
        assert tags["tda.digest.checkpoint.step 1"] == "1"
        artifacts = {each.path for each in client.list_artifacts(run_id, "tda")}
        assert {"tda/report.html", "tda/summary.json", "tda/values.parquet"} <= artifacts
        copy = client.download_artifacts(run_id, "tda/report.html")
        assert Path(copy).read_bytes() == (run.path / "report.html").read_bytes()
    assert client.get_run(active.info.run_id).data.metrics["accuracy"] == 0.5


def test_every_number_of_the_summary_is_logged_but_those_of_lists(run):
    from tda.integrations.mlflow import numbers
    from tda.report.gates import look_up

    summary = json.loads((run.path / "summary.json").read_text())
    found = dict(numbers(summary))
    assert len(found) > 40
    assert found == {path: look_up(summary, path) for path in found}


def test_no_report_is_an_error(tmp_path):
    from tda.integrations.mlflow import log_report

    with pytest.raises(StoreError, match="no report here"):
        log_report(tmp_path)


# ---- partners that are not installed


def test_a_missing_partner_is_named_with_its_pip_command():
    with pytest.raises(ConfigError) as caught:
        partner("fiftyone", "no_such_package.part")
    assert "pip install 'tda-engine[fiftyone]'" in str(caught.value)


def test_a_fault_inside_a_partner_is_not_taken_for_its_absence(tmp_path, monkeypatch):
    (tmp_path / "broken_partner.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        partner("hf", "broken_partner")


def test_nothing_of_a_partner_is_imported_before_it_is_asked_for():
    names = "pandas datasets cleanlab mlflow lightning pytorch_lightning transformers fiftyone"
    code = f"""if True:
        import sys, tda, tda.integrations
        tda.Recorder, tda.open
        import tda.integrations.sheet, tda.integrations.fiftyone
        print(set({names.split()!r}) & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
