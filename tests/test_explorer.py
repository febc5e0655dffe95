"""The explorer's answers: each equals a written-out formula or a brute-force search."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from explorer_run import HOSTILE, Made, make_run
from fastapi.testclient import TestClient
from report_run import Page

import tda.explorer.asking as asking
from tda.config import QuerySection
from tda.errors import RecipeError
from tda.explorer import Explorer, create_app
from tda.recipes import RECIPES

PAGES = ("/", "/groups", "/compare", "/self-influence", "/marks", "/run", "/new", "/train/3")


def client(explorer: Explorer) -> TestClient:
    return TestClient(create_app(explorer), base_url="http://localhost")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def web(made: Made) -> TestClient:
    return client(Explorer(made.run))


def got(web: TestClient, address: str, **params: Any) -> Any:
    answer = web.get(f"/api/{address}", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def indices(side: list[dict[str, Any]]) -> list[int]:
    return [scored["example"]["index"] for scored in side]


def scores(side: list[dict[str, Any]]) -> np.ndarray:
    return np.array([scored["score"] for scored in side])


def test_an_answer_is_the_k_largest_and_smallest_of_the_formula(web, made):
    for query, truth in enumerate(made.grad_dot):
        answer = got(web, f"sets/test/queries/{query}", recipe="grad_dot", k=7)
        order = np.argsort(-truth)
        assert indices(answer["proponents"]) == order[:7].tolist()
        assert indices(answer["opponents"]) == order[::-1][:7].tolist()
        np.testing.assert_allclose(scores(answer["proponents"]), truth[order[:7]], rtol=1e-4)
        assert answer["query"]["index"] == query
        assert answer["damping"] == []


def test_proponents_have_positive_and_opponents_negative_scores_even_if_k_wants_more(web, made):
    answer = got(web, "sets/test/queries/0", recipe="grad_dot", k=60)
    assert len(answer["proponents"]) == int((made.grad_dot[0] > 0).sum())
    assert len(answer["opponents"]) == int((made.grad_dot[0] < 0).sum())


@pytest.mark.parametrize("recipe", ["grad_cos", "trak", "influence", "datainf", "source"])
def test_every_recipe_gives_the_scores_the_engine_gives(web, made, recipe):
    exact = made.run.scores("test", recipe).compute()
    for query in (0, 5):
        answer = got(web, f"sets/test/queries/{query}", recipe=recipe, k=5)
        wanted = np.sort(exact[query])
        np.testing.assert_allclose(scores(answer["proponents"]), wanted[::-1][:5], rtol=2e-4)
        np.testing.assert_allclose(scores(answer["opponents"]), wanted[:5], rtol=2e-4)


def test_damping_is_a_multiple_of_the_mean_eigenvalue(web, made):
    p = made.train.p.astype(np.float64)
    square = np.square(made.train.rows.astype(np.float64)).sum(2)
    mean_eigenvalue = (p * (1 - p) * square).mean(1) / made.train.rows.shape[2]
    used = got(web, "sets/test/queries/0", recipe="influence", damping=0.3)["damping"]
    np.testing.assert_allclose(used, 0.3 * mean_eigenvalue, rtol=1e-6)


def test_filters_leave_the_best_of_those_that_match(web, made):
    chosen = got(web, "sets/test/queries/2", recipe="grad_dot", k=4, label="1", source="beta")
    match = np.array([i for i in range(60) if i % 4 == 1 and i % 3 == 1])
    truth = made.grad_dot[2]
    order = match[np.argsort(-truth[match])]
    assert chosen["num_kept"] == len(match)
    assert indices(chosen["proponents"]) == [i for i in order[:4] if truth[i] > 0]
    assert indices(chosen["opponents"]) == [i for i in order[::-1][:4] if truth[i] < 0]
    missing = web.get("/api/sets/test/queries/2?label=9")
    assert missing.status_code == 422
    assert missing.json()["wanted"] == "0, 1, 2, 3"


def test_values_are_means_over_the_query_set(web, made):
    answer = got(web, "sets/test/values", recipe="grad_dot", k=6)
    mean = made.grad_dot.mean(0)
    order = np.argsort(-mean)
    assert answer["query"] is None
    assert indices(answer["proponents"]) == order[:6].tolist()
    np.testing.assert_allclose(scores(answer["opponents"]), mean[order[::-1][:6]], rtol=1e-4)


def test_layers_sum_to_the_scores(web, made):
    answer = got(web, "sets/test/queries/1", recipe="influence", k=5)
    layers = got(web, "sets/test/queries/1/layers", recipe="influence", k=5)
    shown = [*answer["proponents"], *answer["opponents"]]
    assert layers["indices"] == indices(shown)
    assert layers["layers"] == ["first", HOSTILE[0]]
    np.testing.assert_allclose(np.sum(layers["scores"], 0), scores(shown), rtol=1e-3)
    first = slice(0, 5)
    q, t = (known.gradients[..., first] for known in (made.queries, made.train))
    dots = got(web, "sets/test/queries/1/layers", recipe="grad_dot", k=5)
    wanted = np.einsum("ck,cik->i", q[:, 1], t)[dots["indices"]] / 2
    np.testing.assert_allclose(dots["scores"][0], wanted, rtol=1e-4, atol=1e-6)


def test_a_comparison_is_the_overlap_and_the_rank_correlation_of_all_scores(web, made):
    found = got(web, "sets/test/queries/3/comparison", recipe="grad_dot", other="trak", k=8)
    trak = made.run.scores("test", "trak").compute()[3]
    best = [set(np.argsort(-of)[:8]) for of in (made.grad_dot[3], trak)]
    assert found["overlap_proponents"] == len(best[0] & best[1]) / 8
    wanted = scipy.stats.spearmanr(made.grad_dot[3], trak).statistic
    assert found["spearman"] == pytest.approx(wanted, abs=1e-9)
    assert found["chance"] == 8 / 60
    same = got(web, "sets/test/queries/3/comparison", recipe="trak", other="trak")
    assert (same["overlap_proponents"], same["spearman"]) == (1, pytest.approx(1))


def test_shares_of_groups_sum_to_one_and_totals_to_the_total(web, made):
    truth = made.grad_dot[4]
    for groups in got(web, "sets/test/groups", query=4, recipe="grad_dot"):
        each = groups["groups"]
        assert sum(group["share"] for group in each) == pytest.approx(1)
        assert sum(group["count"] for group in each) == 60
        assert sum(group["total"] for group in each) == pytest.approx(truth.sum(), rel=1e-4)
    label = {g["name"]: g for g in each if groups["column"] == "label"}
    assert label["2"]["mean"] == pytest.approx(truth[2::4].mean(), rel=1e-4)
    assert label["2"]["share"] == pytest.approx(abs(truth[2::4]).sum() / abs(truth).sum(), rel=1e-4)


def test_reach_is_the_column_of_what_the_queries_show(web, made):
    reach = got(web, "train/11/reach", queries="test", recipe="grad_dot", k=9)
    column = made.grad_dot[:, 11]
    order = np.argsort(-column)
    assert indices(reach["helped"]) == [q for q in order if column[q] > 0]
    assert indices(reach["hurt"]) == [q for q in order[::-1] if column[q] < 0]


def test_self_influence_is_ranked_and_paged(web, made):
    own = np.square(made.train.gradients).sum(2).mean(0)
    order = np.argsort(-own)
    pages = [got(web, "self-influence", recipe="grad_dot", size=20, page=p) for p in (1, 2, 3, 4)]
    assert [i for page in pages for i in indices(page["examples"])] == order.tolist()
    assert pages[0]["mean"] == pytest.approx(own.mean(), rel=1e-4)


def test_queries_are_found_by_id_label_and_text_and_ordered(web, made):
    p = made.queries.p[-1]
    listed = got(web, "sets/test/queries", order="lowest_p")
    assert [query["index"] for query in listed["queries"]] == np.argsort(p).tolist()
    by_loss = got(web, "sets/test/queries", order="largest_loss")
    assert by_loss["queries"] == listed["queries"]
    for search, wanted in (("TEST-7", [7]), ("about test-3", [3]), ("2", [2, 6]), ("zzz", [])):
        found = got(web, "sets/test/queries", search=search)
        assert [query["index"] for query in found["queries"]] == wanted
        assert found["total"] == len(wanted)
    pages = [got(web, "sets/test/queries", size=4, page=page) for page in (1, 2, 3)]
    assert [q["index"] for page in pages for q in page["queries"]] == list(range(9))


def test_rows_that_do_not_fit_in_memory_give_the_same_answer(made, monkeypatch):
    kept = client(Explorer(made.run))
    wanted = [got(kept, f"sets/test/queries/{q}", recipe="trak") for q in range(9)]
    monkeypatch.setattr(asking, "ROW_BYTES", 0)
    explorer = Explorer(made.run)
    assert not explorer.fits
    web = client(explorer)
    for q, exact in enumerate(wanted):
        for search, recall in (("exact", None), ("auto", 1.0)):
            answer = got(web, f"sets/test/queries/{q}", recipe="trak", search=search)
            assert answer["recall"] == recall
            for side in ("proponents", "opponents"):
                assert indices(answer[side]) == indices(exact[side])
                np.testing.assert_allclose(scores(answer[side]), scores(exact[side]), rtol=1e-4)
    assert "Approximate" in web.get("/?query=1&recipe=trak").text
    assert "Exact;" in web.get("/?query=1&recipe=trak&exact=true").text


def test_a_question_is_computed_once(made, monkeypatch):
    explorer = Explorer(made.run)
    web = client(explorer)
    scans = itertools.count()
    scan = explorer._scan
    monkeypatch.setattr(explorer, "_scan", lambda question: (next(scans), scan(question))[1])
    for address in ("queries/1", "queries/1?k=3", "groups?query=1", "queries/1?label=2"):
        assert web.get(f"/api/sets/test/{address}").status_code == 200
    assert next(scans) == 1


def test_what_a_run_cannot_answer_is_listed_with_what_to_do(web):
    recipes = {recipe["name"]: recipe for recipe in got(web, "recipes")}
    assert set(recipes) == {"auto", *RECIPES}
    for name, needs in (("influence_gn", "add_curvature"), ("less", "metric")):
        assert not recipes[name]["available"]
        assert needs in str(recipes[name]["obstacle"])
        answer = web.get(f"/api/sets/test/queries/0?recipe={name}")
        assert answer.status_code == 422
        assert answer.json()["what"] == recipes[name]["obstacle"]["what"]
    assert recipes["influence"]["available"]


def test_errors_have_their_parts_and_a_status(web):
    for address, status, part in (
        ("sets/none/queries/0", 404, "wanted"),
        ("sets/test/queries/9", 404, "wanted"),
        ("sets/test/queries/0?recipe=influense", 422, "do"),
        ("sets/test/queries/0?damping=-1", 422, "where"),
        ("sets/test/queries/0?damping=nan", 422, "where"),
        ("sets/test/queries/0?recipe=grad_dot&damping=1", 422, "do"),
        ("sets/test/queries/0?k=0", 422, "wanted"),
        ("nothing", 404, "what"),
    ):
        answer = web.get(f"/api/{address}")
        assert answer.status_code == status, address
        assert answer.json()[part]
        assert "Traceback" not in answer.text


def test_an_unexpected_error_tells_a_stranger_nothing(made, monkeypatch):
    explorer = Explorer(made.run)
    web = TestClient(
        create_app(explorer), base_url="http://localhost", raise_server_exceptions=False
    )
    monkeypatch.setattr(explorer, "answer", lambda *given: 1 / 0)
    answer = web.get("/api/sets/test/queries/0")
    assert answer.status_code == 500
    assert answer.json()["kind"] == "unexpected"
    assert "division" not in answer.text
    assert "<h2>" in web.get("/").text


# ---- pages


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_whole_without_javascript(web, page):
    answer = web.get(page)
    assert answer.status_code == 200
    read = Page(answer.text)
    assert read.tags()["h1"] == 1
    ids = read.attributes("id")
    assert len(ids) == len(set(ids))
    unlabelled = [a for tag, a in read.elements if tag == "img" and not a.get("alt")]
    assert not unlabelled
    assert read.tags()["main"] == 1


def test_the_first_view_shows_the_answer(web, made):
    text = Page(web.get("/?query=2&recipe=grad_dot&k=3").text).text
    for index in np.argsort(-made.grad_dot[2])[:3]:
        assert f"train-{index}" in text


def test_a_recipe_that_cannot_answer_leaves_the_controls(web):
    answer = web.get("/?recipe=less")
    assert answer.status_code == 422
    assert "metric" in answer.text
    assert 'name="recipe"' in answer.text
    assert "picker-list" in answer.text


def test_every_kind_of_link_of_every_page_leads_somewhere(web):
    seen: dict[str, str] = {}
    for page in PAGES:
        for href in Page(web.get(page).text).attributes("href"):
            if href.startswith("/"):
                seen[re.sub(r"\d+", "0", href.partition("#")[0])] = href
    assert len(seen) > 20
    for href in seen.values():
        assert web.get(href).status_code == 200, href


@pytest.mark.parametrize("shows", ["text", "image", "id"])
def test_hostile_strings_are_shown_as_text_and_never_become_markup(tmp_path, shows):
    made = make_run(tmp_path / "run", shows=shows, hostile=True, num_train=20)
    web = client(Explorer(made.run))
    for index, note in enumerate(HOSTILE):
        mark = {"index": index, "action": "relabel", "label": HOSTILE[index - 1], "note": note}
        assert web.post("/api/marks", json=mark).status_code == 201
    seen = ""
    for page in (*PAGES, "/?" + "search=%3Cscript%3Ealert(1)%3C/script%3E", "/?set=%3Cscript%3E"):
        answer = web.get(page)
        read = Page(answer.text)
        scripts = [a for tag, a in read.elements if tag == "script"]
        assert scripts == [{"src": "/static/explorer.js", "defer": ""}]
        assert not [name for _, a in read.elements for name in a if name.startswith("on")]
        assert all(src.startswith(("/api/", "/static/")) for src in read.attributes("src"))
        allowed = ("/", "#", "data:,")
        assert all(href.startswith(allowed) for href in read.attributes("href"))
        seen += read.text
    for text in HOSTILE[:4]:
        assert text in seen
    assert "49" not in Page(web.get("/?query=4").text).text.split("{{ 7")[0][-5:]
    answer = got(web, "sets/test/queries/0", k=20)
    assert any("<script>" in scored["example"]["id"] for scored in answer["proponents"])


# ---- a run that changes


def test_a_missing_chunk_is_a_clear_page_and_heals(tmp_path):
    made = make_run(tmp_path / "run")
    chunk = next((made.run.path / "train" / "rows").rglob("c/1/2/0"))
    hidden = chunk.rename(tmp_path / "away")
    web = client(Explorer(made.run))
    answer = web.get("/api/sets/test/queries/0?recipe=grad_dot")
    assert answer.status_code == 503
    assert "tda index" in answer.json()["do"]
    page = web.get("/")
    assert page.status_code == 503
    assert "not computed yet" in Page(page.text).text
    assert web.get("/run").status_code == 200
    hidden.rename(chunk)
    assert web.get("/").status_code == 200


def test_a_damaged_manifest_is_a_clear_page(tmp_path):
    made = make_run(tmp_path / "run")
    web = client(Explorer(made.run))
    manifest = made.run.path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"made", b"fake"))
    for address in ("/", "/api/run"):
        answer = web.get(address)
        assert answer.status_code == 503
        assert "altered" in answer.text


def test_a_run_without_query_sets_says_so(tmp_path):
    made = make_run(tmp_path / "run")
    (made.run.path / "queries").rename(tmp_path / "away")
    web = client(Explorer(made.run))
    assert web.get("/").status_code == 404
    assert "no query set" in web.get("/").text
    assert web.get("/self-influence").status_code == 200


def test_auto_is_the_recipe_that_the_run_chooses_and_not_the_plain_one_of_its_name(made: Made):
    """By the margin of the query, where plain influence goes by its loss."""
    explorer = Explorer(made.run, QuerySection(recipe="auto"))
    web = client(explorer)
    chosen = made.run.recipe("auto")
    assert chosen != made.run.recipe(chosen.name)
    found = got(web, "sets/test/queries/1", k=3)
    assert found["explained"] == chosen.explain()
    scores = np.asarray(made.run.scores("test", "auto"))[1]
    assert [each["score"] for each in found["proponents"]] == pytest.approx(
        np.sort(scores)[::-1][:3].tolist(), rel=1e-5
    )
    assert '<option value="auto" selected>' in web.get("/?query=1").text
    assert got(web, "run")["default_recipe"] == "auto"


def test_dampings_out_of_reach_are_refused_not_answered_with_nonsense(made):
    with pytest.raises(RecipeError):
        Explorer(made.run).recipe("influence", -1.0)


def test_nothing_is_served_but_the_run(web, made: Made):
    (made.run.path.parent / "secret").write_text("classified")
    outside = Path(asking.__file__).name
    for name in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd", outside):
        assert web.get(f"/static/{name}").status_code == 404
    for name in ("..", "../../secret", "..%2f..%2fsecret", "%2e%2e%2fsecret"):
        answer = web.get(f"/api/sets/{name}/queries/0")
        assert answer.status_code == 404
        assert "classified" not in answer.text
