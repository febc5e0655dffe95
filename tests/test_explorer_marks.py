"""Marks: nothing that was acknowledged is lost, whoever marks at the same time."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from explorer_run import Made, make_run
from fastapi.testclient import TestClient

import tda
from tda.decisions import ConflictError, Mark, Marks, as_csv
from tda.errors import StoreError
from tda.explorer import Explorer, create_app


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path / "run", num_train=30, shows="image")


def web_of(made: Made) -> TestClient:
    return TestClient(create_app(Explorer(made.run)), base_url="http://localhost")


def test_a_mark_is_shown_where_its_example_is_and_outlives_the_server(made):
    given = {"index": 4, "action": "relabel", "label": "3", "note": "clearly a 3"}
    answer = web_of(made).post("/api/marks", json=given)
    assert answer.status_code == 201
    again = web_of(made)
    (mark,) = again.get("/api/marks").json()
    assert (mark["id"], mark["index"], mark["label"]) == ("train-4", 4, "3")
    assert again.get("/api/train/4").json()["mark"] == mark
    assert "clearly a 3" in again.get("/marks").text
    shown = again.get("/api/sets/test/queries/0?recipe=grad_dot&k=30").json()
    examples = [s["example"] for side in ("proponents", "opponents") for s in shown[side]]
    assert [e["index"] for e in examples if e["mark"]] == [4]


def test_a_deleted_example_is_in_no_list_and_its_mark_waits(made):
    """A server that is running notices; positions are those of the rest."""
    web = web_of(made)
    web.post("/api/marks", json={"id": "train-7", "action": "remove"})
    tda.open(made.run.path).delete(["train-7"])
    assert web.get("/api/marks").json() == [] and "train-7" not in web.get("/marks").text
    assert web.get("/api/train/7").json()["id"] == "train-8"
    listed = web.get("/api/sets/test/queries/0?recipe=grad_dot&k=30").json()
    examples = [s["example"] for side in ("proponents", "opponents") for s in listed[side]]
    assert {e["id"] for e in examples} == {f"train-{i}" for i in range(30) if i != 7}
    tda.open(made.run.path).restore(["train-7"])
    assert [mark["index"] for mark in web.get("/api/marks").json()] == [7]


def test_the_last_decision_holds_and_none_withdraws_it(made):
    web = web_of(made)
    for action in ("remove", "keep"):
        assert web.post("/api/marks", json={"id": "train-7", "action": action}).status_code == 201
    assert [m["action"] for m in web.get("/api/marks").json()] == ["keep"]
    web.post("/api/marks", json={"index": 7, "action": "none"})
    assert web.get("/api/marks").json() == []
    lines = (made.run.path / "actions" / "marks.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines] == ["remove", "keep", "none"]


def test_the_second_of_two_who_saw_the_same_mark_is_told(made):
    first, second = web_of(made), web_of(made)
    given = {"index": 2, "action": "remove", "revision": 0}
    revision = first.post("/api/marks", json=given).json()["revision"]
    answer = second.post("/api/marks", json={**given, "action": "keep"})
    assert answer.status_code == 409
    assert "remove" in answer.json()["found"]
    assert second.get("/api/marks").json()[0]["action"] == "remove"
    replaced = second.post("/api/marks", json={**given, "action": "keep", "revision": revision})
    assert replaced.status_code == 201


def test_two_users_at_once_lose_nothing(made):
    webs = [web_of(made), web_of(made)]
    for web in webs:
        web.get("/api/marks")  # routes are built at the first request

    def mark(index: int) -> int:
        given = {"index": index % 30, "action": "remove", "note": str(index)}
        return webs[index % 2].post("/api/marks", json=given).status_code

    with ThreadPoolExecutor(8) as users:
        assert set(users.map(mark, range(60))) == {201}
    found = webs[0].get("/api/marks").json()
    assert sorted(m["index"] for m in found) == list(range(30))
    lines = (made.run.path / "actions" / "marks.jsonl").read_text().splitlines()
    notes = [json.loads(line)["note"] for line in lines]
    assert sorted(map(int, notes)) == list(range(60))


def _mark_many(path: Path, prefix: str) -> None:
    marks = Marks(path)
    for i in range(40):
        marks.set(f"{prefix}{i}", "keep", None, "")


def test_two_processes_at_once_lose_nothing(tmp_path):
    run = multiprocessing.get_context("fork")
    both = [run.Process(target=_mark_many, args=(tmp_path, prefix)) for prefix in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    marks = Marks(tmp_path).all()
    assert set(marks) == {f"{prefix}{i}" for prefix in "ab" for i in range(40)}
    assert sorted(mark.revision for mark in marks.values()) == list(range(1, 81))


def test_a_line_cut_short_by_a_crash_is_as_if_never_written(tmp_path):
    marks = Marks(tmp_path)
    marks.set("a", "remove", None, "")
    whole = marks.path.read_bytes()
    marks.path.write_bytes(whole + b'{"id": "b", "act')
    assert set(Marks(tmp_path).all()) == {"a"}
    marks.set("c", "keep", None, "")
    assert set(Marks(tmp_path).all()) == {"a", "c"}
    assert marks.path.read_bytes().startswith(whole)
    assert b'"act"' not in marks.path.read_bytes()


def test_a_damaged_line_is_named_and_nothing_is_written_over_it(made):
    marks = Marks(made.run.path)
    marks.set("train-1", "remove", None, "")
    marks.set("train-2", "remove", None, "")
    data = marks.path.read_bytes()
    marks.path.write_bytes(b"rubbish\n" + data)
    with pytest.raises(StoreError, match="line 1"):
        Marks(made.run.path).all()
    web = web_of(made)
    assert web.get("/marks").status_code == 503
    assert "line 1" in web.get("/marks").text
    assert web.post("/api/marks", json={"index": 1, "action": "keep"}).status_code == 503
    assert marks.path.read_bytes() == b"rubbish\n" + data


def test_only_the_seen_revision_is_replaced(tmp_path):
    marks = Marks(tmp_path)
    assert marks.set("a", "keep", None, "", seen=0).revision == 1
    with pytest.raises(ConflictError):
        marks.set("a", "remove", None, "", seen=0)
    assert marks.set("a", "remove", None, "", seen=1).revision == 2


def test_the_export_has_every_mark_and_no_formula(made):
    web = web_of(made)
    web.post("/api/marks", json={"index": 1, "action": "keep", "note": '=HYPERLINK("x"),\n"y"'})
    web.post("/api/marks", json={"index": 2, "action": "relabel", "label": "-1", "note": "é"})
    answer = web.get("/api/marks.csv")
    assert "attachment" in answer.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(answer.content.decode())))
    assert [(row["id"], row["action"]) for row in rows] == [
        ("train-2", "relabel"),
        ("train-1", "keep"),
    ]
    assert rows[0]["label"] == "'-1"
    assert rows[1]["note"] == '\'=HYPERLINK("x"),\n"y"'
    assert as_csv([Mark("\ta", "keep")]).splitlines()[1].startswith("'\ta")


def test_a_mark_that_makes_no_sense_is_refused(made):
    web = web_of(made)
    for given in (
        {"action": "keep"},
        {"index": 1, "id": "train-1", "action": "keep"},
        {"index": 1, "action": "burn"},
        {"index": 1, "action": "relabel"},
        {"index": 1, "action": "keep", "note": "x" * 1001},
        {"index": 1, "action": "keep", "more": 1},
    ):
        assert web.post("/api/marks", json=given).status_code == 422
    assert web.post("/api/marks", json={"index": 30, "action": "keep"}).status_code == 404
    assert web.post("/api/marks", json={"id": "no", "action": "keep"}).status_code == 404
    assert web.get("/api/marks").json() == []


def test_the_form_marks_without_javascript(made):
    web = web_of(made)
    form = "index=5&revision=0&action=relabel&label=2&note=a+note"
    answer = web.post("/marks", content=form, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/train/5")
    page = web.get("/train/5").text
    assert "a note" in page
    assert web.post("/marks", content=form).status_code == 409
    assert web.post("/marks", content="index=5&action=relabel").status_code == 422


def test_a_run_that_cannot_be_written_says_so(made):
    (made.run.path / "actions").write_text("a file where the folder should be")
    answer = web_of(made).post("/api/marks", json={"index": 1, "action": "keep"})
    assert answer.status_code == 503
    assert "actions" in answer.json()["where"]
