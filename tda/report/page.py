"""``report.html``: one offline file, readable without JavaScript, every shown string escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tda.report import charts, numbers
from tda.report.data import CLEAR, Query, ReportData, Scored
from tda.report.gather import collect
from tda.report.pictures import Pictures, pixelated
from tda.report.summary import (
    over_mean_self_influence,
    summarise,
    suspects_with_highest_loss,
)
from tda.report.words import headline, limits, reading
from tda.store.files import write_file

_HERE = Path(__file__).parent


def render(data: ReportData) -> str:
    """The page as HTML; the same data gives the same bytes.

    A content security policy forbids everything but the page's own styles, its one script (by
    hash) and inline pictures, so a string that escaped escaping still could not run or phone home.
    """
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    answers = [s for q in data.queries for s in (*q.proponents, *q.opponents)]
    value_unit = numbers.unit_exponent(s.score for s in (*data.valuable, *data.harmful))
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            data=data,
            card=data.card,
            values=data.values,
            headline=headline(data),
            limits=limits(data),
            clear=CLEAR,
            style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=_sha256(script),
            pictures=Pictures(data),
            score_unit=numbers.unit_exponent(s.score for s in answers),
            value_unit=value_unit,
            self_unit=numbers.unit_exponent(s.score for s in data.suspects),
            matrix_unit=_matrix_unit(data),
            suspects_with_highest_loss=suspects_with_highest_loss(data),
            histogram=Markup(charts.histogram(data.values.mean, value_unit)),
            concentration=Markup(charts.concentration(data.values.mean)),
            suspicion=_suspicion(data),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    """The templates, compiled once. Autoescape is on for all of them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "signed": partial(_number, sign=True),
        "aligned": _aligned,
        "percent": lambda share: numbers.marked(share, numbers.percent(share)),
        "exact": lambda value: numbers.marked(value, f"{value:g}"),
        "count": lambda count: numbers.marked(count, f"{count:,}"),
        "unit": numbers.unit,
        "unit_exponent": numbers.unit_exponent,
        "reading": reading,
        "short_id": _short_id,
        "strongest": _strongest,
        "over_mean": lambda scored, data: over_mean_self_influence(data, scored),
        "pixelated": pixelated,
    }
    return environment


def write_report(run: Any, path: str | Path | None = None, **asked: Any) -> Path:
    """Write ``report.html`` and, beside it, ``summary.json``; returns the page's path.

    path: the page to write (``report.html`` in the run's folder when None); asked: arguments of
    :func:`collect`. Each file appears whole or not at all. Raises what ``collect`` raises, and
    StoreError where the folder cannot be written.
    """
    page = Path(run.store.path) / "report.html" if path is None else Path(path)
    data = collect(run, **asked)
    summary = json.dumps(summarise(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    html = render(data)
    write_file(page.with_name("summary.json"), summary.encode("utf-8"))
    write_file(page, html.encode("utf-8"))
    return page


def _number(value: float | None, exponent: int = 0, sign: bool = False) -> Markup:
    return numbers.marked(value, numbers.plain(value, sign=sign, exponent=exponent))


def _aligned(value: float, exponent: int, beside: float) -> Markup:
    text = numbers.plain(value, sign=True, exponent=exponent, beside=beside)
    return numbers.marked(value, text)


def _short_id(text: str) -> str:
    """Both ends of a long id: the front names the set, the back tells its examples apart."""
    return text if len(text) <= 10 else f"{text[:4]}…{text[-5:]}"


def _strongest(answers: Query | Iterable[Scored]) -> float:
    """The largest |score|, which gets the longest bar."""
    if isinstance(answers, Query):
        answers = (*answers.proponents, *answers.opponents)
    return max((abs(scored.score) for scored in answers), default=0.0) or 1.0


def _matrix_unit(data: ReportData) -> int:
    matrix = data.class_matrix
    return 0 if matrix is None else numbers.unit_exponent(matrix.mean.ravel().tolist())


def _suspicion(data: ReportData) -> Markup | None:
    if data.train_loss is None:
        return None
    svg = charts.suspicion(data.self_influence, data.train_loss, len(data.suspects))
    return Markup(svg)


def _sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")
