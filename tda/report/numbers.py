"""Numbers as people read them; the page carries the exact value beside each."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup

MINUS = "\u2212"
NONE = "–"


def unit_exponent(values: Iterable[float]) -> int:
    """A multiple of 3 so that the largest |value| shown is at least 1 and below 1000 × 10^e.

    0 when numbers from .1 to 1000 read well as they are.
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0 or 0.1 <= largest < 1000:
        return 0
    return 3 * math.floor(math.log10(largest) / 3)


def plain(
    value: float | None, *, sign: bool = False, exponent: int = 0, beside: float | None = None
) -> str:
    """Three significant digits, no exponent: ``value / 10^exponent``.

    beside: the largest value of the same table, whose decimals all of them then take.
    """
    if value is None or not math.isfinite(value):
        return NONE
    scaled = value / 10.0**exponent
    size = abs(scaled)
    scale = size if beside is None else abs(beside) / 10.0**exponent
    digits = 0 if scale >= 100 else 1 if scale >= 10 else 2 if scale >= 1 else 3
    text = "0" if size == 0 and beside is None else f"{size:,.{digits}f}"
    if 0 < size < 0.0005 and not sign and scaled > 0 and beside is None:
        return "<0.001"
    if not text.strip("0.,"):
        return text  # a rounded zero has no sign
    if scaled < 0:
        return MINUS + text
    return ("+" if sign else "") + text


def percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return NONE
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def marked(value: float | int | None, text: str) -> Markup:
    """``text`` as a ``<data>`` element whose value is the exact number, as in summary.json."""
    if value is None or not math.isfinite(value):
        return Markup("<span>{}</span>").format(text)
    exact = repr(value) if isinstance(value, int) else repr(float(value))
    return Markup('<data value="{}">{}</data>').format(exact, text)


def superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def unit(exponent: int) -> str:
    """How a heading says that numbers under it are in units of 10^exponent."""
    return f"× 10{superscript(exponent)}" if exponent else ""
