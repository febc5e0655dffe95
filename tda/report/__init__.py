"""One self-contained page about a finished run: what helped, what hurt, what looks wrong.

    collect(run) -> ReportData -> render(data) -> str        write_report(run) -> Path

``collect`` reads the store, ``render`` knows nothing of it; ``summarise`` gives the same numbers
as JSON.

findings → decisions → actions      what looks wrong, and what to do about it
trust, removal → counterfactual     whether to believe it; what removal would do, and did
artifacts, difference, gates        the files beside the page, what changed, and gates for CI
"""

from __future__ import annotations

from tda.report.data import ReportData
from tda.report.gather import collect
from tda.report.page import render, write_report
from tda.report.summary import summarise

__all__ = ["ReportData", "collect", "render", "summarise", "write_report"]
