"""``report.html``: one offline file, readable without JavaScript, every shown string escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from tda.report import charts, numbers
from tda.report.actions import as_csv
from tda.report.artifacts import parquet, value_columns
from tda.report.data import CLEAR, Query, ReportData, Scored
from tda.report.difference import read_before, with_difference
from tda.report.gather import collect
from tda.report.pictures import Pictures, pixelated
from tda.report.removal import Removal
from tda.report.summary import (
    over_mean_self_influence,
    summarise,
    suspects_with_highest_loss,
)
from tda.report.tokens import Words
from tda.report.trust import RULE
from tda.report.words import headline, limits, reading
from tda.store.files import beside, write_file

_HERE = Path(__file__).parent
FILES = {
    "summary.json": "every number of this page, unrounded, for programs and gates",
    "values.parquet": "every training example: value, interval, p, q, self-influence, flags",
    "top_k.parquet": "every query's strongest training examples, for and against",
    "actions.csv": "what is proposed: remove, relabel or review, and why",
}


def render(data: ReportData) -> str:
    """The page as HTML; the same data gives the same bytes.

    A content security policy forbids everything but the page's own styles, its one script (by
    hash) and inline pictures, so a string that escaped escaping still could not run or phone home.
    """
    assert data.decisions is not None and data.trust is not None and data.removal is not None
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    answers = [s for q in data.queries for s in (*q.proponents, *q.opponents)]
    value_unit = numbers.unit_exponent(s.score for s in (*data.valuable, *data.harmful))
    change_unit = _change_unit(data.removal)
    return (
        environment()
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
            words=Words(_texts(data)),
            score_unit=numbers.unit_exponent(s.score for s in answers),
            value_unit=value_unit,
            self_unit=numbers.unit_exponent(s.score for s in data.suspects),
            matrix_unit=_matrix_unit(data),
            suspects_with_highest_loss=suspects_with_highest_loss(data),
            histogram=Markup(charts.histogram(data.values.mean, value_unit)),
            concentration=Markup(charts.concentration(data.values.mean)),
            suspicion=_suspicion(data),
            decisions=data.decisions,
            trust=data.trust,
            rule=RULE,
            removal=data.removal,
            removal_unit=change_unit,
            removal_chart=Markup(
                charts.removal(
                    data.removal.curves, data.removal.measured, data.num_train, change_unit
                )
            ),
            change=data.difference,
            files=FILES,
        )
    )


@cache
def environment(*folders: Path) -> jinja2.Environment:
    """The templates, and those of ``folders`` before them, compiled once. All are autoescaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _HERE / "templates"]),
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
        "brief": _brief,
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


def write_report(
    run: Any,
    path: str | Path | None = None,
    *,
    against: str | Path | None = None,
    retrain: Callable[[ReportData], ReportData] | None = None,
    **asked: Any,
) -> Path:
    """Write ``report.html`` and, beside it, the files of FILES; returns the page's path.

    path: the page to write (``report.html`` in the run's folder when None); against: the folder of
    another report, to say what changed; retrain: measures what was proposed (see
    `tda.report.counterfactual`); asked: arguments of :func:`collect`. Each file appears whole or
    not at all. Raises what ``collect`` raises, and StoreError where a file cannot be read or
    written.
    """
    page = beside(run.store.path) / "report.html" if path is None else Path(path)
    before = None if against is None else read_before(against)
    data = collect(run, **asked)
    if retrain is not None:
        data = retrain(data)
    if before is not None:
        data = with_difference(data, before, summarise(data))
    contents = {**files_of(data), page.name: render(data).encode("utf-8")}
    for name, content in contents.items():
        write_file(page.with_name(name), content)
    return page


def files_of(data: ReportData) -> dict[str, bytes]:
    """The files beside the page, by name."""
    assert data.ledger is not None and data.decisions is not None
    summary = json.dumps(summarise(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    book, card = data.ledger, data.card
    about = {"run": card.run, "queries": card.query_set, "recipe": card.recipe}
    values = {
        **about,
        "value": f"mean over {data.num_queries} queries; above 0: it helps",
        "intervals": f"95 %; they cover {data.values.covers}",
    }
    columns = value_columns(data.values, data.self_influence, book)
    return {
        "summary.json": summary.encode("utf-8"),
        "values.parquet": parquet(columns, values),
        "top_k.parquet": parquet(
            {n: _strings(of) for n, of in book.answers.items()}, {**about, "reliable": data.signs}
        ),
        "actions.csv": as_csv(data.decisions.actions, data.values, book.columns).encode("utf-8"),
    }


def _strings(column: np.ndarray) -> Any:
    return column.tolist() if column.dtype.kind in "USO" else column


def _change_unit(removal: Removal) -> int:
    changes = [value for curve in removal.curves for value in curve.predicted]
    return numbers.unit_exponent([*changes, *(each.change for each in removal.measured)])


def _number(value: float | None, exponent: int = 0, sign: bool = False) -> Markup:
    return numbers.marked(value, numbers.plain(value, sign=sign, exponent=exponent))


def _brief(value: float | None) -> Markup:
    """A number of any size: a count in full, else three digits and an exponent where need be."""
    if value is None:
        return numbers.marked(None, numbers.NONE)
    whole = isinstance(value, int)
    return numbers.marked(
        value, f"{value:,}" if whole else f"{value:.3g}".replace("-", numbers.MINUS)
    )


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


def _texts(data: ReportData) -> list[str]:
    """Each text of the queries shown and of their answers, once."""
    shown = {id(s.example): s.example for q in data.queries
             for s in (*q.proponents, *q.opponents, *q.nearest)}  # fmt: skip
    examples = [*(query.example for query in data.queries), *shown.values()]
    return [example.text for example in examples if example.text is not None]


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
