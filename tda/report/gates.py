"""Gates for continuous integration: ``KEY OP NUMBER`` over the numbers of ``summary.json``.

    decisions.share_mislabelled > 0.05        trust.num_failed >= 1        queries.0.loss > 3

KEY is a path with dots, a number in it the position in a list; OP one of < <= > >= == !=; true and
false count as 1 and 0. Nothing else is understood, and nothing is ever executed.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tda.errors import ConfigError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_GATE = re.compile(
    r"\s*(?P<key>[^\s<>=!]+)\s*(?P<op><=|>=|==|!=|<|>)\s*"
    r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<percent>%?)\s*"
)
_WHERE = "--fail-if"
_SHOWN = 8


@dataclass(frozen=True)
class Gate:
    """One comparison. Parsed from text by :func:`parse`."""

    text: str
    key: str
    op: str
    number: float

    def fires(self, summary: Mapping[str, Any]) -> bool:
        """Whether the comparison holds. Raises ConfigError where there is no such number."""
        return _OPERATORS[self.op](look_up(summary, self.key), self.number)


def parse(text: str) -> Gate:
    """A gate from ``KEY OP NUMBER``; the number may end in %. Raises ConfigError."""
    match = _GATE.fullmatch(text)
    if match is None:
        raise ConfigError(
            "this gate cannot be read",
            where=_WHERE,
            found=text,
            wanted="KEY OP NUMBER, e.g. 'decisions.share_leaked > 0'; OP is < <= > >= == or !=",
        )
    number = float(match["number"]) / (100 if match["percent"] else 1)
    return Gate(text.strip(), match["key"], match["op"], number)


def fired(gates: Sequence[Gate], summary: Mapping[str, Any]) -> list[tuple[Gate, float]]:
    """The gates that fire, each with the number found. Raises ConfigError for an unknown key."""
    found = [(gate, look_up(summary, gate.key)) for gate in gates]
    return [(gate, value) for gate, value in found if gate.fires(summary)]


def look_up(summary: Mapping[str, Any], key: str) -> float:
    """The number at ``key``. Raises ConfigError where there is none, or it is not known."""
    value: Any = summary
    for part in key.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise _no_such(summary, key)
    if value is None:
        raise ConfigError(
            f"{key} is not known for this run, so that the gate cannot tell",
            where=_WHERE,
            found="null in summary.json",
            do="see the page's trust panel and its limits for what is missing, or drop the gate",
        )
    if not isinstance(value, int | float):
        raise _no_such(summary, key, type(value).__name__)
    return float(value)


def _no_such(summary: Mapping[str, Any], key: str, found: str | None = None) -> ConfigError:
    known = list(_paths(summary))
    close = difflib.get_close_matches(key, known, n=_SHOWN, cutoff=0.5)
    tail = key.rpartition(".")[2]
    close = close or [path for path in known if path.endswith(tail)] or known
    return ConfigError(
        f"summary.json has no number {key!r}",
        where=_WHERE,
        found=found,
        wanted=", ".join(close[:_SHOWN]) + (", …" if len(close) > _SHOWN else ""),
    )


def _paths(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every path to a number that does not go through a list."""
    for name, part in value.items():
        path = f"{prefix}{name}"
        if isinstance(part, Mapping):
            yield from _paths(part, path + ".")
        elif part is None or isinstance(part, int | float):
            yield path
