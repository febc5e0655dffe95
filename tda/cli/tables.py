"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from tda.recipe import Recipe
    from tda.store import Fault
    from tda.upkeep import Difference

_PIPED_WIDTH = 160  # a pipe has no width of its own; 80 columns would cut the ids


def show(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    console.print(table)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of plain strings: whatever the data holds is shown as it is, never as markup.

    A column whose name ends in a blank is a column of numbers, set to the right.
    """
    made = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        right = column.endswith(" ")
        made.add_column(column.strip(), justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def faults(path: object, found: Sequence[Fault]) -> Table:
    return table(
        f"{path}: {len(found)} fault{'s' if len(found) > 1 else ''}",
        ("kind", "where", "what", "do"),
        [(fault.kind, str(fault.path), fault.what, fault.do) for fault in found],
    )


def differences(path: object, found: Sequence[Difference]) -> Table:
    return table(
        f"{path}: {len(found)} numbers are not what the model gives",
        ("example", "checkpoint ", "where", "error ", "allowed "),
        [(d.id, str(d.checkpoint), d.where, f"{d.error:.2g}", f"{d.allowed:.2g}") for d in found],
    )


def recipes(known: Iterable[Recipe]) -> Table:
    return table(
        "recipes: a score is a sum of inner products of stored rows; positive helps the query",
        ("name", "what it asks", "score", "reference"),
        [(r.name, r.summary, r.formula, r.reference) for r in known],
    )
