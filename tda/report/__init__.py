"""One self-contained page about a finished run: what helped, what hurt, what looks wrong.

    collect(run) -> ReportData -> render(data) -> str        write_report(run) -> Path

``collect`` reads the store, ``render`` knows nothing of it; ``summarise`` gives the same numbers
as JSON.
"""

from __future__ import annotations

from tda.report.data import ReportData
from tda.report.gather import collect
from tda.report.page import render, write_report
from tda.report.summary import summarise

__all__ = ["ReportData", "collect", "render", "summarise", "write_report"]
