"""Errors as HTTP answers: a status, and the parts of the error; never a traceback."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from tda.decisions import ConflictError
from tda.errors import ConfigError, DataError, MismatchError, RecipeError, StoreError, TdaError
from tda.explorer.library import AbsentError
from tda.explorer.schema import Fault
from tda.explorer.uploads import UnavailableError
from tda.report.examples import clean

_STATUS: tuple[tuple[type[TdaError], int], ...] = (
    (AbsentError, 404),
    (ConflictError, 409),
    (UnavailableError, 409),
    (RecipeError, 422),
    (DataError, 422),
    (ConfigError, 422),
    (StoreError, 503),  # a chunk is missing or altered: it can be mended while we run
    (MismatchError, 503),
)
_MAX = 600
log = logging.getLogger(__name__)
Page = Callable[[Request, int, Fault], str]


def fault_of(error: TdaError) -> Fault:
    """An error's parts as text, each of one line and bounded."""
    parts = {name: getattr(error, name) for name in ("where", "found", "wanted", "do")}
    shown = {name: clean(part, _MAX) for name, part in parts.items() if part is not None}
    kind = type(error).__name__.removesuffix("Error").lower()
    return Fault(kind=kind, what=clean(error.what, _MAX), **shown)


def status_of(error: TdaError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 422)


def answer_faults(app: FastAPI, page: Page) -> None:
    """Every error of ``app`` becomes JSON under /api, and a page elsewhere (``page`` makes it)."""

    def answered(request: Request, status: int, fault: Fault) -> Response:
        if request.url.path.startswith("/api"):
            return JSONResponse(fault.model_dump(exclude_none=True), status)
        return HTMLResponse(page(request, status, fault), status)

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, TdaError)
        return answered(request, status_of(error), fault_of(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answered(request, 422, _invalid(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = HTTPStatus(error.status_code).phrase.lower()
        fault = Fault(kind="http", what=what, where=clean(request.url.path, _MAX))
        found = answered(request, error.status_code, fault)
        found.headers.update(error.headers or {})
        return found

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        fault = Fault(
            kind="unexpected",
            what="something went wrong that should not have",
            found=type(error).__name__,
            do="the server's own output says more; please report it",
        )
        return answered(request, 500, fault)

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        TdaError: ours,
        RequestValidationError: invalid,
        HTTPException: http,
        Exception: unexpected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _invalid(errors: Any) -> Fault:
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"]) or "request"
    found = first.get("input")
    return Fault(
        kind="request",
        what="the request is not valid",
        where=clean(place, _MAX),
        found=None if found is None or isinstance(found, dict | list) else clean(found, 80),
        wanted=clean(first["msg"].removeprefix("Value error, "), _MAX),
    )
