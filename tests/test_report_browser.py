"""The report in a real browser: with and without its script, by mouse, by keys, in the dark."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contrast import CONTRAST
from explorer_run import HOSTILE, make_run

from tda.report import write_report

pytestmark = pytest.mark.browser
KINDS = ("image", "text", "row")
Report = Callable[[str], Path]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The page of a run whose examples are pictures, texts, rows of numbers, or hostile texts."""
    made: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in made:
            name = "'><img src=x onerror=alert(1)><script>" if kind == "hostile" else "run"
            folder = tmp_path_factory.mktemp(kind) / name
            shows = "text" if kind == "hostile" else kind
            number = 14 if kind == "text" else 60  # so few that answers hold what a query is like
            run = make_run(
                folder, shows=shows, hostile=kind == "hostile", num_queries=12, num_train=number
            ).run
            made[kind] = write_report(run, with_knn=False)
        return made[kind]

    return write


def suspects(page: Any) -> Any:
    """The table of suspects: the longest of the page."""
    return page.locator("#suspects table.sortable")


def column(table: Any, name: str) -> tuple[Any, list[float | None]]:
    """(head, numbers of the rows shown) of the column with this name."""
    heads = table.locator("thead th").all_inner_texts()
    place = next(i for i, text in enumerate(heads) if name in text)
    numbers = table.locator("tbody tr:not([hidden])").evaluate_all(
        f"rows => rows.map(row => row.cells[{place}].querySelector('data[value]'))"
        ".map(data => data === null ? null : Number(data.value))"
    )
    return table.locator("thead th").nth(place), numbers


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_a_table_sorts_both_ways(page, report, by):
    page.goto(report("image").as_uri())
    table = suspects(page)
    head, numbers = column(table, "loss")
    assert len(numbers) >= 8
    assert numbers != sorted(numbers)  # by self-influence at first
    for order, wanted in (("descending", sorted(numbers)[::-1]), ("ascending", sorted(numbers))):
        button = head.locator("button")
        if by == "mouse":
            button.click()
        else:
            button.focus()
            button.press("Enter")
        assert head.get_attribute("aria-sort") == order
        assert column(table, "loss")[1] == wanted


def test_a_table_filters_to_the_rows_with_some_words(page, report):
    page.goto(report("text").as_uri())
    table = suspects(page)
    rows = table.locator("tbody tr").all_inner_texts()
    field = page.locator("#suspects").get_by_label("Filter")
    field.fill("BETA")
    shown = table.locator("tbody tr:not([hidden])").all_inner_texts()
    assert 0 < len(shown) < len(rows)
    assert shown == [text for text in rows if "beta" in text]
    assert page.locator("#suspects p.tools output").inner_text() == f"{len(shown)} of {len(rows)}"
    field.fill("")
    assert table.locator("tbody tr:not([hidden])").all_inner_texts() == rows


def test_queries_are_found_and_ordered_by_keyboard_alone(page, report):
    page.goto(report("text").as_uri())
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "find"
    page.keyboard.type("test-7")
    (shown,) = page.locator(".query:not([hidden])").all()
    assert shown.get_attribute("data-id") == "test-7"
    assert page.inner_text("#found") == "1 of 12"
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "order"
    page.keyboard.press("End")  # the last choice: id
    ids = page.locator(".query").evaluate_all("all => all.map(one => one.dataset.id)")
    assert ids == [f"test-{i}" for i in range(12)]
    page.select_option("#order", "loss")
    losses = page.locator(".query").evaluate_all("all => all.map(one => Number(one.dataset.loss))")
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_script_nothing_is_missing(browser, report, kind):
    said = []
    for script in (True, False):
        context = browser.new_context(java_script_enabled=script)
        page = context.new_page()
        page.goto(report(kind).as_uri())
        page.locator("footer").wait_for()
        sections = page.locator("main > section")
        # What the script adds: fields to search and filter by, and nothing else.
        text = re.sub(r"Filter\s*|Find\s*.*\n?|Order\s*.*\n?", "", sections.first.inner_text())
        said.append((sections.count(), text.split(), page.locator("table tbody tr").count()))
        assert page.locator("form.tools").is_visible() is script
        assert all(section.is_visible() for section in sections.all())
        context.close()
    assert said[0] == said[1]


def test_pictures_texts_and_rows_are_shown_as_what_they_are(page, report):
    page.goto(report("image").as_uri())
    images = page.locator("img")
    assert images.count() > 50
    images.evaluate_all("all => Promise.all(all.map(one => (one.loading = 'eager', one.decode())))")
    assert set(images.evaluate_all("all => all.map(one => one.naturalWidth)")) == {6}

    page.goto(report("row").as_uri())
    row = page.locator(".query .lines code.row").first
    assert row.is_visible()
    assert len(re.findall(r"\d\.\d+|\d", row.inner_text())) >= 5
    assert page.locator("img").count() == 0


def test_words_that_an_answer_shares_with_its_query_are_marked(page, report):
    """The texts are "a text about train-7": all but the number is common to all."""
    page.goto(report("text").as_uri())
    marked = 0
    for query in page.locator(".query").all():
        number = query.get_attribute("data-id").partition("-")[2]
        texts = query.locator(".answers .text").all_inner_texts()
        shared = [text for text in texts if text.endswith(f"-{number}")]
        assert query.locator(".answers mark").all_inner_texts() == [number] * len(shared)
        marked += len(shared)
    assert marked > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_stands_out_from_its_ground(browser, report, kind, scheme):
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(report(kind).as_uri())
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark is (scheme == "dark")
    assert page.evaluate(CONTRAST) == []
    context.close()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_sticks_out_at_400_pixels(browser, report, kind):
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = context.new_page()
    page.goto(report(kind).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    context.close()


def test_hostile_data_runs_nothing_and_asks_for_nothing(page, report):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    page.add_init_script("window.ran = 0; window.alert = () => { window.ran += 1; };")
    page.goto(report("hostile").as_uri())
    assert page.evaluate("[window.ran, document.scripts.length]") == [0, 1]
    assert HOSTILE[0] in page.inner_text("#queries")
    page.locator("#suspects").get_by_label("Filter").fill(HOSTILE[1])
    page.fill("#find", HOSTILE[0])
    for head in page.locator("th button").all():
        head.click()
    assert page.evaluate("[window.ran, document.scripts.length]") == [0, 1]
    assert asked[0] == "file"
    assert set(asked) <= {"file", "data"}
