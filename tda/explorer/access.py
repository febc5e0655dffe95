"""Who may ask: this machine alone, or whoever has the token; and what a browser may do with it.

A page of another site, open in the same browser, can reach a server on this machine. It can read no
answer (they carry no CORS header), but it could send a form, or give its own name this machine's
address (DNS rebinding). So the name a request was sent to must be one of ours, and nothing is
changed for a request that another site's page made.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from tda.errors import ConfigError

COOKIE = "tda_token"
MAX_BODY = 12 * 2**20  # bytes; an uploaded picture is the largest thing anybody sends
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Where the server listens, and what it asks of a request.

    host: an address of this machine; any but loopback needs a ``token``. names: more names this
    server is reached by (behind a proxy, say). Raises ConfigError for a host without its token.
    """

    host: str = "127.0.0.1"
    token: str | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.token:
            raise ConfigError(
                "anyone on the network could read this run and mark its examples",
                where="--host",
                found=f"{self.host} without a token",
                wanted="127.0.0.1, or a token",
                do="give --token TEXT, or leave it out: then a random one is made",
            )

    @staticmethod
    def at(host: str, token: str | None = None, names: tuple[str, ...] = ()) -> Access:
        """With a random token where the host needs one and none is given."""
        needed = token is None and not is_loopback(host)
        return Access(host, secrets.token_urlsafe(24) if needed else token, names)

    def url(self, port: int) -> str:
        """What to open in a browser."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::", "") else self.host
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{port}/" + (f"?token={quote(self.token)}" if self.token else "")

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server. DNS rebinding needs a name; not an address."""
        name = _host_name(host)
        if name is None:
            return False
        if name in _LOOPBACK or name in (n.lower() for n in self.names):
            return True
        if is_loopback(self.host):
            return False
        return name in (self.host.lower(), socket.gethostname().lower()) or _is_address(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen at."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """The app, asked only by those who may; every answer carries the security headers."""

    def __init__(self, app: Any, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        pairs = ((k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"])
        headers = dict(pairs)
        refused = self._refusal(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
        elif self._brings_token(scope):
            await self._keep_token(scope, send)
        else:
            await self.app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, dict[str, str]] | None:
        """(status, error) of a request that may not be answered."""
        if not self.access.knows(headers.get("host", "")):
            return 403, {
                "what": "this server has another name",
                "where": "Host",
                "do": "open the address that `tda serve` printed, or add --name NAME to it",
            }
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            if _is_foreign(headers):
                return 403, {
                    "what": "another site's page may not change anything here",
                    "where": "Origin",
                }
            length = headers.get("content-length", "")
            if not length.isascii() or not length.isdigit() or int(length) > MAX_BODY:
                return 413, {
                    "what": "the body is too large, or does not say how large it is",
                    "where": "Content-Length",
                    "wanted": f"at most {MAX_BODY} bytes",
                }
        if self.access.token and not self._has_token(scope, headers):
            return 401, {
                "what": "this server wants its token",
                "where": "Authorization",
                "do": "open the whole address that `tda serve` printed, or send the header "
                "Authorization: Bearer TOKEN",
            }
        return None

    def _has_token(self, scope: Scope, headers: dict[str, str]) -> bool:
        given = [headers.get("authorization", "").removeprefix("Bearer "), _cookie(headers)]
        return any(map(self._is_token, given)) or self._brings_token(scope)

    def _is_token(self, given: str) -> bool:
        assert self.access.token is not None
        return hmac.compare_digest(given.encode(), self.access.token.encode())

    def _brings_token(self, scope: Scope) -> bool:
        """Whether a page is opened with the token in its address."""
        if not self.access.token or scope["method"] != "GET":
            return False
        return any(map(self._is_token, (v for k, v in _query(scope) if k == "token")))

    async def _keep_token(self, scope: Scope, send: Send) -> None:
        """Move the token from the address, which gets copied about, to a cookie."""
        rest = urlencode([(key, value) for key, value in _query(scope) if key != "token"])
        path = quote("/" + scope["path"].lstrip("/\\"))
        location = path + (f"?{rest}" if rest else "")
        cookie = f"{COOKIE}={quote(self.access.token or '')}; HttpOnly; SameSite=Strict; Path=/"
        extra = [(b"location", location.encode()), (b"set-cookie", cookie.encode())]
        await _answer(send, 303, {"what": "see the address without the token"}, extra)


def _query(scope: Scope) -> list[tuple[str, str]]:
    return parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)


def _cookie(headers: dict[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else parse_qsl(f"t={found.value}")[0][1] if found.value else ""


def _is_foreign(headers: dict[str, str]) -> bool:
    """Whether a browser says that another site's page makes this request."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    return _netloc(origin) != headers.get("host", "").lower()


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host}")
        if parts.path or parts.query or parts.fragment or parts.username is not None:
            return None
        _ = parts.port  # raises where it is no number
        return parts.hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            given = list(message.get("headers", []))
            known = {key.lower() for key, _ in given}
            own = {**HEADERS, "cache-control": "no-store"}
            given += [(k.encode(), v.encode()) for k, v in own.items() if k.encode() not in known]
            message = {**message, "headers": given}
        await send(message)

    return sent


async def _answer(
    send: Send, status: int, error: dict[str, str], extra: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps({"kind": "access", **error}).encode()
    sent = _with_headers(send)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    start = {"type": "http.response.start", "status": status, "headers": headers + (extra or [])}
    await sent(start)
    await sent({"type": "http.response.body", "body": body})
