"""Long work shows how far it is, on the error stream: a bar on a terminal, elsewhere a line now and
then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Tick = Callable[[int], None]
Lines = Callable[[int], list[str]]  # under the bar, at most so many

EVERY = 30.0  # seconds between two reports where there is no terminal
_FEWEST, _MOST = 4, 64  # lines under the bar


@contextmanager
def progress_bar(
    description: str,
    total: int,
    show: bool,
    unit: str = "examples",
    lines: Lines | None = None,
) -> Iterator[Tick]:
    """A bar that counts examples, with ``lines`` under it."""
    if not show or total == 0:
        yield lambda count: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    with (_drawn if console.is_terminal else _written)(
        description, total, unit, lines, console
    ) as tick:
        yield tick


@contextmanager
def _drawn(
    description: str, total: int, unit: str, lines: Lines | None, console: Any
) -> Iterator[Tick]:
    from rich.console import Group
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console)

    def picture() -> Group:
        room = min(max(console.height - 4, _FEWEST), _MOST)
        below = lines(room) if lines is not None else []
        texts = [Text("  " + line, style="dim", no_wrap=True) for line in below]
        return Group(progress, *texts)

    with Live(console=console, get_renderable=picture, refresh_per_second=4):
        job = progress.add_task(description, total=total)
        yield lambda count: progress.advance(job, count)


@contextmanager
def _written(
    description: str, total: int, unit: str, lines: Lines | None, console: Any
) -> Iterator[Tick]:
    """For logs: nothing for what is short, and the last line says what was done, if anything."""
    started = told = time.monotonic()
    count = 0

    def tell() -> None:
        rate = count / max(time.monotonic() - started, 1e-9)
        print(f"{description}: {count} of {total} {unit}, {rate:,.1f}/s", file=sys.stderr)
        for line in lines(_MOST) if lines is not None else []:
            print(f"  {line}", file=sys.stderr)
        sys.stderr.flush()

    def tick(more: int) -> None:
        nonlocal count, told
        count += more
        now = time.monotonic()
        if now - told >= EVERY:
            told = now
            tell()

    yield tick
    if count:
        tell()
