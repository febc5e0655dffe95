"""A real S3 server on this machine (moto's), in a process of its own that can be killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAVERYSECRETKEYID0",
    "AWS_SECRET_ACCESS_KEY": "wJalrVERYSECRETsecretsecret",
    "AWS_SESSION_TOKEN": "tokenVERYSECRETtoken",
}
# moto as a program, with faults: after a request of /fault/COUNT/STATUS the next COUNT are answered
# with that status.
_SERVER = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

app = DomainDispatcherApplication(create_backend_app)
left, status = 0, 0


def faulty(environ, start):
    global left, status
    path = environ["PATH_INFO"]
    if path.startswith("/fault/"):
        left, status = map(int, path.split("/")[2:])
    elif left:
        left -= 1
        start(f"{status} Slow Down", [("Content-Length", "0")])
        return [b""]
    else:
        return app(environ, start)
    start("204 No Content", [])
    return [b""]


make_server("127.0.0.1", int(sys.argv[1]), faulty, threaded=True).serve_forever()
"""


@dataclass
class Server:
    """Started at once; `kill` is kill -9: what it held in memory is gone with it."""

    port: int = 0
    process: subprocess.Popen | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        where = {"AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
        return {**SECRETS, **where}

    def start(self) -> None:
        command = [sys.executable, "-c", _SERVER, str(self.port)]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdout=quiet, stderr=quiet, env={**os.environ, **self.environment}
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.05)
        self.make_bucket("bucket")

    def answer(self, status: int, count: int) -> None:
        """The next requests so."""
        urllib.request.urlopen(f"{self.url}/fault/{count}/{status}", timeout=10).close()

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/s3/x")
        with urllib.request.urlopen(request, timeout=10):
            pass

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class Wire:
    """A wire to a server that can be cut, after so many connections or at once, and mended."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._sockets: set[socket.socket] = set()
        self._left: float = float("inf")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, after: int = 0) -> None:
        """After so many more bytes' packets from the client."""
        self._left = after
        if not after:
            self._drop()

    def mend(self) -> None:
        self._left = float("inf")

    def close(self) -> None:
        self._listener.close()
        self._drop()

    def _drop(self) -> None:
        for each in list(self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._left <= 0:
                    near.close()
                    continue
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with near, socket.socket() as far, suppress(OSError):
            far.connect(("127.0.0.1", self._server.port))
            self._sockets |= {near, far}
            back = threading.Thread(target=self._pump, args=(far, near, False), daemon=True)
            back.start()
            self._pump(near, far, True)
            back.join()
            self._sockets -= {near, far}

    def _pump(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if counts:
                    self._left -= 1
                    if self._left < 0:
                        self._drop()
                        break
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
