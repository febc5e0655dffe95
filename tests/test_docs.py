"""What the README says, runs; what it lists, is generated."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tda.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for kind, text in BLOCKS
    for line in text.splitlines()
    if kind == "console"
]


def test_python_blocks_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for kind, text in BLOCKS:
        if kind == "python" and "torchrun" in text:  # a program by itself
            alone: dict = {}
            exec(compile(text, "README.md", "exec"), alone)
            assert alone["ids"].shape == (297, 10)
        elif kind == "python":
            exec(compile(text, "README.md", "exec"), names)
    assert names["scores"].shape == (297, 1500)
    assert len(names["suspects"]) == 20
    assert names["estimate"].low <= names["estimate"].value <= names["estimate"].high
    assert capsys.readouterr().out.count("[") >= 2  # the ids and the scores were printed


@pytest.mark.slow
def test_the_program_for_torchrun_runs_in_two_processes(tmp_path):
    text = next(text for kind, text in BLOCKS if kind == "python" and "torchrun" in text)
    (tmp_path / "script.py").write_text(text + "print(ids is None, 0 if ids is None else len(ids))")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["False 297", "True 0"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    target = command.split()[1]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_commands_run_in_order(tmp_path, monkeypatch):
    """All but ``make``, on a copy: they write into stores/."""
    from tda.cli import app

    for folder in ("configs", "jobs", "stores/digits"):
        target = tmp_path / folder
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_tree(ROOT / folder, target)
    monkeypatch.chdir(tmp_path)
    commands = [c for c in COMMANDS if c.startswith("tda ")]
    assert len(commands) >= 8
    few = "--set evaluate.num_subsets=2 --set evaluate.workers=1"  # of 64
    for command in commands:
        words = f"{command} {few}" if "evaluate" in command else command
        result = CliRunner().invoke(app, shlex.split(words)[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    assert (tmp_path / "stores/demo/report.html").stat().st_size > 10_000
    assert (tmp_path / "answers.parquet").exists()


def copy_tree(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "cache"))


def recipe_table() -> str:
    rows = [
        f"| `{r.name}` | {r.summary} | {r.formula.replace('|', '∣')} | {r.reference} |"
        for r in RECIPES.values()
    ]
    return "\n".join(["| recipe | what it asks | score | from |", "|---|---|---|---|", *rows])


def test_the_table_of_recipes_is_generated_from_the_declarations():
    """If this fails, put what `recipe_table()` gives between the two marks."""
    shown = re.search(
        r"<!-- recipes: begin -->\n(.*?)\n?<!-- recipes: end -->", README, flags=re.DOTALL
    )
    assert shown is not None
    assert shown[1] == recipe_table()


def test_every_file_and_folder_of_the_tree_exists():
    tree = next(text for _, text in BLOCKS if text.startswith("pyproject.toml"))
    names = re.findall(r"[\w.]+(?:\.py|\.toml|/)(?=\s)", tree)
    assert len(names) > 20
    places = (ROOT, ROOT / "tda", ROOT / "stores", ROOT / "tests")
    missing = [name for name in names if not any((place / name).exists() for place in places)]
    assert not missing
