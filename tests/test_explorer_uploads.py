"""New queries: an uploaded one is answered as if it had been in the query set all along."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tda.cli.workload import index_workload, open_workload
from tda.config import load_config
from tda.explorer import Explorer, create_app

JOB = """
import numpy as np
import torch
import tda

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()

def task():
    torch.manual_seed(2)
    return tda.Task(torch.nn.Linear(4, 3), checkpoints=[torch.nn.Linear(4, 3).state_dict()])

def train():
    return {"input": X[:33], "target": Y[:33], "id": [f"t{i}" for i in range(33)]}

def test():
    return {"input": X[33:], "target": Y[33:], "id": [f"q{i}" for i in range(7)]}

def example(label, row=None, image=None):
    if row is not None and len(row) != 4:
        raise ValueError("four numbers, please")
    values = row if row is not None else image.reshape(-1)[:4] / 255
    return {"input": torch.tensor(values, dtype=torch.float32), "target": torch.tensor(label)}
"""

CONFIG = """
[run]
path = "{path}"
[workload]
task = "job.py:task"
train = "job.py:train"
queries = {{ test = "job.py:test" }}
[projection]
kind = "identity"
dim = 15
[index]
dtype = "float32"
[serve]
example = "job.py:example"
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workload")
    (folder / "job.py").write_text(JOB)
    file = folder / "workload.toml"
    file.write_text(CONFIG.format(path=folder / "run"))
    index_workload(load_config(file))
    return file


@pytest.fixture(scope="module")
def web(config: Path) -> TestClient:
    opened = open_workload(str(config), ())
    assert opened.config is not None
    explorer = Explorer(opened.run, opened.defaults, opened.config.build_example())
    return TestClient(create_app(explorer), base_url="http://localhost")


def test_an_uploaded_row_is_answered_as_the_same_example_of_the_set(web, config):
    opened = open_workload(str(config), ())
    assert opened.config is not None
    known = opened.config.build_queries("test")
    row, label = known["input"][3].tolist(), int(known["target"][3])
    answer = web.post("/api/queries", json={"row": row, "label": label})
    assert answer.status_code == 201, answer.text
    made = answer.json()
    address = f"/api/sets/{made['query_set']}/queries/0?k=5"
    there, here = (web.get(a).json() for a in ("/api/sets/test/queries/3?k=5", address))
    for side in ("proponents", "opponents"):
        assert [s["example"]["id"] for s in here[side]] == [s["example"]["id"] for s in there[side]]
        scores = [[s["score"] for s in answer[side]] for answer in (here, there)]
        np.testing.assert_allclose(*scores, rtol=1e-5)
    assert web.get(made["page"]).status_code == 200
    assert web.post("/api/queries", json={"row": row, "label": label}).json() == made


def test_without_a_label_the_models_own_answer_is_asked_about(web):
    row = [0.3, -0.2, 0.9, 0.1]
    by_label = [
        web.post("/api/queries", json={"row": row, "label": label}).json()["query"]
        for label in range(3)
    ]
    likeliest = max(by_label, key=lambda query: query["p"])
    guessed = web.post("/api/queries", json={"row": row}).json()["query"]
    assert guessed["label"] == likeliest["label"]
    assert sum(query["p"] for query in by_label) == pytest.approx(1, abs=1e-5)


def test_an_uploaded_picture_reaches_the_example_as_bytes(web):
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 51], [102, 255]], np.uint8)).save(file, "PNG")
    picture = web.post(
        "/api/queries", json={"image": base64.b64encode(file.getvalue()).decode(), "label": 1}
    )
    row = web.post("/api/queries", json={"row": [0, 0.2, 0.4, 1], "label": 1})
    assert picture.status_code == 201, picture.text
    assert picture.json()["query"]["loss"] == pytest.approx(row.json()["query"]["loss"])


@pytest.mark.parametrize(
    ("given", "status", "says"),
    [
        ({"image": "rubbish"}, 422, "no picture"),
        ({"image": base64.b64encode(b"<svg onload=alert(1)>").decode()}, 422, "no picture"),
        ({"row": [1, 2]}, 422, "four numbers"),
        ({"row": [1, 2, 3, 1e39], "label": 1}, 422, "not finite"),
        ({"row": [1, 2, 3, 4], "label": 7}, 422, ""),
        ({"text": "hello"}, 409, "[serve] example"),
        ({"row": [1], "text": "hello"}, 422, "one of"),
        ({}, 422, "one of"),
    ],
)
def test_what_no_query_can_be_made_of_is_refused_with_a_reason(web, given, status, says):
    before = web.get("/api/run").json()["query_sets"]
    answer = web.post("/api/queries", json=given)
    assert answer.status_code == status, answer.text
    assert says in answer.text
    after = web.get("/api/run").json()["query_sets"]
    assert after == before
    assert web.get("/").status_code == 200


def test_the_control_is_there_only_where_it_works(web, config):
    assert web.get("/api/run").json()["uploads"] == ["image", "row"]
    page = web.get("/new").text
    assert 'name="row"' in page
    assert 'name="text"' not in page
    folder = open_workload(str(config.parent / "run"), ())
    alone = TestClient(create_app(Explorer(folder.run)), base_url="http://localhost")
    assert 'id="upload"' not in alone.get("/new").text
    assert 'href="/new"' not in alone.get("/").text
    answer = alone.post("/api/queries", json={"row": [1, 2, 3, 4]})
    assert answer.status_code == 409
    assert "tda serve CONFIG.toml" in answer.json()["do"]
