"""The committed run, uploaded: every question is answered as from the folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from object_storage import SECRETS
from typer.testing import CliRunner

import tda
from tda.cli import app
from tda.store import remote
from tda.store.files import as_place, list_files, write_files
from tda.store.remote import traffic

DIGITS = Path(__file__).parents[1] / "stores" / "digits"
URL = "s3://bucket/stores/digits"


@pytest.fixture(scope="module")
def uploaded(s3, tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        patch.setenv("TDA_CACHE", str(tmp_path_factory.mktemp("kept")))
        parts = ("manifest.json", "train/", "queries/")
        keys = [key for key in list_files(DIGITS) if key.startswith(parts)]
        write_files(as_place(URL), ((key, ((DIGITS / key).read_bytes(),)) for key in keys))
        yield


def asked() -> tuple[dict[str, list], Counter[str]]:
    before = Counter(traffic)
    run = tda.open(URL)
    top = run.top_k(run.queries[0], k=3, recipe="grad_cos")
    answers = {"ids": top.proponents.ids, "scores": top.proponents.scores}
    return answers, traffic - before


def test_answers_are_those_of_the_folder_and_the_second_time_nothing_comes_over_the_wire(
    uploaded,
):
    here = tda.open(DIGITS)
    wanted = here.top_k(here.queries[0], k=3, recipe="grad_cos")
    first, cost = asked()
    again, less = asked()
    for answers in (first, again):
        np.testing.assert_array_equal(answers["ids"], wanted.proponents.ids)
        np.testing.assert_array_equal(answers["scores"], wanted.proponents.scores)
    chunks = sum(1 for key in list_files(DIGITS / "train") if "/c/" in key)
    assert cost["down"] > 100_000
    assert cost["GET"] <= chunks + len(list_files(DIGITS / "queries")) + 40
    assert less["down"] == less["GET"] == less["PUT"] == 0
    assert less["LIST"] + less["HEAD"] <= 40


@pytest.mark.parametrize(
    "command", [["verify"], ["query", "-k", "2"], ["score", "--recipe", "grad_dot"]]
)
def test_commands_take_a_url(uploaded, command):
    name, *more = command
    result = CliRunner().invoke(app, [name, URL, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not [secret for secret in SECRETS.values() if secret in result.output]
    if name == "score":
        assert Path(result.output.strip().splitlines()[-1]).is_dir()


def test_a_url_of_nothing_is_told(uploaded):
    result = CliRunner().invoke(app, ["query", "s3://bucket/nothing"])
    assert result.exit_code == 1
    assert "there is no run" in str(result.exception or "") + result.output


def test_the_explorer_serves_it(uploaded):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from tda.explorer import Explorer
    from tda.explorer.app import create_app

    explorer = Explorer(tda.open(URL))
    client = TestClient(create_app(explorer), "http://127.0.0.1")
    answer = client.get("/api/run")
    assert answer.status_code == 200
    assert json.loads(answer.text)
    assert remote.stat(as_place(URL) / "manifest.json") is not None
