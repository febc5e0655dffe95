"""The API, asked by its own schema: the answer is always a status and JSON, never a crash."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from explorer_run import make_run
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda.explorer import Explorer, create_app
from tda.explorer.state import Asked

ODD = ("", "0", "-1", "1e999", "nan", "NaN", "auto", "null", "test", "train-1", "%00", "..", "<b>")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    run = make_run(tmp_path_factory.mktemp("fuzz") / "run", num_train=12, num_queries=3).run
    web = TestClient(create_app(Explorer(run)), base_url="http://localhost")
    # Hypothesis draws from the constants of what is imported: all of it must be, before it begins.
    for name in ("influence", "trak", "grad_cos", "source", "datainf"):
        assert web.get(f"/compare?recipe={name}").status_code == 200
    assert web.get("/api/sets/test/queries/0?search=approximate").status_code == 200
    return web


@pytest.fixture(scope="module")
def schema(web: TestClient) -> dict[str, Any]:
    return web.get("/api/openapi.json").json()


def resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in part:
        return part
    return schema["components"]["schemas"][part["$ref"].rpartition("/")[2]]


def values(schema: dict[str, Any], part: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a JSON schema: mostly valid ones, so that what lies behind them is reached."""
    part = resolved(schema, part)
    if "anyOf" in part:
        return st.one_of(*(values(schema, each) for each in part["anyOf"]))
    if "enum" in part or "const" in part:
        return st.sampled_from(part.get("enum") or [part["const"]])
    kind = part.get("type")
    if kind == "integer":
        low, high = part.get("minimum", -(2**70)), part.get("maximum", 2**70)
        return st.one_of(st.integers(low, min(high, low + 20)), st.integers(low, high))
    if kind == "number":
        low, high = part.get("minimum", -1e308), part.get("maximum", 1e308)
        return st.one_of(st.sampled_from([0.0, 1e-300, 0.1, 1e300]), st.floats(low, high))
    if kind == "boolean":
        return st.booleans()
    if kind == "array":
        return st.lists(values(schema, part.get("items", {})), max_size=5)
    if kind == "object":
        return objects(schema, part)
    if kind == "null":
        return st.none()
    names = ["test", "influence", "grad_dot", "trak", "source", "alpha", "1", "train-3"]
    return st.one_of(st.sampled_from(names), st.text(max_size=12))


def objects(schema: dict[str, Any], part: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: values(schema, each) for name, each in part.get("properties", {}).items()}
    needed = {name: fields.pop(name) for name in part.get("required", ())}
    return st.fixed_dictionaries(needed, optional=fields)


@st.composite
def requests(
    draw: st.DrawFn, schema: dict[str, Any]
) -> tuple[str, str, dict[str, str], Any, set[str]]:
    """(method, path, query, body, the statuses that are documented)."""
    path = draw(st.sampled_from(sorted(schema["paths"])))
    method = draw(st.sampled_from(sorted(schema["paths"][path])))
    operation = schema["paths"][path][method]
    query: dict[str, str] = {}
    for parameter in operation.get("parameters", ()):
        valid = draw(st.integers(0, 9)) > 0
        drawn = values(schema, parameter["schema"]) if valid else st.sampled_from(ODD)
        if parameter["in"] == "path":
            if valid and parameter["name"] == "name":
                drawn = st.just("test")
            if valid and parameter["name"] == "index":
                drawn = st.integers(0, 3)
            text = quote(str(draw(drawn)), safe="") or "x"
            path = path.replace("{" + parameter["name"] + "}", text)
        elif parameter["required"] or draw(st.booleans()):
            query[parameter["name"]] = str(draw(drawn))
    body = None
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]["application/json"]["schema"]
        body = draw(st.one_of(values(schema, content), st.none(), st.lists(st.integers())))
    return method, path, query, body, set(operation["responses"])


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_whatever_is_asked_there_is_an_answer_and_it_is_documented(web, schema, data):
    method, path, query, body, statuses = data.draw(requests(schema))
    given_body = {} if body is None else {"json": body}
    answer = web.request(method, path, params=query, **given_body)
    assert str(answer.status_code) in statuses, (method, path, query, body, answer.text)
    assert answer.status_code < 500, (method, path, query, body, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()) <= {"kind", "what", "where", "found", "wanted", "do"}
        assert answer.json()["what"]
    elif answer.headers["content-type"] == "application/json":
        json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    page=st.sampled_from(["/", "/groups", "/compare", "/self-influence", "/train/1", "/marks"]),
    fields=st.dictionaries(
        st.sampled_from(sorted(Asked.model_fields)),
        st.one_of(
            st.sampled_from([*ODD, "1", "2", "trak", "grad_dot", "0.1"]), st.text(max_size=8)
        ),
        max_size=4,
    ),
)
def test_whatever_an_address_says_there_is_a_page(web, page, fields):
    answer = web.get(page, params=fields)
    assert answer.status_code < 500, (page, fields, answer.text)
    assert answer.text.rstrip().endswith("</html>")
