"""Long work shows how far it is, on the terminal's error stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tick = Callable[[int], None]


@contextmanager
def progress_bar(
    description: str, total: int, show: bool, unit: str = "examples"
) -> Iterator[Tick]:
    """A bar on the terminal's error stream that counts examples."""
    if not show or total == 0:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        job = progress.add_task(description, total=total)
        yield lambda count: progress.advance(job, count)
