"""What the leaderboard says: pages of Markdown and one plot, made of finished cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]  # a cell's result, with "lds": {protocol: {value, low, high}}
PROTOCOLS = ("half", "removal")
HEAD = (
    "method", "by", "checkpoints", "rows kept", "damping", "LDS, halves", "LDS, removal", "seconds",
    "peak memory", "bytes an example",
)  # fmt: skip


def page(tasks: Mapping[str, Mapping[str, Any]], missing: Iterable[str] = ()) -> str:
    """LEADERBOARD.md. tasks: name → {"about", "ceilings", "rows"}; missing: those not run."""
    parts = ["# Leaderboard", INTRODUCTION, _not_run(missing), summary(tasks), ratios(tasks)]
    parts.append(ahead(tasks))
    for name, task in tasks.items():
        shown = [row for row in task["rows"] if row["cell"]["part"] == "table"]
        parts += [f"## {name}", task["about"], table(shown)]
        parts += [grid([row for row in task["rows"] if row["cell"]["part"] != "curve"])]
    curves = [row for task in tasks.values() for row in task["rows"]]
    if any(row["cell"]["part"] == "curve" for row in curves):
        parts += ["## LDS against bytes", "![LDS against bytes an example](LEADERBOARD.png)"]
    return "\n\n".join(part for part in parts if part) + "\n"


INTRODUCTION = """
Written by `python jobs/leaderboard.py`. Every method was given the same checkpoints and is judged
by the same retrainings. LDS: linear datamodeling score, mean over queries, 95 % interval over
queries and subsets. *Halves*: random halves, averaged over seeds; *removal*: a few per cent left
out of the very run that is attributed. The ceiling is the LDS of retraining itself.

Seconds are from checkpoints to scores (indexing + answering) on one core of machines that did
other work too: orders of magnitude, no benchmark (fashion_mlp, fashion_cnn and all rows of 14,336
numbers in int4 on a busy Zen 4, the other rows of .2 noise on a Zen 2, our rows of rotten_tomatoes
and the other rows of found noise on an Intel Xeon with AMX, the others on a Zen 5, some of the
peers' with two to a core). Rows of two machines
stand together where what both computed came out alike. A recipe finds in the store's cache what a
row before it decomposed. Peak memory is that of the process. A row "not done in 3 minutes" ran
into the limit of that call (`--limit`), and is tried again by one with a longer limit.

Damping is automatic unless a number stands there: the training schedule implies it, and EK-FAC
takes a tenth of the mean eigenvalue (the heuristic of Grosse et al. 2023, which kronfluence has by
layer). It was not tuned on these retrainings beyond that choice, made on digits_mlp, penbased and
fashion_mlp; the share ½ of `influence_shrunk`, and so of `auto` in an eigenbasis, was chosen among
.4, .5, .6 and .8 with diamonds and fashion_cnn beside them. *query = margin*: the query's gradient
is that of its margin and not of its loss, which weighs several checkpoints better; with one model
it changes nothing. EK-FAC counts matrices alone (`parameters="matrices"`, chosen on digits_mlp,
penbased, shakespeare and fashion_ddpm): so it is level with kronfluence's joint block of a weight
and its bias. What is left between the two on shakespeare is damping: it asks for less than others.
A row marked *earlier* is of a recipe that has changed since.

Of the best LDS by halves on a grid of dampings (one model, factors of about 3) the automatic one
has, with `influence_shrunk`, 98–100 % on six tasks and 93 % on shakespeare; with `influence_gn` in
1,024 numbers 96–100 %, but 88 % on fashion_mlp; with EK-FAC 98–99 % on digits_mlp, penbased,
diamonds and fashion_mlp, 93 % on shakespeare (.338 of .365, flat below a thirtieth of the mean
eigenvalue) and 88 % on fashion_ddpm (.344 of .392, at three tenths). No rule was found that has
both: what Adam's steps imply is right for the second and wrong by a hundred for the first.

*copies*: `tda.smoothed`, scores averaged over copies of a trained model with noise on its weights:
.2 of the median |weight|, or what `tda.find_noise` found on the queries, from .2 to .5 (it sees no
retraining; its one number, and the .2, were chosen on digits_mlp, penbased, fashion_mlp and
diamonds, the ends on fashion_ddpm and fashion_cnn). They are one model's, and take as many times
the work. Other methods would gain by it too; the peers were run as
they are.

*layers = learned*: with `run.learn_layer_weights`, whose two numbers were chosen on digits_mlp and
rotten_tomatoes: the other tasks judge it. *metric = adam*: gradients in the metric of Adam's steps.
*measured = output*: gradients of the output that D-TRAK puts in the place of the loss.

traker's `trak` is at its default of 2,048 numbers an example, undamped: with fewer training
examples than that, or not many more, its kernel is singular or nearly so, and its figure is poor
for this reason. `k=512` is the fairer row where there is one. The TRAK of a language model takes
p = e^−ℓ (dattri's examples); a loss that is no −log p has none. dattri's EK-FAC asks for layers
without positions; its TracIn projects to 512 numbers, captum's to none (on BERT-tiny that one ran
out of 11 GB).

The summary has the best of our rows with automatic damping, and the best of all rows of the peers;
ours are more, so the largest of them is a little flattered.
""".strip()


def _not_run(missing: Iterable[str]) -> str:
    names = ", ".join(missing)
    if not names:
        return ""
    return (
        f"Not run yet: {names}. `python jobs/leaderboard.py` takes what is missing up overnight, "
        "and `--all` adds every other recipe, exact unrolling and each damping of a grid."
    )


def table(rows: Iterable[Row]) -> str:
    """Best first, by halves; what failed comes last and says why."""
    ordered = sorted(rows, key=lambda row: -_value(row, "half"))
    return markdown([HEAD, *(_cells(row) for row in ordered)])


def _cells(row: Row) -> tuple[str, ...]:
    cell = row["cell"]
    rows = f"{cell['projection'].replace('_', ' ')} {cell['dim']:,}" if cell["projection"] else "–"
    rows += f", {cell['dtype']}" if cell.get("dtype", "bfloat16") != "bfloat16" else ""
    by = cell.get("peer") or "tda"
    about = (
        _method(row),
        by,
        _kept(cell, row.get("noise")),
        rows,
        row.get("damping", cell["damping"]),
    )
    if "why_not" in row:
        return (*about, "–", "–", row["why_not"], "", "")
    measured = tuple(_estimate(row["lds"].get(protocol)) for protocol in PROTOCOLS)
    size = row.get("bytes_per_example")
    return (
        *about,
        *measured,
        _seconds(row),
        f"{row['peak_bytes'] / 2**20:,.0f} MB",
        "none kept" if not size else f"{size:,}",
    )


def _method(row: Row) -> str:
    """Its name, and what the cell set in the recipe or the recipe "auto" chose."""
    cell = row["cell"]
    own = {
        "query": "own",
        "blocks": "own",
        "layers": "own",
        "metric": "euclidean",
        "measured": "loss",
    }
    given = [f"{k} = {cell[k]}" for k, value in own.items() if cell.get(k, value) != value]
    if cell["method"] == "auto" and "chosen" in row:
        given.append(row["chosen"])
    given += ["earlier"] if row.get("earlier") else []
    return cell["method"] + (f" ({', '.join(given)})" if given else "")


def label(cell: Mapping[str, Any]) -> str:
    """A cell in a few words."""
    by = f"{cell['peer']} " if cell["peer"] else ""
    rows = f", {cell['projection'].replace('_', ' ')}" if cell["projection"] else ""
    return f"{by}{_method({'cell': cell})} ({_kept(cell)}{rows})"


def _kept(cell: Mapping[str, Any], noise: float | None = None) -> str:
    words = {
        "last": "1",
        "path": f"{cell['number']} of one run",
        "models": f"{cell['number']} runs",
    }
    asked = cell.get("num_queries")
    return (
        words[cell["checkpoints"]] + _copies(cell, noise) + (f", {asked} queries" if asked else "")
    )


def _copies(cell: Mapping[str, Any], noise: float | None) -> str:
    if cell.get("copies", 1) == 1:
        return ""
    known = f"{noise:g} found" if noise else "found"
    told = known if cell.get("noise") == "found" else cell.get("noise", "0.2")
    return f", {cell['copies']} copies, noise {told}"


def _seconds(row: Row) -> str:
    index = row.get("index_seconds")
    answer = f"{row['seconds']:,.1f}"
    return answer if index is None else f"{index:,.1f} + {answer}"


def _estimate(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "–"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _value(row: Row, protocol: str) -> float:
    found = row.get("lds", {}).get(protocol)
    return -2.0 if found is None else float(found["value"])


def best(rows: Iterable[Row], protocol: str, ours: bool, several: bool) -> Row | None:
    """The highest LDS of our recipes as they are, or of the peers', on one model or on several."""
    chosen = [
        row
        for row in rows
        if protocol in row.get("lds", {})
        and row["cell"]["part"] == "table"
        and row["cell"]["kind"] == ("recipe" if ours else "peer")
        and (row["cell"]["number"] > 1) == several
        and (not ours or row["cell"]["damping"] == "auto")
    ]
    return max(chosen, key=lambda row: _value(row, protocol), default=None)


def _contests(
    tasks: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, str, list[tuple[Row | None, Row | None]]]]:
    """(task, protocol, [(our best, the peers' best)] of one model and of several)."""
    for name, task in tasks.items():
        for protocol in PROTOCOLS:
            if protocol in task["ceilings"]:
                found = [
                    (
                        best(task["rows"], protocol, True, several),
                        best(task["rows"], protocol, False, several),
                    )
                    for several in (False, True)
                ]
                yield name, protocol, found


def summary(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a task and protocol: the best of ours and of the peers, with one model and more."""
    head = ("task", "protocol", "ceiling", "one model", "best peer")
    lines: list[tuple[str, ...]] = [(*head, "several checkpoints", "best peer")]
    for name, protocol, found in _contests(tasks):
        ceiling = tasks[name]["ceilings"][protocol]
        cells = [_short(row, protocol) for pair in found for row in pair]
        shown = "–" if ceiling is None else f"{ceiling:.3f}"
        lines.append((name, protocol, shown, *cells))
    return markdown(lines)


def ratios(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Our best with one model over the best peer's, at whatever damping and at its defaults."""
    head = ("task", "protocol", "one model", "over the best peer", "over the best peer's defaults")
    lines: list[tuple[str, ...]] = [(*head, "without copies", "over the best peer")]
    for name, protocol, ((ours, theirs), _) in _contests(tasks):
        if ours is None or theirs is None:
            continue
        plain = best(
            [row for row in tasks[name]["rows"] if "default" in row["cell"]["damping"]],
            protocol, ours=False, several=False,
        )  # fmt: skip
        shares = [_ratio(ours, of, protocol) for of in (theirs, plain)]
        single = [row for row in tasks[name]["rows"] if row["cell"].get("copies", 1) == 1]
        alone = best(single, protocol, ours=True, several=False)
        shares += [_short(alone, protocol), _share(alone, theirs, protocol)]
        lines.append((name, protocol, f"{_value(ours, protocol):.3f}", *shares))
    if len(lines) == 1:
        return ""
    return "What one model's best automatic row is of the peers':\n\n" + markdown(lines)


def _ratio(ours: Row, theirs: Row | None, protocol: str) -> str:
    share = _share(ours, theirs, protocol)
    return share if share == "–" else f"{share} × {_short(theirs, protocol)}"


def _share(ours: Row | None, theirs: Row | None, protocol: str) -> str:
    if ours is None or theirs is None or _value(theirs, protocol) <= 0:
        return "–"
    return f"{_value(ours, protocol) / _value(theirs, protocol):.2f}"


def readme(tasks: Mapping[str, Mapping[str, Any]], missing: Iterable[str] = ()) -> str:
    """The README's block: the summary, and what it lacks."""
    names = ", ".join(missing)
    if not names:
        return summary(tasks)
    return (
        f"{summary(tasks)}\n\nBest of our rows with automatic damping, best of the peers' that "
        f"finished: jobs/LEADERBOARD.md has all rows, and what did not. Not run yet: {names}."
    )


def _short(row: Row | None, protocol: str) -> str:
    if row is None:
        return "–"
    cell = row["cell"]
    by = f"{cell['peer']} " if cell.get("peer") else ""
    kept = _kept(cell, row.get("noise"))
    of = "" if kept == "1" else f", {kept.removeprefix('1, ')}"
    return f"{_value(row, protocol):.3f} {by}{_method(row)}{of}"


def ahead(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Where the best peer beats our best, or is within its interval."""
    lines = []
    for name, protocol, found in _contests(tasks):
        for (ours, theirs), on in zip(found, ("one model", "several checkpoints"), strict=True):
            if ours is None or theirs is None:
                continue
            high = theirs["lds"][protocol]["high"]
            if _value(theirs, protocol) > _value(ours, protocol):
                lines.append(f"- {name}, {protocol}, {on}: {_short(theirs, protocol)} is ahead of "
                             f"{_short(ours, protocol)}")  # fmt: skip
            elif high > _value(ours, protocol):
                lines.append(f"- {name}, {protocol}, {on}: {_short(theirs, protocol)} is not "
                             f"certainly behind {_short(ours, protocol)}")  # fmt: skip
    if not lines:
        return (
            "No peer is ahead on a task, a protocol and a number of checkpoints." if tasks else ""
        )
    return "Where a peer is ahead, or may be:\n\n" + "\n".join(lines)


def grid(rows: list[Row]) -> str:
    """For each recipe: the best LDS of all dampings, and the automatic one's share of it."""
    lines: list[tuple[str, ...]] = []
    for method in sorted({row["cell"]["method"] for row in rows if row["cell"]["part"] == "grid"}):
        tried = [row for row in rows if row["cell"]["method"] == method and "lds" in row]
        path = [row for row in tried if row["cell"]["part"] == "grid"]
        automatic = [
            row
            for row in tried
            if row["cell"]["part"] == "table" and row["cell"]["checkpoints"] == "last"
        ]
        for protocol in PROTOCOLS:
            known = [row for row in path if protocol in row["lds"]]
            if not known or not automatic or protocol not in automatic[0]["lds"]:
                continue
            top = max(known, key=lambda row: _value(row, protocol))
            found, highest = _value(automatic[0], protocol), _value(top, protocol)
            share = f"{found / highest:.0%}" if highest > 0 else "–"
            at = f"{highest:.3f} at {top['cell']['damping']}"
            lines.append((method, protocol, f"{found:.3f}", at, share))
    if not lines:
        return ""
    head = ("recipe", "protocol", "automatic damping", "best of a grid", "share")
    return "Damping, relative to the mean eigenvalue:\n\n" + markdown([head, *lines])


def markdown(lines: Iterable[tuple[str, ...]]) -> str:
    rows = ["| " + " | ".join(cell.replace("|", "¦") for cell in line) + " |" for line in lines]
    columns = rows[0].count("|") - 1
    return "\n".join([rows[0], "|---" * columns + "|", *rows[1:]])


def plot(tasks: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """LDS on halves against bytes an example, one panel a task, one line a projection."""
    from matplotlib.figure import Figure

    shown = {name: curves(task["rows"]) for name, task in tasks.items()}
    shown = {name: lines for name, lines in shown.items() if lines}
    if not shown:
        return
    labels = sorted({label for lines in shown.values() for label in lines})
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure = Figure(figsize=(4 * across, 3.2 * down + 0.9), layout="constrained")
    for panel, (name, lines) in enumerate(shown.items()):
        axes = figure.add_subplot(down, across, panel + 1)
        for label, points in sorted(lines.items()):
            color = f"C{labels.index(label)}"
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
        whole = [row for row in tasks[name]["rows"] if _is_whole(row)]
        for row in whole:
            axes.axhline(_value(row, "half"), color="black", ls="--", label=UNPROJECTED)
        axes.set(title=name, xlabel="bytes an example", ylabel="LDS, halves")
        axes.set_xscale("log", base=2)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150, metadata={"Software": None})


UNPROJECTED = "influence_ekfac, not projected"


def curves(rows: Iterable[Row]) -> dict[str, list[tuple[float, float]]]:
    """label → [(bytes an example, LDS on halves)] of what is drawn."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        cell = row["cell"]
        if cell["part"] == "curve" and "half" in row.get("lds", {}):
            dtype = "" if cell["dtype"] == "bfloat16" else f", {cell['dtype']}"
            label = f"{cell['method']}, {cell['projection'].replace('_', ' ')}{dtype}"
            lines.setdefault(label, []).append((row["bytes_per_example"], _value(row, "half")))
    return {label: sorted(points) for label, points in lines.items()}


def _is_whole(row: Row) -> bool:
    """Of EK-FAC on one model, nothing projected, as the engine has it."""
    cell = row["cell"]
    known = {"kind": "recipe", "method": "influence_ekfac", "projection": None, "damping": "auto"}
    one = {
        "checkpoints": "last",
        "number": 1,
        "copies": 1,
        "part": "table",
        "query": "own",
        "blocks": "own",
    }
    return all(cell[key] == value for key, value in (known | one).items()) and "lds" in row


def between_markers(text: str, name: str, content: str) -> str:
    """``text`` with what stands between a name's two markers replaced; itself without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        return text
    return f"{head}{begin}\n{content}\n{end}{tail}"
