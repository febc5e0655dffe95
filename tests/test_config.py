"""A configuration says exactly what will be run, or which line of it is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tda.code import load_code
from tda.config import Config, load_config
from tda.errors import ConfigError

SMALLEST = """\
[run]
path = "stores/x"

[workload]
task = "job.py:task"
train = "job.py:train"
"""

JOB = """\
LOADED = []

def task(run_path, width=3):
    return ("task", run_path, width)

def train(num_train=10):
    return list(range(num_train))

def held_out():
    return [1, 2]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path


def written(folder: Path, text: str, *overrides: str) -> Config:
    file = folder / "workload.toml"
    file.write_text(text)
    return load_config(file, overrides)


def refused(folder: Path, text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        written(folder, text, *overrides)
    return caught.value


def test_what_is_left_out_is_left_to_the_engine(folder):
    assert written(folder, SMALLEST).index_arguments() == {
        "projection": "count_sketch",
        "proj_dim": 2048,
        "seed": 0,
        "dtype": "bfloat16",
    }


def test_every_section_arrives(folder):
    config = written(
        folder,
        SMALLEST
        + 'queries = { test = "job.py:held_out" }\n'
        + '[projection]\nkind = "identity"\ndim = 7\nseed = 3\n'
        + '[index]\ndtype = "int8"\nbatch_size = 5\nchunk_rows = 11\n'
        + '[query]\nrecipe = "trak"\nk = 4\n',
    )
    assert config.index_arguments() == {
        "projection": "identity",
        "proj_dim": 7,
        "seed": 3,
        "dtype": "int8",
        "batch_size": 5,
        "chunk_rows": 11,
    }
    assert (config.query.recipe, config.query.k) == ("trak", 4)
    assert config.build_queries("test") == [1, 2]


@pytest.mark.parametrize(
    ("addition", "line", "suggestion"),
    [
        ('[projction]\nkind = "identity"\n', 7, "'projection'"),
        ("[projection]\ndims = 7\n", 8, "'dim'"),
        ("[projection]\nseed = 1\n\n# a comment\nkid = 7\n", 11, "'kind'"),
        ('[index]\nd_type = "int8"\n', 8, "'dtype'"),
        ("[query]\nreceipe = 'trak'\n", 8, "'recipe'"),
        ("folder = 'x'\n", 7, None),
    ],
)
def test_an_unknown_key_is_refused_with_its_line_and_a_suggestion(
    folder, addition, line, suggestion
):
    error = refused(folder, SMALLEST + addition)
    assert "unknown" in error.what
    assert error.where == f"{folder / 'workload.toml'}:{line}"
    assert error.do == (f"did you mean {suggestion}?" if suggestion else None)


@pytest.mark.parametrize(
    ("addition", "key", "line"),
    [
        ('[projection]\ndim = "many"\n', "projection.dim", 8),
        ("[projection]\ndim = 2048.0\n", "projection.dim", 8),
        ("[projection]\ndim = 0\n", "projection.dim", 8),
        ("[projection]\nseed = -1\n", "projection.seed", 8),
        ("projection.dim = true\n", "workload.projection", 7),
        ('[index]\ndtype = "float16"\n', "index.dtype", 8),
        ("[index]\nchunk_rows = 0\n", "index.chunk_rows", 8),
        ("[query]\nk = 0\n", "query.k", 8),
        ('queries = { test = "held_out" }\n', "workload.queries.test", 7),
        ('queries = { "../x" = "job.py:held_out" }\n', "workload.queries.../x", 7),
        ("[query]\nrecipe = 3\n", "query.recipe", 8),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_line(folder, addition, key, line):
    error = refused(folder, SMALLEST + addition)
    assert key in error.what
    assert error.where == f"{folder / 'workload.toml'}:{line}"


def test_a_missing_key_or_section_is_named(folder):
    assert "workload.train" in refused(folder, SMALLEST.replace("train =", "# train =")).what
    assert "lacks run" in refused(folder, SMALLEST.split("\n\n")[1]).what


def test_what_is_not_toml_is_refused_with_its_line(folder):
    assert "line 7" in str(refused(folder, SMALLEST + "[projection\n").found)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "no.toml")


def test_an_override_wins_over_the_file_and_keeps_its_type(folder):
    config = written(
        folder,
        SMALLEST + "[projection]\ndim = 7\n",
        "projection.dim=4_096",
        "projection.kind=rademacher",
        "index.dtype = 'float32'",
        "workload.queries.test=job.py:held_out",
    )
    assert config.projection.dim == 4096
    assert config.projection.kind == "rademacher"
    assert config.index.dtype == "float32"
    assert config.build_queries("test") == [1, 2]


@pytest.mark.parametrize("override", ["projection", "dim=3", "=3", ".dim=3", "run.path.x=1"])
def test_an_override_that_cannot_be_read_is_refused(folder, override):
    assert refused(folder, SMALLEST, override).where == "--set"


@pytest.mark.parametrize("override", ["projection.dim=many", "projection.dims=3"])
def test_an_override_is_validated_like_the_file(folder, override):
    assert refused(folder, SMALLEST, override).where == "--set"


def test_functions_are_given_the_options_they_take(folder):
    config = written(folder, SMALLEST + "options = { num_train = 4 }\n")
    assert config.build_task() == ("task", "stores/x", 3)
    assert config.build_train() == [0, 1, 2, 3]


def test_an_option_that_no_function_takes_is_refused_with_a_suggestion(folder):
    config = written(folder, SMALLEST + "options = { num_tain = 4 }\n")
    with pytest.raises(ConfigError) as caught:
        config.build_train()
    assert caught.value.do == "did you mean 'num_train'?"


def test_an_unknown_query_set_is_refused_with_a_suggestion(folder):
    config = written(folder, SMALLEST + 'queries = { test = "job.py:held_out" }\n')
    with pytest.raises(ConfigError) as caught:
        config.build_queries("tset")
    assert caught.value.do == "did you mean 'test'?"


def test_a_file_is_found_beside_the_configuration_before_the_current_directory(
    folder, tmp_path_factory, monkeypatch
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "job.py").write_text("def train(): return 'elsewhere'\n")
    (elsewhere / "other.py").write_text("def train(): return 'here'\n")
    monkeypatch.chdir(elsewhere)
    assert load_code("job.py:train", folder)() == list(range(10))
    assert load_code("other.py:train", folder)() == "here"


def test_one_file_is_one_module_whichever_function_is_named(folder):
    task, train = load_code("job.py:task", folder), load_code("job.py:train", folder)
    assert task.__globals__ is train.__globals__


def test_a_module_is_found_by_name(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "named_workload.py").write_text(JOB)
    assert load_code("named_workload:held_out", folder)() == [1, 2]
    assert load_code("json:dumps", folder)(1) == "1"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("nowhere.py:task", "no file"),
        ("no_such_module_at_all:task", "no module"),
        ("job.py:tsk", "no function"),
        ("job.py:LOADED", "no function"),
    ],
)
def test_code_that_is_not_there_is_refused(folder, monkeypatch, reference, says):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=says) as caught:
        load_code(reference, folder)
    assert caught.value.where == reference


def test_an_error_inside_the_code_is_not_hidden(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "broken.py").write_text("import no_such_dependency\n")
    for reference in ("broken.py:task", "broken:task"):
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            load_code(reference, folder)


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
def test_the_shipped_configurations_are_valid_and_name_functions_that_exist(name):
    file = Path(__file__).parents[1] / "configs" / f"{name}.toml"
    work = load_config(file).workload
    job = (file.parent.parent / "jobs" / f"{name}.py").read_text()
    for reference in (work.task, work.train, *work.queries.values()):
        path, function = reference.split(":")
        assert (file.parent / path).resolve().name == f"{name}.py"
        assert f"def {function}(" in job
