"""Charts as inline SVG that takes its colours from the page, so dark mode needs no second one.

Matplotlib draws with placeholder colours; each is then replaced by the CSS variable it stands
for. No date, no metadata, ids hashed with a fixed salt: the same data gives the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tda.report.numbers import superscript, unit

if TYPE_CHECKING:
    from tda.report.removal import Curve, Measured

COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--help)",
    "#040404": "var(--hurt)",
    "#050505": "var(--line)",
    "#060606": "var(--neutral)",
}
INK, MUTED, HELP, HURT, LINE, NEUTRAL = COLOURS
NUM_BINS = 49  # odd, so that one bin is centred on zero
_MARGINS = 0.68, 0.24, 0.46, 0.08  # left, right, bottom, top in inches; the longest label fits
_STYLE = {
    "svg.hashsalt": "tda-report",
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def value_bins(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(edges [bin + 1], counts [bin]) of a histogram symmetric about zero.

    It spans the 99.5th percentile of |value|; the outermost bins hold everything beyond.
    """
    reach = float(np.quantile(np.abs(mean), 0.995)) if mean.size else 0.0
    reach = reach or float(np.abs(mean).max(initial=0.0)) or 1.0
    edges = np.linspace(-reach, reach, NUM_BINS + 1)
    counts, _ = np.histogram(np.clip(mean, -reach, reach), edges)
    return edges, counts


def histogram(mean: np.ndarray, exponent: int) -> str:
    """How the values [train] are spread; counts on a logarithmic axis."""
    edges, counts = value_bins(mean)
    edges = edges / 10.0**exponent
    middle = (edges[:-1] + edges[1:]) / 2
    zero = NUM_BINS // 2
    colours = [HURT] * zero + [NEUTRAL] + [HELP] * zero
    with _figure("histogram", (5.4, 2.5)) as (figure, axes):
        axes.bar(middle, np.log1p(counts), width=0.86 * (edges[1] - edges[0]), color=colours)
        ticks = [0] + [10**e for e in range(1 + int(np.log10(max(1, counts.max()))))]
        axes.set_yticks(np.log1p(ticks), [_short_count(tick) for tick in ticks])
        axes.set_ylim(0, 1.06 * np.log1p(max(1, counts.max())))
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(7, symmetric=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_signed))
        axes.set_xlabel(f"value ({unit(exponent)})" if exponent else "value")
        axes.set_ylabel("training examples")
        axes.text(0.01, 0.97, "hurt", color=HURT, transform=axes.transAxes, va="top")
        axes.text(0.99, 0.97, "help", color=HELP, transform=axes.transAxes, va="top", ha="right")
        return _svg(figure, "histogram")


def concentration(mean: np.ndarray) -> str:
    """Share of Σ|value| carried by the strongest x % of the examples (a Lorenz curve)."""
    size = np.sort(np.abs(mean.astype(np.float64)))[::-1]
    share = np.concatenate([[0.0], np.cumsum(size)]) / max(size.sum(), np.finfo(float).tiny)
    points = np.unique(np.round(np.linspace(0, 1, 160) ** 2 * size.size).astype(int))
    x, y = 100 * points / max(1, size.size), 100 * share[points]
    with _figure("concentration", (5.4, 2.5)) as (figure, axes):
        axes.plot([0, 100], [0, 100], color=LINE, linewidth=0.8)
        axes.fill_between(x, y, x, color=HELP, alpha=0.12, linewidth=0)
        axes.plot(x, y, color=HELP, linewidth=1.6)
        axes.text(52, 47, "if all weighed the same", color=MUTED, rotation=0, va="top", fontsize=8)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 102)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.set_xlabel("strongest training examples")
        axes.set_ylabel("share of influence")
        return _svg(figure, "concentration")


def suspicion(self_influence: np.ndarray, loss: np.ndarray, num_marked: int) -> str:
    """Self-influence against loss, both logarithmic, binned; the suspects marked singly."""
    usable = np.isfinite(self_influence) & np.isfinite(loss)
    x, y = _log(loss, usable), _log(self_influence, usable)
    order = np.argsort(-np.where(usable, self_influence, -np.inf), kind="stable")
    marked = order[: min(num_marked, int(usable.sum()))]
    rest = np.setdiff1d(np.flatnonzero(usable), marked)
    with _figure("suspicion", (5.4, 3.6)) as (figure, axes):
        if rest.size:
            counts, ex, ey = np.histogram2d(x[rest], y[rest], bins=(44, 30))
            i, j = np.nonzero(counts)
            area = 5 + 22 * np.log1p(counts[i, j]) / np.log1p(counts.max())
            centre_x, centre_y = (ex[:-1] + ex[1:]) / 2, (ey[:-1] + ey[1:]) / 2
            axes.scatter(centre_x[i], centre_y[j], s=area, color=NEUTRAL, alpha=0.55, linewidths=0)
        axes.scatter(x[marked], y[marked], s=18, color=HURT, linewidths=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
            axis.set_major_formatter(FuncFormatter(_power))
        axes.set_xlabel("loss")
        axes.set_ylabel("self-influence")
        return _svg(figure, "suspicion")


def removal(
    curves: Sequence[Curve], measured: Sequence[Measured], num_train: int, exponent: int
) -> str:
    """Predicted change of the mean loss as examples are left out, and the retrained points."""
    scale = 10.0**-exponent
    colours = (HELP, HURT, NEUTRAL)
    with _figure("removal", (5.4, 3.4)) as (figure, axes):
        axes.axhline(0, color=LINE, linewidth=0.8)
        for curve, colour in zip(curves, colours, strict=False):
            x = [100 * fraction for fraction in curve.fractions]
            y = [scale * value for value in curve.predicted]
            axes.plot(x, y, color=colour, linewidth=1.6)
            axes.text(x[-1], y[-1], curve.name + " ", color=colour, ha="right", va="bottom")
        for each in measured:
            share = 100 * (each.count + each.relabelled) / num_train
            change, reach = scale * each.change, (each.change - each.low, each.high - each.change)
            names = [each.name.startswith(curve.name.removesuffix(" first")) for curve in curves]
            axes.errorbar(
                share,
                change,
                [[scale * reach[0]], [scale * reach[1]]],
                color=colours[names.index(True)] if any(names) else INK,
                fmt="o",
                markersize=4,
                linewidth=1,
            )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(_signed))
        axes.set_xlabel("training examples left out")
        axes.set_ylabel(f"change of loss ({unit(exponent)})" if exponent else "change of loss")
        return _svg(figure, "removal")


def _log(values: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """log10, with everything under the half-percent quantile of the positive drawn at it."""
    positive = values[usable & (values > 0)]
    floor = float(np.quantile(positive, 0.005)) if positive.size else 1.0
    return np.log10(np.maximum(np.where(usable, values, floor).astype(np.float64), floor))


def _signed(value: float, _position: int) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:+.4g}".replace("-", "\u2212")


def _short_count(count: int) -> str:
    for size, unit_name in ((1_000_000, "M"), (1_000, "k")):
        if count >= size:
            return f"{count // size}{unit_name}"
    return str(count)


def _power(value: float, _position: int) -> str:
    small = {-3: "0.001", -2: "0.01", -1: "0.1", 0: "1", 1: "10", 2: "100", 3: "1,000"}
    return small.get(round(value), "10" + superscript(round(value)))


@contextmanager
def _figure(name: str, size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        width, height = size
        left, right, bottom, top = _MARGINS
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
        axes = figure.add_subplot()
        axes.set_gid(name)
        yield figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element without anything that is not drawing."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.S)  # page.css has it
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg)
    # matplotlib numbers its elements anew in each figure; one page holds several
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"font: (\d+)px[^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family:[^;\"]*;?\s*", "", svg)
    for placeholder, variable in COLOURS.items():
        svg = svg.replace(placeholder, variable)
    return svg.strip()
