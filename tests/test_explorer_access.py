"""Who is let in, and what a browser may do with what it is given."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from explorer_run import Made, make_run
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from tda.cli import app as tda_app
from tda.cli import serving
from tda.errors import ConfigError
from tda.explorer import Access, Explorer, create_app, serve
from tda.explorer.access import HEADERS, MAX_BODY, Guard, is_loopback


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("made") / "run", num_train=20)


@pytest.fixture(scope="module")
def web(made: Made) -> TestClient:
    return TestClient(create_app(Explorer(made.run)), base_url="http://localhost")


async def anything(scope: Any, receive: Any, send: Any) -> None:
    """An app that answers every request."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"the run"})


def guarded(access: Access | None = None, host: str = "localhost") -> TestClient:
    return TestClient(Guard(anything, access or Access()), base_url=f"http://{host}")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8765", 200),
        ("127.0.0.1:8765", 200),
        ("[::1]:8765", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("evil.example:8765", 403),
        ("192.168.1.5", 403),
        ("user@localhost", 403),
        ("localhost/evil", 403),
        ("localhost:port", 403),
        ("", 403),
    ],
)
def test_a_request_sent_to_another_name_is_refused(host, status):
    answer = guarded().get("/api/run", headers={"host": host})
    assert answer.status_code == status


def test_more_names_can_be_given():
    access = Access(names=("tda.example",))
    web = guarded(access, "tda.example")
    assert web.get("/api/run").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "tda.example"])
def test_a_host_others_can_reach_needs_a_token(host):
    with pytest.raises(ConfigError, match="token"):
        Access(host)
    with pytest.raises(ConfigError):
        Access.at(host, "")
    made_up = Access.at(host)
    assert made_up.token is not None
    assert len(made_up.token) >= 32
    assert made_up.token != Access.at(host).token
    assert made_up.token in made_up.url(80)


def test_loopback_is_what_only_this_machine_reaches():
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "::1"):
        assert is_loopback(host)
        assert Access.at(host).token is None
    for host in ("0.0.0.0", "", "10.0.0.1", "localhost.example"):
        assert not is_loopback(host)


def test_with_a_token_nothing_is_answered_without_it():
    web = guarded(Access.at("0.0.0.0", "right"), "10.0.0.1")
    for address in ("/", "/api/run", "/static/explorer.js", "/api/openapi.json", "/nothing"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": "tda_token=wrong"}):
            answer = web.get(address, headers=headers)
            assert answer.status_code == 401
            assert "right" not in answer.text
    assert web.post("/api/marks", json={"index": 1, "action": "keep"}).status_code == 401
    assert web.get("/?token=wrong").status_code == 401
    assert web.get("/api/run", headers={"authorization": "Bearer right"}).status_code == 200


def test_the_token_moves_from_the_address_to_a_cookie():
    web = guarded(Access.at("0.0.0.0", "a/b c"), "10.0.0.1")
    answer = web.get("/groups?query=1&token=a%2Fb+c", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/groups?query=1"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert web.get("/groups?query=1").status_code == 200  # the cookie is enough
    away = web.get("//evil.example/?token=a%2Fb+c", follow_redirects=False)
    assert not away.headers.get("location", "").startswith("//")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1234"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_another_sites_page_changes_nothing(web, headers):
    for address in ("/api/marks", "/marks", "/api/queries"):
        answer = web.post(address, content='{"index": 1, "action": "keep"}', headers=headers)
        assert answer.status_code == 403
    assert web.get("/api/marks").json() == []


def test_our_own_page_may(web):
    headers = {"origin": "http://localhost", "sec-fetch-site": "same-origin"}
    given = {"index": 1, "action": "none"}
    assert web.post("/api/marks", json=given, headers=headers).status_code == 201


def test_a_body_too_large_is_refused_unread():
    headers = {"content-length": str(MAX_BODY + 1)}
    answer = guarded().post("/api/queries", content=b"", headers=headers)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "address", ["/", "/api/run", "/static/explorer.css", "/nothing", "/api/train/999", "/?k=0"]
)
def test_every_answer_carries_the_headers(web, address):
    headers = web.get(address).headers
    for name, value in HEADERS.items():
        assert headers[name] == value
    policy = headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "default-src 'none'" in policy
    assert "access-control-allow-origin" not in headers


def test_refusals_carry_them_too():
    headers = guarded().get("/", headers={"host": "evil.example"}).headers
    assert headers["x-content-type-options"] == "nosniff"


def test_the_schema_needs_no_page_from_elsewhere(web):
    assert web.get("/api/openapi.json").json()["openapi"].startswith("3.")
    for address in ("/docs", "/redoc"):
        assert web.get(address).status_code == 404


# ---- the server and the command


@pytest.fixture
def not_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`serve` without serving: the ports it would have listened at."""
    ports: list[int] = []

    def run(self: object, sockets: list[socket.socket]) -> None:
        ports.extend(listener.getsockname()[1] for listener in sockets)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    return ports


def test_the_address_is_told_before_serving(made, not_run):
    said: list[str] = []
    serve(Explorer(made.run), Access(), 0, said.append)
    assert said == [f"http://127.0.0.1:{not_run[0]}/"]


def test_a_port_in_use_is_an_error_with_what_to_do(made):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="--port"):
            serve(Explorer(made.run), Access(), port)


def test_the_command_serves_a_folder(made, not_run):
    done = CliRunner().invoke(tda_app, ["serve", str(made.run.path), "--port", "0"])
    assert done.exit_code == 0, done.output
    assert done.output == f"http://127.0.0.1:{not_run[0]}/\n"


def test_the_command_makes_a_token_for_others(made, not_run):
    words = ["serve", str(made.run.path), "--port", "0", "--host", "0.0.0.0"]
    assert "?token=" in CliRunner().invoke(tda_app, words).output
    refused = CliRunner().invoke(tda_app, [*words, "--token", ""])
    assert refused.exit_code == 1
    assert "token" in refused.output


def test_without_the_extra_the_command_names_it(made, monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    done = CliRunner().invoke(tda_app, ["serve", str(made.run.path)])
    assert done.exit_code == 1
    assert "pip install 'tda-engine[serve]'" in done.output


def test_the_rest_of_the_package_does_not_import_the_extra():
    import subprocess

    code = "import sys, tda.cli; print([m for m in ('fastapi', 'uvicorn') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "[]", done.stderr
