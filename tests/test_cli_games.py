"""`tda game` and `tda shift`, from the command to the file, against oracles of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from explorer_run import make_run
from pyarrow import csv, parquet
from typer.testing import CliRunner

from tda import valuation
from tda.cli import app
from tda.valuation import Mechanism

JOB = """
from pathlib import Path

VOTES = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 1.0}

def bought(members):
    with open("calls.txt", "a") as file:
        file.write(f"{'+'.join(members)}\\n")
    votes = sum(VOTES[name] for name in members)
    return float(votes >= 4) + 0.01 * votes ** 2

def weighed(members, indices):
    return float(indices.sum()) + len(members) * len(indices)

def broken(members):
    return float("nan")

def wide(members):
    return sum(int(name[1:]) for name in members) ** 0.5
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path


def ran(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def brute_force(utility, players) -> dict[str, float]:
    """Shapley values as the mean marginal contribution over every order of the players."""
    orders = list(permutations(players))
    value = dict.fromkeys(players, 0.0)
    for order in orders:
        for i, player in enumerate(order):
            before = tuple(sorted(order[:i]))
            value[player] += utility(tuple(sorted((*before, player)))) - utility(before)
    return {name: total / len(orders) for name, total in value.items()}


def values_in(path: Path) -> dict[str, float]:
    rows = parquet.read_table(path).to_pylist()
    return {row["player"]: row["value"] for row in rows}


def players(names: str) -> list[str]:
    return [word for name in names for word in ("--player", name)]


def bought(members) -> float:
    votes = sum({"a": 3, "b": 2, "c": 1, "d": 1}[name] for name in members)
    return float(votes >= 4) + 0.01 * votes**2


def test_values_are_those_of_every_order_of_the_players(here):
    found = ran("game", "job.py:bought", *players("abcd"))
    assert "the values are exact; 16 utilities" in found.output
    wanted = brute_force(bought, "abcd")
    assert values_in(here / "game.parquet") == pytest.approx(wanted)
    assert found.output.index(" a ") < found.output.index(" b ")  # the most valuable first


@pytest.mark.parametrize("kind", ["banzhaf", "leave_one_out", "beta:4,1"])
def test_other_kinds_are_those_of_the_library(here, kind):
    ran("game", "job.py:bought", *players("abcd"), "--kind", kind)
    named = valuation.Beta(4, 1) if kind.startswith("beta") else kind
    wanted = valuation.semivalues(bought, "abcd", named)
    found = values_in(here / "game.parquet")
    np.testing.assert_allclose([found[name] for name in "abcd"], wanted.value)


def test_a_game_goes_on_where_it_was_and_begins_again_with_other_code(here):
    """No utility is computed twice, unless the file it comes from has changed."""
    calls = here / "calls.txt"
    ran("game", "job.py:bought", *players("abcd"), "--kind", "leave_one_out")
    first = calls.read_text().splitlines()
    ran("game", "job.py:bought", *players("abcd"))
    every = calls.read_text().splitlines()
    assert len(first) == 6 and len(every) == len(set(every)) == 16
    (here / "job.py").write_text(JOB + "# changed\n")
    code = "import sys; from tda.cli import main; main()"
    again = ["game", "job.py:bought", *players("abcd")]

    subprocess.run([sys.executable, "-c", code, *again], check=True, capture_output=True)
    assert len(calls.read_text().splitlines()) == 32


def test_many_players_are_sampled_and_told_whether_that_was_enough(here):
    """√(1 + … + 20): the values lie about their means over orders, within 4 standard errors."""
    names = [f"p{i}" for i in range(1, 21)]
    asked = [word for name in names for word in ("--player", name)]
    few = ran("game", "job.py:wide", *asked, "--samples", 8)
    assert "Not settled" in few.output and "more --samples" in few.output
    more = ran("game", "job.py:wide", *asked, "--samples", 200)
    assert "Settled" in more.output
    rows = parquet.read_table(here / "game.parquet").to_pylist()
    assert sum(row["value"] for row in rows) == pytest.approx(210**0.5)  # efficiency
    rng = np.random.default_rng(7)
    weight = np.arange(1, 21)
    total = np.zeros(20)
    for _ in range(4000):
        order = rng.permutation(20)
        total[order] += np.diff(np.sqrt(np.append(0, np.cumsum(weight[order]))))
    error = np.array([row["standard_error"] for row in rows])
    assert (np.abs([row["value"] for row in rows] - total / 4000) < 4 * error + 0.01).all()


def test_groups_of_a_run_are_players_and_their_examples_are_told(here):
    made = make_run(here / "run")
    source = made.run.store.table("train").column("source")
    places = {name: np.flatnonzero(source == name) for name in np.unique(source).tolist()}

    def weighed(members) -> float:
        indices = np.concatenate([np.zeros(0, int), *(places[name] for name in members)])
        return float(indices.sum()) + len(members) * len(indices)

    ran("game", "job.py:weighed", "--run", here / "run", "--by", "source", "--out", "s.parquet")
    assert values_in(here / "s.parquet") == pytest.approx(brute_force(weighed, list(places)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["job.py:bought"], "who are the players?"),
        (["job.py:bought", "--by", "source"], "who are the players?"),
        (["job.py:nothing", "--player", "a"], "has no function 'nothing'"),
        (["job.py:broken", "--player", "a"], "not a finite number"),
        (["job.py:bought", "--player", "a", "--player", "a"], "named twice"),
        (["job.py:bought", "--player", "a", "--kind", "beta:0,1"], "no semivalue"),
        (["job.py:bought", "--player", "a", "--kind", "owen"], "no semivalue"),
        (["job.py:bought", "--player", "a", "--out", "x.csv"], "written as Parquet"),
    ],
)
def test_what_is_no_game_is_said(here, arguments, says):
    assert says in ran("game", *arguments, code=1).output


# ---- shifts


def world(seed: int, share: float) -> dict[str, np.ndarray]:
    """Two sources of different loss; between the data sets their shares moved."""
    rng = np.random.default_rng(seed)
    source = np.where(rng.random(1500) < share, "b", "a")
    x = rng.normal(size=1500)
    return {"source": source, "x": x, "loss": 0.2 + 0.5 * (source == "b") + 0 * x}


def test_a_shift_of_shares_is_explained_by_the_shares(here):
    """loss = .2 + .5·1[b]: the difference is half that of the shares, all of it P(source)'s."""
    old, new = world(0, 0.2), world(1, 0.6)
    csv.write_csv(pa.table(old), here / "old.csv")
    parquet.write_table(pa.table(new), here / "new.parquet")
    asked = ["--metric", "loss", "--mechanism", "P(source)", "--mechanism", "x | source"]
    done = ran("shift", "old.csv", "new.parquet", *asked, "--out", "shift.parquet")
    rows = parquet.read_table(here / "shift.parquet").to_pylist()
    assert [row["mechanism"] for row in rows] == ["P(source)", "P(x | source)"]
    moved = 0.5 * ((new["source"] == "b").mean() - (old["source"] == "b").mean())
    assert rows[0]["value"] == pytest.approx(moved, abs=0.01)
    assert rows[1]["value"] == pytest.approx(0, abs=0.01)
    assert "explain the observed difference" in done.output
    named = (Mechanism(("source",)), Mechanism(("x",), ("source",)))
    same = valuation.explain_shift(old, new, old["loss"], new["loss"], named)
    np.testing.assert_allclose([row["value"] for row in rows], same.value, atol=1e-9)
    about = parquet.read_schema(here / "shift.parquet").metadata
    assert json.loads(about[b"observed"]) == pytest.approx(moved)


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("x,loss\n1,2\n", ["--metric", "cost", "--mechanism", "x"], "no such column"),
        ("x,loss\n1,2\n", ["--metric", "loss", "--mechanism", "x |"], "no mechanism"),
        ("x,loss\n1,2\n", ["--metric", "loss", "--mechanism", "y"], "column 'y'"),
        ("x,loss\n1,\n", ["--metric", "loss", "--mechanism", "x"], "empty cells"),
        ("", ["--metric", "loss", "--mechanism", "x"], "cannot be read"),
    ],
)
def test_tables_that_say_nothing_are_refused(here, text, arguments, says):
    (here / "old.csv").write_text(text)
    assert says in ran("shift", "old.csv", "old.csv", *arguments, code=1).output


def test_other_files_are_no_tables(here):
    asked = ["--metric", "loss", "--mechanism", "x"]
    assert "no table" in ran("shift", "job.py", "job.py", *asked, code=1).output
