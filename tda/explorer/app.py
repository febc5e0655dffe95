"""The application, and the server that runs it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from tda import __version__
from tda.decisions import Marks
from tda.errors import ConfigError
from tda.explorer import api
from tda.explorer.access import Access, Guard
from tda.explorer.asking import Explorer
from tda.explorer.faults import answer_faults
from tda.explorer.pages import Pages
from tda.explorer.pages import router as page_router


def create_app(explorer: Explorer, access: Access | None = None) -> FastAPI:
    """The explorer of a run as an ASGI application, for those whom ``access`` lets in.

    Every table's pictures, texts and numbers are served, and nothing else of the file system.
    """
    app = FastAPI(
        title=f"tda explorer: {explorer.path.resolve().name}",
        version=__version__,
        openapi_url="/api/openapi.json",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
    )
    marks = Marks(explorer.path)
    pages = Pages(explorer, marks)
    app.include_router(api.router(explorer, marks))
    app.include_router(page_router(explorer, marks, pages))
    answer_faults(app, pages.fault)
    app.add_middleware(Guard, access=access or Access())
    return app


def serve(
    explorer: Explorer,
    access: Access,
    port: int = 8765,
    ready: Callable[[str], Any] | None = None,
) -> None:
    """Serve until interrupted. ``ready`` is called with the address to open; port 0: any free one.

    Raises ConfigError where the address cannot be listened at.
    """
    listener = _listen(access.host, port)
    config = uvicorn.Config(
        create_app(explorer, access),
        log_level="warning",
        access_log=False,  # an address may hold the token
        server_header=False,
        proxy_headers=False,
    )
    if ready is not None:
        ready(access.url(listener.getsockname()[1]))
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            "this address cannot be listened at",
            where=f"{host}:{port}",
            found=error.strerror or error,
            do="choose another --port (0 for any that is free)",
        ) from error
    listener.listen(128)
    return listener
