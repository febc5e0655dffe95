"""The report's page: whatever the data says or lacks, it is whole, offline and unbreakable."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_run import FakeRun, FakeTopK, Page, digits_run, fake_find, numbers_of

import tda.report.page as page_module
from tda.errors import DataError, RecipeError, StoreError
from tda.report import collect, render, summarise, write_report
from tda.report.data import Agreement, ReportData
from tda.scorer import Prepared


@pytest.fixture(scope="module", autouse=True)
def _found() -> Iterator[None]:
    """A run without a model holds no rows to find anything in."""
    patch = pytest.MonkeyPatch()
    patch.setattr("tda.report.gather.find", fake_find)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    return digits_run(tmp_path_factory.mktemp("digits_run"))


@pytest.fixture(scope="module")
def html(run: FakeRun) -> str:
    return render(collect(run))


# ---- what is shown

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style><!--",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe",
    "\u05e9\u05dc\u05d5\u05dd " * 9,
    "a\x00b\x1bc",
    "x" * 5000,
    "]]>&lt;&amp;",
)


def drop(run: FakeRun, *columns: str) -> None:
    for table in run.store.tables.values():
        for column in columns:
            del table.held[column]


def make_hostile(run: FakeRun, *columns: str) -> FakeRun:
    for table in run.store.tables.values():
        for shift, column in enumerate(columns):
            found = [HOSTILE[(i + shift) % len(HOSTILE)] for i in range(table.num_rows)]
            table.held[column] = np.array([f"{text}#{i}" for i, text in enumerate(found)])
    manifest = json.loads(json.dumps(run.store.manifest))
    manifest["checkpoints"][0]["name"] = HOSTILE[0]
    manifest["model"]["class"] = HOSTILE[1]
    manifest["versions"][HOSTILE[0]] = HOSTILE[2]
    store = replace(run.store, manifest=manifest)
    store.tables[f"queries/{HOSTILE[0]}"] = store.tables["queries/test"]
    return replace(run, store=store, queries=[HOSTILE[0]])


@pytest.mark.parametrize("columns", [("id", "source", "group"), ("text", "group", "source", "id")])
def test_hostile_strings_are_shown_as_text_and_never_become_markup(tmp_path, columns):
    run = digits_run(tmp_path)
    if "text" in columns:
        drop(run, "image")
    run = make_hostile(run, *columns)
    agreement = Agreement("influence", HOSTILE[0], HOSTILE[1], 0.5)
    data = collect(run, max_queries=12, label_names=HOSTILE, agreements=[agreement])
    page = Page(render(data))
    assert page.tags()["script"] == 1
    assert page.tags()["style"] == 1
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]
    assert all(src.startswith("data:image/png;base64,") for src in page.attributes("src"))
    for text in (*HOSTILE[:3], HOSTILE[9]):
        assert text in page.text
    assert HOSTILE[4] in page.text  # no template ran
    assert "\x00" not in page.text
    assert max(map(len, page.attributes("title", "alt", "data-id"))) < 500


def test_the_page_asks_for_nothing_from_outside(html):
    page = Page(html)
    for reference in page.attributes("src", "href"):
        assert reference.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert "link" not in page.tags()


def test_the_security_policy_admits_the_one_script_by_its_hash(html):
    script = re.search(r"<script>(.*?)</script>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = Page(html).attributes("content")[0]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_same_run_same_bytes(run, html):
    assert render(collect(run)).encode() == html.encode()


def test_element_ids_are_unique_and_links_lead_to_them(html):
    page = Page(html)
    ids = Counter(page.attributes("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    assert {href[1:] for href in page.attributes("href")} <= set(ids)


def test_without_javascript_everything_is_there_but_the_tools(run, html):
    page = Page(re.sub(r"<script>.*?</script>", "", html, flags=re.S))
    assert page.tags()["article"] == 24
    assert [a for tag, a in page.elements if "hidden" in a] == [
        a for tag, a in page.elements if tag == "form"
    ]
    top = run.top_k("test", 6, "influence")
    shown = [query.example.index for query in collect(run).queries]
    for index in top.proponents.ids[shown].ravel():
        assert index in page.text


def test_every_number_of_the_page_is_in_the_summary(run, html):
    known = numbers_of(json.loads(json.dumps(summarise(collect(run)))))
    values = [
        float(value) for tag, a in Page(html).elements if tag == "data" for value in a.values()
    ]
    assert len(values) > 800
    assert [value for value in values if value not in known] == []


def test_a_page_of_noise_from_ten_thousand_examples_stays_under_ten_megabytes(tmp_path):
    run = digits_run(tmp_path)
    generator = np.random.default_rng(0)
    tile = 50
    for name, table in run.store.tables.items():
        count = table.num_rows * (tile if name == "train" else 1)
        held = {
            key: np.concatenate([column] * (count // len(column)))
            for key, column in table.held.items()
            if key not in ("loss", "p", "id")
        }
        for key in ("loss", "p"):
            held[key] = np.concatenate([table.held[key]] * (count // table.num_rows), axis=1)
        held["id"] = np.array([f"{name}-{i}" for i in range(count)])
        picture = generator.integers(0, 256, (96, 96, 3), np.uint8)  # as PNG, noise is the worst
        held["image"] = np.broadcast_to(picture, (count, 96, 96, 3))
        table.held = held
    run.matrix, run.cosine = np.tile(run.matrix, tile), np.tile(run.cosine, tile)
    run.itself = np.tile(run.itself, tile)
    data = collect(run)
    assert data.num_train == 10_000
    assert len(render(data).encode()) < 10e6


@pytest.mark.parametrize(
    "without",
    [
        ("image",),
        ("label",),
        ("source",),
        ("loss", "p"),
        ("digest",),
        ("image", "label", "source", "loss", "p", "digest"),
    ],
)
def test_a_run_lacking_columns_still_gets_a_whole_page(tmp_path, without):
    run = digits_run(tmp_path)
    drop(run, *without)
    data = collect(run, max_queries=4)
    page = Page(render(data))
    assert page.tags()["article"] == 4
    assert (page.tags()["img"] == 0) == ("image" in without)
    assert ("By label" in page.text) == ("label" not in without)
    assert summarise(data)["headline"] in page.text


def test_texts_and_rows_of_numbers_are_shown_where_there_are_no_pictures(tmp_path):
    run = digits_run(tmp_path)
    for table in run.store.tables.values():
        del table.held["image"]
        table.held["row"] = np.linspace(-1, 1, table.num_rows * 3).reshape(-1, 3).astype("f4")
    rows = collect(run, max_queries=4)
    assert rows.shows == "row"
    assert '<code class="row">' in render(rows)
    for table in run.store.tables.values():
        table.held["text"] = np.array([f"a film, number {i}" for i in range(table.num_rows)])
    texts = collect(run, max_queries=4)
    assert texts.shows == "text"
    page = Page(render(texts))
    for query in texts.queries:
        assert query.example.text in page.text
        assert query.proponents[0].example.text in page.text


def test_targets_of_a_regression_are_not_taken_for_classes(tmp_path):
    run = digits_run(tmp_path)
    for table in run.store.tables.values():
        table.held["label"] = (table.held["label"] + 0.25).astype("f4")
        table.held["p"] = np.full_like(table.held["p"], np.nan)
    data = collect(run)
    assert data.class_matrix is None
    assert "label" not in [rollup.column for rollup in data.rollups]
    text = Page(render(data)).text
    assert "share its label" not in text
    assert "p(label)" not in text
    assert data.queries[0].example.label.endswith(".25")


# ---- what is missing, and what goes wrong


def test_what_cannot_be_compared_is_said_not_hidden(tmp_path):
    run = digits_run(tmp_path)
    whole = run.prepare

    def prepare(name: str, recipe: Any) -> Prepared:
        if recipe == "trak":
            raise RecipeError("the measurement has no margin")
        return whole(name, recipe)

    def no_embedding(name: str, k: int, only: Any) -> FakeTopK:
        raise StoreError("the run holds no embeddings")

    run.prepare, run.baseline_top_k = prepare, no_embedding
    data = collect(run)
    text = Page(render(data)).text
    assert "the measurement has no margin" in text
    assert "the run holds no embeddings" in text
    assert "Nearest" not in text
    assert [a.right for a in data.agreements] == ["grad_cos", "KNN-Shapley", "loss"]


def test_a_query_set_that_is_not_stored_is_an_error_that_lists_those_that_are(run):
    with pytest.raises(DataError, match=r"found: +test"):
        collect(run, "tset")
    with pytest.raises(DataError, match="none"):
        collect(replace(run, queries=[]))


def test_a_report_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    run = digits_run(tmp_path)
    page = write_report(run, max_queries=4)
    assert page == tmp_path / "report.html"
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(files) == sorted(["report.html", *page_module.FILES])
    assert json.loads(files["summary.json"])["num_shown"] == 4

    def broken(data: ReportData) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr(page_module, "render", broken)
    with pytest.raises(RuntimeError, match="no page"):
        write_report(run, max_queries=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_file(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"summary\.json"):
        write_report(run, tmp_path / "file" / "report.html", max_queries=1)


# ---- legible to everyone


def _theme(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", css))


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_text_has_the_contrast_that_wcag_asks_for_in_both_themes():
    css = (Path(page_module.__file__).parent / "page.css").read_text()
    light, rest = css.split("@media (prefers-color-scheme: dark)", 1)
    for theme in (_theme(light), _theme(rest.split("* {", 1)[0])):
        pairs = [("ink", "muted", "help", "hurt"), ("paper", "raised")]
        both = [(a, b) for a in pairs[0] for b in pairs[1]]
        tints = [(a, f"{b}-tint") for b in ("help", "hurt") for a in ("ink", "muted", b)]
        for text, ground in both + tints:
            a, b = sorted((_luminance(theme[text]), _luminance(theme[ground])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (text, ground)
