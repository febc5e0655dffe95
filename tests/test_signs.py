"""A score is called reliable where its sign is the same wherever it repeats; by hand."""

from __future__ import annotations

import numpy as np
import pytest
from explorer_run import Made, make_run
from fastapi.testclient import TestClient
from pyarrow import parquet
from typer.testing import CliRunner

from tda.cli import app
from tda.explorer import Explorer, create_app
from tda.recipes import get_recipe
from tda.report import write_report
from tda.scorer.signs import SignRule, signs_of, signs_survive


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return make_run(tmp_path_factory.mktemp("signs") / "run", num_checkpoints=3)


def by_hand(made: Made) -> np.ndarray:
    """[query, train]: ⟨∇ℓ_q, ∇ℓ_i⟩ has one sign at all three checkpoints."""
    each = np.einsum("cqk,cik->cqi", made.queries.gradients, made.train.gradients)
    return (each > 0).all(0) | (each < 0).all(0)


def test_signs_survive_where_every_checkpoint_agrees(made):
    recipe, prepared = get_recipe("grad_dot"), made.run.prepare("test", "grad_dot")
    rule = SignRule.of(made.run.store.manifest, recipe)
    assert rule.says == "its sign is the same in all 3 checkpoints of one training"
    pairs = np.indices((9, 60)).reshape(2, -1)
    found = signs_survive(prepared, rule, pairs[0], pairs[1])
    wanted = by_hand(made)
    np.testing.assert_array_equal(found.reshape(9, 60), wanted)
    assert 0.1 < wanted.mean() < 0.5  # of noise, 1 in 4


def test_trainings_are_what_repeats_where_there_are_several(made):
    """Steps that begin again: checkpoints 0 and 1 are of one training, 2 of another."""
    manifest = dict(made.run.store.manifest)
    steps = [{**c, "step": s} for c, s in zip(manifest["checkpoints"], (1, 2, 1), strict=True)]
    rule = SignRule.of({**manifest, "checkpoints": steps}, get_recipe("grad_dot"))
    assert rule.groups == ((0, 1), (2,)) and "all 2 trainings" in rule.says
    pairs = np.indices((9, 60)).reshape(2, -1)
    found = signs_survive(made.run.prepare("test", "grad_dot"), rule, pairs[0], pairs[1])
    each = np.einsum("cqk,cik->cqi", made.queries.gradients, made.train.gradients)
    both = (each[:2].sum(0) > 0) == (each[2] > 0)
    np.testing.assert_array_equal(found.reshape(9, 60), both)


def test_halves_of_a_sketch_must_agree_too(made):
    """Even and odd dimensions of the only checkpoint."""
    rule = SignRule(((2,),), False, True)
    pairs = np.indices((9, 60)).reshape(2, -1)
    found = signs_survive(made.run.prepare("test", "grad_dot"), rule, pairs[0], pairs[1])
    q, x = made.queries.gradients[2], made.train.gradients[2]
    even, odd = q[:, ::2] @ x[:, ::2].T, q[:, 1::2] @ x[:, 1::2].T
    np.testing.assert_array_equal(found.reshape(9, 60), (even > 0) == (odd > 0))


def test_nothing_is_known_where_nothing_repeats(made, tmp_path):
    """One checkpoint that is not sketched; or a sum along the training, with curvature."""
    alone = make_run(tmp_path / "alone", num_checkpoints=1).run
    top = alone.top_k("test", 3, "grad_dot")
    assert signs_of(alone.prepare("test", "grad_dot"), alone.store.manifest, top) is None
    assert not SignRule.of(made.run.store.manifest, get_recipe("tracin")).tells
    out = tmp_path / "alone.parquet"
    asked = ["query", str(alone.path), "--recipe", "grad_dot", "-k", "2", "--out", str(out)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and "★" not in done.output
    assert parquet.read_table(out)["reliable"].null_count == 9 * 2 * 2


def test_query_report_and_explorer_say_the_same(made, tmp_path):
    wanted, ids = by_hand(made), {name: i for i, name in enumerate(made.run.ids.tolist())}
    out = tmp_path / "top.parquet"
    asked = ["query", str(made.run.path), "--recipe", "grad_dot", "-k", "4", "--out", str(out)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0 and "★ its sign is the same in all 3" in done.output
    queries = made.run.store.table("queries/test").column("id").tolist()
    rows = [row for row in parquet.read_table(out).to_pylist() if row["side"] != "nearest"]
    assert [r["reliable"] for r in rows] == [
        wanted[queries.index(r["query"]), r["train_index"]] for r in rows
    ]
    page = write_report(made.run, tmp_path / "report.html", query_name="test", recipe="grad_dot")
    table = parquet.read_table(tmp_path / "top_k.parquet")
    for row in table.to_pylist():
        assert row["reliable"] == wanted[queries.index(row["query"]), ids[row["train"]]]
    assert table.schema.metadata[b"reliable"].startswith(b"its sign is the same")
    assert "A score is reliable (★) where its sign is the same in all 3" in page.read_text()
    web = TestClient(create_app(Explorer(made.run)), base_url="http://localhost")
    answer = web.get("/api/sets/test/queries/5?recipe=grad_dot").json()
    for side in ("proponents", "opponents"):
        for each in answer[side]:
            assert each["reliable"] == wanted[5, each["example"]["index"]]
    assert "★" in web.get("/?query=5&recipe=grad_dot").text
