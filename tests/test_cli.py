"""The command line: what each command leaves behind, says, and exits with."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
import workload_file
import zarr
from pyarrow import parquet
from typer.testing import CliRunner

import tda
from tda.cli import app
from tda.cli.exits import PREEMPTED, Commands
from tda.config import load_config
from tda.errors import StoreError

JOB = """
import torch
import tda

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1) > 0).long()

def task():
    torch.manual_seed(2)
    states = [torch.nn.Linear(6, 2).state_dict() for _ in range(2)]
    steps = [tda.Checkpoint(s, step=i, learning_rate=0.1) for i, s in enumerate(states)]
    return tda.Task(torch.nn.Linear(6, 2), checkpoints=steps)

def not_a_task():
    return 3

def train():
    return {"input": X[:33], "target": Y[:33], "id": [f"t[{i}]" for i in range(33)]}

def test():
    return {"input": X[33:37], "target": Y[33:37], "id": [f"q{i}" for i in range(4)]}

def more():
    return {"input": X[37:], "target": Y[37:]}
"""

CONFIG = f"""{workload_file.CONFIG}[query]
recipe = "influence"
k = 3
"""


def ran(*arguments: object, code: int = 0) -> Any:
    """The result of ``tda ARGUMENTS``; asserts its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workload of 33 examples, indexed by `tda index`."""
    folder = tmp_path_factory.mktemp("workload")
    (folder / "job.py").write_text(JOB)
    file = folder / "workload.toml"
    file.write_text(CONFIG.format(path=folder / "run"))
    assert ran("index", file).output.splitlines()[-1] == str(folder / "run")
    return file


@pytest.fixture
def run(config: Path) -> Path:
    return config.parent / "run"


def python(code: str) -> str:
    made = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path.cwd()
    )
    return made.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["query", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    heavy = ("torch", "faiss", "dask", "zarr", "numpy", "sklearn", "matplotlib")
    loaded = python(
        "import sys\nimport tda.cli\n"
        f"try: tda.cli.app({arguments!r})\nexcept SystemExit: pass\n"
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules])"
    )
    assert loaded.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("command", sorted(typer.main.get_group(app).commands))
def test_help_shows_what_is_written_and_no_mark_up(command):
    shown = ran(command, "--help").output
    assert "`" not in shown
    assert "\\" not in shown


def test_any_command_that_is_asked_to_stop_says_so():
    commands = typer.Typer(cls=Commands)
    commands.callback()(lambda: None)
    commands.command("wait")(lambda: signal.raise_signal(signal.SIGTERM))
    result = CliRunner().invoke(commands, ["wait"])
    assert result.exit_code == PREEMPTED and "asked to stop" in result.output
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_importing_the_package_loads_nothing_heavy():
    """It takes .05 s then; PyTorch alone takes more than one."""
    loaded = python("import sys\nimport tda\nprint(sorted(sys.modules))")
    heavy = {
        "torch",
        "numpy",
        "faiss",
        "dask",
        "distributed",
        "zarr",
        "sklearn",
        "pydantic",
        "typer",
    }
    assert not heavy & set(ast.literal_eval(loaded))


def test_recipes_lists_every_declaration_without_loading_torch():
    output = ran("recipes").output
    for name, recipe in tda.RECIPES.items():
        assert name in output
        assert recipe.reference.split()[0] in output
    loaded = python("import sys\nimport tda.recipes\nprint('torch' in sys.modules)")
    assert loaded.strip() == "False"


def test_index_a_second_time_changes_nothing(config, run):
    def files():
        kept = [p for p in run.rglob("*") if p.is_file() and "cache" not in p.parts]
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in kept}

    before = files()
    ran("index", config)
    assert files() == before


def test_index_refuses_a_run_made_from_something_else(config):
    result = ran("index", config, "--set", "projection.kind=rademacher", code=1)
    assert "rademacher" in result.stderr
    assert "Traceback" not in result.output


def test_query_writes_the_engines_answer_to_json_and_parquet(config, run, tmp_path):
    top = tda.open(run).top_k("test", k=3, recipe="influence")
    nearest = tda.open(run).baseline_top_k("test", k=3).proponents
    for out in (tmp_path / "answers.json", tmp_path / "answers.parquet"):
        ran("query", run, "--recipe", "influence", "-k", 3, "--out", out)
        if out.suffix == ".json":
            written = json.loads(out.read_text())
            assert (written["queries"], written["recipe"]) == ("test", "influence")
            rows = written["answers"]
        else:
            rows = parquet.read_table(out).to_pylist()
        assert len(rows) == 4 * 3 * 3
        sides = {"proponents": top.proponents, "opponents": top.opponents, "nearest": nearest}
        for side, ranking in sides.items():
            for query in range(4):
                mine = [r for r in rows if r["query"] == f"q{query}" and r["side"] == side]
                assert [r["rank"] for r in mine] == [1, 2, 3]
                assert [r["train_index"] for r in mine] == ranking.indices[query].tolist()
                assert [r["train"] for r in mine] == ranking.ids[query].tolist()
                np.testing.assert_array_equal(
                    np.float32([r["score"] for r in mine]), ranking.scores[query]
                )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.json", "answers.parquet"]


def test_a_query_is_prepared_once_for_its_answer_and_for_what_is_reliable(run, monkeypatch):
    stored, given = tda.open(run), []
    wanted = stored.top_k("test", k=3, recipe="trak")
    prepare = tda.scorer.prepare

    def counted(*arguments):
        given.append(arguments)
        return prepare(*arguments)

    monkeypatch.setattr(tda.scorer, "prepare", counted)
    ran("query", run, "--recipe", "trak", "-k", 3)
    prepared = stored.prepare("test", "trak")
    found = stored.top_k(prepared, k=3)
    np.testing.assert_array_equal(found.proponents.scores, wanted.proponents.scores)
    np.testing.assert_array_equal(stored.scores(prepared), stored.scores("test", "trak"))
    assert len(given) == 3  # by the command, here, and for the scores that were not prepared


def test_auto_says_which_recipe_it_is_and_why(run):
    found = ran("query", run, "--recipe", "auto", "--show", 1)
    assert "auto: influence. Chosen for" in " ".join(found.output.split())
    assert "· influence" in found.output


def test_query_prints_ids_as_they_are_and_only_the_queries_asked_for(run):
    output = ran("query", run, "--id", "q2", "-k", 33).output
    assert "query q2" in output
    assert "query q1" not in output
    for index in range(33):
        assert f"t[{index}]" in output  # brackets are text, not markup


def test_a_configuration_and_its_run_give_the_same_answer(config, run, tmp_path):
    ran("query", config, "--out", tmp_path / "a.json")
    ran("query", run, "-k", 3, "--out", tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_query_set_added_to_the_configuration_is_featurized_when_asked(config, tmp_path):
    more = ["--set", f"run.path={tmp_path / 'run'}", "--set", "workload.queries.more=job.py:more"]
    ran("index", config, "--set", f"run.path={tmp_path / 'run'}")
    ran("query", config, *more, "--queries", "more", "--out", tmp_path / "more.json")
    assert len(json.loads((tmp_path / "more.json").read_text())["answers"]) == 3 * 3 * 3
    assert sorted(tda.open(tmp_path / "run").queries) == ["more", "test"]
    assert "which query set?" in ran("query", tmp_path / "run", code=1).stderr


def test_score_writes_the_whole_matrix(run, tmp_path):
    out = tmp_path / "scores.zarr"
    for recipe in ("trak", "tracin"):  # the second replaces the first
        assert ran("score", run, "--recipe", recipe, "--out", out).output.strip() == str(out)
        array = zarr.open_array(out, mode="r")
        expected = tda.open(run).scores("test", recipe=recipe).compute()
        np.testing.assert_array_equal(array[:], expected)
        assert array.dtype == np.float32
        assert array.attrs["recipe"] == recipe
        assert array.metadata.dimension_names == ("query", "train")
    assert [p.name for p in tmp_path.iterdir()] == ["scores.zarr"]


def test_score_never_replaces_what_is_not_a_matrix(run, tmp_path):
    (tmp_path / "precious").write_text("mine")
    ran("score", run, "--out", tmp_path, code=1)
    assert (tmp_path / "precious").read_text() == "mine"
    ids = tda.open(run).ids.tolist()
    ran("score", run, "--out", run / "train", code=1)  # a folder of Zarr arrays all the same
    assert "--out" in ran("score", run, "--out", run / "train/rows", code=1).stderr
    assert tda.open(run).ids.tolist() == ids and tda.open(run).verify() == []


def test_answers_never_replace_what_are_no_answers(run, tmp_path):
    manifest = (run / "manifest.json").read_bytes()
    assert "name another path" in ran("query", run, "--out", run / "manifest.json", code=1).stderr
    assert (run / "manifest.json").read_bytes() == manifest
    parquet = tmp_path / "mine.parquet"
    parquet.write_bytes(b"mine")
    ran("query", run, "--out", parquet, code=1)
    assert parquet.read_bytes() == b"mine"
    for _ in range(2):  # what it wrote itself is replaced
        ran("query", run, "--out", tmp_path / "answers.parquet")


def test_a_run_without_query_sets_says_how_to_ask_it(config, tmp_path):
    path = f"run.path={tmp_path / 'run'}"
    ran("index", config, "--set", path, "--set", "workload.queries={}")
    said = ran("query", tmp_path / "run", code=1).stderr
    assert "no query set" in said and "name its configuration in place of the run" in said
    assert "add_queries(dataset, name)" in said
    said = ran("query", config, "--set", path, "--set", "workload.queries={}", code=1).stderr
    assert "add it to [workload] queries" in said and "in place of the run" not in said


def test_queries_are_not_computed_for_a_run_that_is_not_finished(config, tmp_path):
    path = f"run.path={tmp_path / 'run'}"
    ran("index", config, "--set", path, "--set", "workload.queries={}")
    next((tmp_path / "run/train/done").glob("c*.json")).unlink()
    assert "tda index" in ran("query", config, "--set", path, code=1).stderr
    run = tda.open(tmp_path / "run", load_config(config).build_task())
    with pytest.raises(StoreError, match=r"1 of 8 chunks"):
        run.top_k((np.zeros((2, 6), "f4"), np.zeros(2, "i8")))
    assert run.queries == []


def test_report_writes_one_page_and_prints_its_path(run):
    path = Path(ran("report", run).output.splitlines()[-1])
    assert path == run / "report.html"
    assert "<html" in path.read_text()[:2000]


def test_verify_passes_a_sound_run_and_names_an_altered_chunk(config, tmp_path):
    path = tmp_path / "run"
    ran("index", config, "--set", f"run.path={path}")
    assert "no faults" in ran("verify", path).output
    chunk = max((path / "train" / "rows").rglob("c/*/*/*"), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[20] ^= 1
    chunk.write_bytes(data)
    output = ran("verify", path, code=1).output
    assert "altered" in output
    assert "1 fault" in output


def test_plan_counts_what_index_then_writes_and_leaves_nothing_behind(config, run, tmp_path):
    from tda.cli.planning import plan

    planned = plan(load_config(config, [f"run.path={tmp_path / 'run'}"]))
    assert (planned.num_train, planned.num_queries, planned.num_checkpoints) == (33, 4, 2)
    assert planned.seconds > 0
    assert planned.peak_memory > 50e6  # an interpreter with torch
    chunks = [
        file.stat().st_size
        for table in ("train", "queries/test")
        for file in (run / table).glob("*/c/**/*")
        if file.is_file()
    ]
    assert planned.bytes_on_disk == pytest.approx(sum(chunks), rel=0.1)
    assert list(tmp_path.iterdir()) == []
    assert "training examples" in ran("plan", config).output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["query", "{run}", "--recipe", "trakk"], "trak"),
        (["query", "{run}", "--queries", "tset"], "test"),
        (["query", "{run}", "--id", "q9"], "q9"),
        (["query", "{run}", "--out", "answers.csv"], ".parquet"),
        (["query", "{run}", "--set", "query.k=3"], "--set"),
        (["query", "{folder}/none"], "none"),
        (["query", "{config}", "--set", "run.path={folder}/none"], "tda index"),
        (["index", "{folder}/none.toml"], "none.toml"),
        (["index", "{config}", "--set", "projection.dims=3"], "did you mean 'dim'?"),
        (["index", "{config}", "--set", "workload.task=job.py:not_a_task"], "tda.Task"),
        (["verify", "{folder}"], "{folder}"),
        (["report", "{run}", "--queries", "tset"], "test"),
    ],
)
def test_an_error_is_told_without_a_traceback_and_exits_1(config, run, arguments, says):
    names = {"run": run, "config": config, "folder": config.parent}
    result = ran(*(argument.format(**names) for argument in arguments), code=1)
    assert result.stderr.startswith("error: ")
    assert says.format(**names) in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments", [["qury"], ["query"], ["query", "x", "-k", "0"], ["index", "x", "--no-such"]]
)
def test_wrong_usage_exits_2(arguments):
    ran(*arguments, code=2)


def test_ctrl_c_exits_130_and_says_how_to_resume(config, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tda, "index", interrupted)
    result = ran("index", config, code=130)
    assert "the same command resumes" in result.stderr


def test_a_full_disk_keeps_the_file_that_was_there(run, tmp_path, monkeypatch):
    out = tmp_path / "answers.json"
    ran("query", run, "--out", out)
    before = out.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left" in ran("query", run, "-k", 1, "--out", out, code=1).stderr
    assert out.read_bytes() == before


def test_the_demo_runs_the_digits_job_and_prints_the_report_last(tmp_path, monkeypatch):
    from tda.cli import workload

    def job(reference: str, folder: Path) -> Any:
        assert Path(reference.removesuffix(":demo")).name == "digits.py"
        return lambda path: path / "report.html"

    monkeypatch.setattr(workload, "load_code", job)
    assert ran("demo", "--path", tmp_path).output.splitlines()[-1] == str(tmp_path / "report.html")


@pytest.mark.slow
def test_the_demo_ends_in_a_report_and_a_second_one_computes_nothing(tmp_path):
    run = tmp_path / "demo"
    assert ran("demo", "--path", run).output.splitlines()[-1] == str(run / "report.html")
    page = (run / "report.html").read_bytes()
    marks = {file: file.stat().st_mtime_ns for file in run.rglob("done/c*-*.json")}
    assert len(marks) == 3 * (6 + 2)
    assert "no faults" in ran("verify", run).output
    ran("demo", "--path", run)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("done/c*-*.json")} == marks
    assert (run / "report.html").read_bytes() == page


def test_an_installation_without_the_job_says_so(tmp_path, monkeypatch):
    from tda.cli import workload

    monkeypatch.setattr(workload, "tda", SimpleNamespace(__file__=str(tmp_path / "tda/x.py")))
    monkeypatch.setattr(workload, "files", lambda name: [])
    assert "reinstall" in ran("demo", code=1).stderr


def test_an_error_keeps_its_parts(config, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise StoreError("torn", where="[train/rows]", do="tda index")

    monkeypatch.setattr(tda, "index", fails)
    told = ran("index", config, code=1).stderr
    assert told == "error: torn\n  where:  [train/rows]\n  do:     tda index\n"


@pytest.mark.parametrize(
    "command", [["repair"], ["relabel"], ["verify", "--deep"]], ids=lambda c: c[0]
)
def test_what_needs_the_model_says_so_where_a_run_is_named(command, run):
    said = ran(command[0], run, *command[1:], code=1)
    assert isinstance(said.exception, SystemExit)
    assert "needs the model and the data" in said.output
