"""``tda serve``: from a run to a page in the browser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tda.errors import ConfigError

if TYPE_CHECKING:
    from tda.cli.workload import Opened

NEEDED = ("fastapi", "uvicorn")


def serve(
    opened: Opened,
    host: str,
    port: int,
    token: str | None,
    names: Sequence[str],
    say: Callable[[str], Any],
) -> None:
    """Serve a run until interrupted; ``say`` is told its address.

    Raises ConfigError where the extra is not installed, or the address is not to be had.
    """
    require_extra()
    from tda.explorer import Access, Explorer
    from tda.explorer import serve as run_server

    access = Access.at(host, token, tuple(names))
    config = opened.config
    make_example = None if config is None else config.build_example()
    run_server(Explorer(opened.run, opened.defaults, make_example), access, port, say)


def require_extra() -> None:
    """Raises ConfigError unless the packages of the extra ``serve`` are there."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "`tda serve` needs packages that are not installed",
            found=f"no {' and no '.join(missing)}",
            wanted="the extra `serve`",
            do="pip install 'tda-engine[serve]'",
        )
