"""The leaderboard: one table from finished cells; what fails says why; what is there is kept."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tda.code import load_code
from tda.evaluate import GroundTruth, lds

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "jobs"
leaderboard: Any = sys.modules[load_code("leaderboard.py:main", JOBS).__module__]
tables, truth = leaderboard.tables, leaderboard.truth

TASK = f"""'''Suite: numbers, and a tiny network.'''
from pathlib import Path
import torch
from tda.code import load_code

Work = load_code("work.py:Work", Path({str(JOBS / "suite")!r}))

def data():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(34, 64, generator=random)
    return {{"input": inputs, "target": inputs[:, :10].argmax(1)}}

WORK = Work(
    name="digits_mlp", data=data, num_train=30, num_queries=4, measurement="cross_entropy",
    training={{"steps": 4, "batch_size": 10, "learning_rate": 0.1, "together": True,
              "num_models": 1}},
    trial_training={{}},
    truth={{"num_halves": 4, "num_seeds": 2, "num_removals": 4, "removed": 0.05}},
)
"""
PEER = """
import sys
import numpy as np
bundle, method, which, number, out = sys.argv[1:]
if method == "broken":
    raise RuntimeError("this peer cannot do it")
data = np.load(bundle + "/data.npz")
scores = data["query_inputs"] @ data["train_inputs"].T
np.savez(out, scores=scores.astype("f4"), seconds=2.5, peak_bytes=2.0**20)
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A leaderboard of one task, one recipe and one peer, computed in a folder of its own."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "digits_mlp.py").write_text(TASK)
    (folder / "peer.py").write_text(PEER)
    python = folder / "data" / "peers" / "kin" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (python.parents[1] / "ready").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        methods = (("kin", "dot", "–", "last", 1), ("kin", "broken", "0", "last", 1))
        patch.setattr(leaderboard.others, "METHODS", methods)
        patch.setattr(leaderboard.others, "SCRIPTS", {"kin": str(folder / "peer.py")})
        truth.compute(leaderboard.module("digits_mlp", folder).WORK, quick=False, progress=False)
        fill(folder)
        yield folder


def fill(folder: Path) -> None:
    methods = ["grad_dot", "dot", "broken"]
    leaderboard.fill("digits_mlp", peers=["kin"], methods=methods, suite=folder)


def page(folder: Path) -> str:
    written = leaderboard.write_page(["digits_mlp"], False, folder, folder)
    return written.read_text(encoding="utf-8")


def line_of(text: str, method: str) -> list[str]:
    (line,) = [one for one in text.splitlines() if one.startswith(f"| {method} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_recipes_and_peers_judged_by_the_same_truth(board):
    text = page(board)
    ours, theirs = line_of(text, "grad_dot"), line_of(text, "dot")
    assert ours[1] == "tda"
    assert ours[9] == f"{2 * 4096:,}"  # two bytes a number
    assert theirs[1:5] == ["kin", "1", "–", "–"]
    assert theirs[7:9] == ["2.5", "1 MB"]
    path = truth.folder("digits_mlp", False)
    with np.load(next((path / "cells").glob("kin-dot-*.npz"))) as found:
        scores = found["scores"]
    for column, name in ((5, "half"), (6, "removal")):
        expected = lds(scores, GroundTruth.open(path / "evaluate" / name))
        assert theirs[column].startswith(f"{expected.value:.3f} [{expected.low:.3f}")


def test_a_peer_that_fails_is_a_row_that_says_why(board):
    row = line_of(page(board), "broken")
    assert row[1] == "kin"
    assert "RuntimeError: this peer cannot do it" in row
    assert row[5] == "–"


def test_a_second_call_computes_nothing(board, monkeypatch):
    def refuse(*given: Any, **options: Any) -> None:
        raise AssertionError("a finished cell was computed again")

    monkeypatch.setattr(leaderboard, "_one", refuse)
    before = page(board)
    fill(board)
    assert page(board) == before


def test_a_cell_that_was_lost_is_computed_again_and_no_other(board):
    cells = truth.folder("digits_mlp", False) / "cells"
    (lost,) = cells.glob("kin-dot-*.json")
    kept = json.loads(lost.read_text())
    times = {file: file.stat().st_mtime_ns for file in cells.glob("*.json") if file != lost}
    lost.unlink()
    fill(board)
    assert json.loads(lost.read_text())["cell"] == kept["cell"]
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_cell_without_a_store_may_be_the_first(board, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    work = leaderboard.module("digits_mlp", board).WORK
    cell = leaderboard.cells.Cell(kind="recipe", method="influence_ekfac")
    leaderboard.cells.compute(work, cell, truth.folder("digits_mlp", False), False)
    with np.load(truth.folder("digits_mlp", False) / "cells" / f"{cell.name}.npz") as found:
        assert found["scores"].shape == (4, 30)


def test_only_what_is_between_the_markers_is_replaced():
    text = "before\n<!-- leaderboard: begin -->\nold\n<!-- leaderboard: end -->\nafter\n"
    new = tables.between_markers(text, "leaderboard", "| new |")
    assert new == text.replace("old", "| new |")
    assert tables.between_markers(new, "leaderboard", "| new |") == new
    assert tables.between_markers("no markers", "leaderboard", "x") == "no markers"


def row(method: str, value: float, part: str = "table", **about: Any) -> dict[str, Any]:
    cell = {"kind": "recipe", "method": method, "checkpoints": "last", "number": 1, "part": part}
    cell |= {"projection": "count_sketch", "damping": "auto", "num_queries": None, **about}
    found = {"value": value, "low": value, "high": value}
    return {"cell": cell, "lds": {"half": found}, "seconds": 1.0, "peak_bytes": 0, "damping": "–"}


def test_the_summary_sets_our_best_against_the_best_peer():
    rows = [row("a", 0.2), row("b", 0.4), row("c", 0.3, kind="peer", peer="kin")]
    rows += [row("replay", 0.9, kind="replay"), row("d", 0.8, part="grid", damping="0.1")]
    task = {"about": "", "ceilings": {"half": 0.95}, "rows": rows}
    last = tables.summary({"t": task}).splitlines()[-1]
    assert last == "| t | half | 0.950 | 0.400 b | 0.300 kin c | – | – |"


def test_our_best_is_held_against_the_best_peer_and_its_defaults():
    kin = {"kind": "peer", "peer": "kin"}
    rows = [row("b", 0.48, copies=6), row("b", 0.4), row("c", 0.32, damping="0.1", **kin)]
    rows += [row("c", 0.2, damping="0, its default", **kin)]
    last = tables.ratios({"t": {"ceilings": {"half": 0.9}, "rows": rows}}).splitlines()[-1]
    shares = "1.50 × 0.320 kin c | 2.40 × 0.200 kin c"
    assert last == f"| t | half | 0.480 | {shares} | 0.400 b | 1.25 |"
    assert tables.ratios({"t": {"ceilings": {"half": 0.9}, "rows": rows[:2]}}) == ""


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({}, "0.500 b"),
        ({"copies": 6}, "0.500 b, 6 copies, noise 0.2"),
        ({"copies": 6, "noise": "found"}, "0.500 b, 6 copies, noise 0.63 found"),
        ({"copies": 2, "noise": "found", "checkpoints": "models", "number": 5},
         "0.500 b, 5 runs, 2 copies, noise 0.63 found"),
    ],
)  # fmt: skip
def test_a_row_of_copies_tells_their_number_and_noise(about, said):
    found = row("b", 0.5, **about) | {"noise": 0.63}
    assert said in tables.summary({"t": {"ceilings": {"half": None}, "rows": [found]}})


def test_a_damping_that_was_set_by_hand_is_not_our_best():
    rows = [row("a", 0.2), row("b", 0.9, damping="0.1")]
    assert tables.best(rows, "half", ours=True, several=False) is rows[0]


@pytest.mark.parametrize(
    ("value", "said"), [(0.3, "No peer is ahead"), (0.5, "0.500 kin c is ahead of 0.400 b")]
)
def test_the_page_says_where_a_peer_is_ahead(value, said):
    rows = [row("b", 0.4), row("c", value, kind="peer", peer="kin")]
    assert said in tables.ahead({"t": {"ceilings": {"half": None}, "rows": rows}})


def test_what_ran_out_of_time_is_tried_again_with_more(tmp_path):
    file = tmp_path / "cell.json"
    for content, minutes, finished in (
        ({}, 60, True),
        ({"given_up": 3}, 3, True),
        ({"given_up": 3}, 60, False),
    ):
        file.write_text(json.dumps(content))
        assert leaderboard._is_finished(file, minutes) is finished


def test_a_call_that_fails_in_a_fork_says_why_and_one_that_takes_too_long_is_ended():
    def refuse() -> None:
        raise ValueError("not of this kind")

    assert leaderboard._fork(refuse, 1) == "ValueError: not of this kind"
    assert leaderboard._fork(lambda: time.sleep(60), 1e-3) == "not done in 0.001 minutes"
    assert leaderboard._fork(lambda: None, 1) is None


@pytest.mark.parametrize(
    ("stderr", "returncode", "said"),
    [
        ("Traceback:\n  call()\na.b.OwnError: no\n", 1, "a.b.OwnError: no"),
        ("RuntimeError: sizes:\n\tsize 3\nof 4\n", 1, "RuntimeError: sizes:"),
        ("KeyError: 1\nValueError\n/a.py:3: UserWarning: w\n  warn(\n", 1, "ValueError"),
        ("/a.py:3: UserWarning: w\n  warnings.warn(\nit takes one checkpoint\n", 1, "it takes one"),
        ("/a.py:3: UserWarning: w\n  warnings.warn(\n", -9, "killed by SIGKILL"),
        ("/a.py:3: UserWarning: w\n  warnings.warn(\n", 1, "warnings.warn("),
        ("", 1, "it ended without a word"),
    ],
)
def test_why_a_process_failed_is_its_last_error_and_no_warning(stderr, returncode, said):
    assert leaderboard.others.last_words(stderr, returncode).startswith(said)


def test_automatic_damping_is_held_against_the_best_of_the_grid():
    rows = [row("b", 0.38), row("b", 0.4, "grid", damping="1"), row("b", 0.1, "grid", damping="9")]
    assert tables.grid(rows).splitlines()[-1] == "| b | half | 0.380 | 0.400 at 1 | 95% |"


def found(digest: str, *rows: dict[str, Any], retrainings: int = 8) -> dict[str, Any]:
    truth_of_them = {"digest": digest, "retrainings": retrainings}
    return {"truth": truth_of_them, "about": "a", "ceilings": {"half": 0.9}, "rows": list(rows)}


def test_rows_of_one_truth_are_joined_and_a_failure_does_not_replace_a_figure():
    old, new, other = row("trak", 0.2), row("trak", 0.3), row("influence", 0.4)
    failed = {"cell": row("influence", 0)["cell"], "why_not": "not done in 3 minutes"}
    both = leaderboard.kept.joined(found("x", old, other), found("x", new, failed))
    assert [one["lds"]["half"]["value"] for one in both["rows"]] == [0.3, 0.4]


def test_rows_of_another_truth_never_stand_beside_them():
    here = found("y", row("trak", 0.3))
    kept = leaderboard.kept
    assert kept.joined(found("x", row("trak", 0.2)), here) == here
    assert kept.joined(found("x", row("trak", 0.2), row("influence", 0.1)), here) is None
    assert kept.joined(found("x", row("trak", 0.2), retrainings=9), here) is None


def test_rows_of_two_machines_are_joined_where_what_both_have_is_alike():
    """Retrainings differ in rounding, and so do their digests; a figure that is there stays."""
    kept, methods = leaderboard.kept, ("trak", "influence", "grad_dot")
    before = found("x", *(row(m, 0.2) for m in methods), row("grad_cos", 0.1))
    new = row("tracin", 0.4)
    near = found("y", *(row(m, 0.205) for m in methods), new)
    joined = kept.joined(before, near)
    assert joined["truth"] == before["truth"]
    assert [one["lds"]["half"]["value"] for one in joined["rows"]] == [0.2] * 3 + [0.1, 0.4]
    failed = {"cell": row("grad_cos", 0)["cell"], "why_not": "not done in 3 minutes"}
    assert kept.joined(before, {**near, "rows": [*near["rows"], failed]}) == joined
    far = found("y", row("trak", 0.23), *(row(m, 0.2) for m in methods[1:]), new)
    few = found("y", *(row(m, 0.2) for m in methods[:2]), new)
    other = {**near, "truth": {**near["truth"], "retrainings": 7}}
    for one in (far, few, other):
        assert kept.joined(before, one) in (None, one)


def test_what_is_kept_is_read_back(tmp_path):
    whole = found("x", row("trak", 0.25, damping="0.1"), row("grad_dot", 0.5))
    leaderboard.kept.write(tmp_path / "t.json", whole)
    back = leaderboard.kept.read(tmp_path / "t.json")
    names = [leaderboard.kept.name_of(one) for one in back["rows"]]
    assert names == sorted(map(leaderboard.kept.name_of, whole["rows"]))
    assert back["rows"][0]["lds"] == {"half": {"value": 0.5, "low": 0.5, "high": 0.5}}
    assert back["rows"][1]["cell"]["damping"] == "0.1"


def test_another_machine_s_truth_has_another_digest():
    masks = np.eye(4, dtype=np.uint8)
    first, second = (GroundTruth(masks, np.full((4, 1, 2), value)) for value in (0.0, 1.0))
    digest = leaderboard.kept.digest
    assert digest({"half": first}) == digest({"half": GroundTruth(masks, np.zeros((4, 1, 2)))})
    assert digest({"half": first}) != digest({"half": second})
    assert digest({"half": first}) != digest({"removal": first})


def test_a_page_is_made_of_what_is_kept_where_nothing_was_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = {"num_models": 1, "num_queries": 4, "adam": False}
    one = found("x", row("trak", 0.25))
    one["truth"] |= about
    leaderboard.kept.write(tmp_path / "leaderboard" / "digits_mlp.json", one)
    text = page(tmp_path)
    assert line_of(text, "trak")[5] == "0.250 [0.250, 0.250]"
    assert "Rows not run yet" in text
