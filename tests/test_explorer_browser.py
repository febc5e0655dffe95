"""The explorer in a real browser: what is clicked, what is typed, and that nothing foreign runs."""

from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contrast import CONTRAST
from explorer_run import HOSTILE, Known, Made, make_run
from test_explorer_uploads import CONFIG, JOB

from tda.cli.workload import index_workload, open_workload
from tda.config import load_config
from tda.explorer import Access, Explorer, create_app

pytestmark = pytest.mark.browser

Serve = Callable[..., str]


@pytest.fixture(scope="module")
def served() -> Iterator[Serve]:
    """Serve a run on a free port; the address."""
    import uvicorn

    servers = []

    def start(made: Made, **options: Any) -> str:
        import socket

        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        app = create_app(Explorer(made.run, **options), Access())
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        servers.append((server, thread))
        return f"http://127.0.0.1:{port}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("browser") / "run", shows="image", num_queries=50)


@pytest.fixture(scope="module")
def address(served: Serve, made: Made) -> str:
    return served(made)


def first_ids(page: Any, side: str = "proponents") -> list[str]:
    return page.eval_on_selector_all(
        f'[data-side="{side}"] .id', "all => all.map((one) => one.title)"
    )


def wait_for_address(page: Any, part: str) -> None:
    page.wait_for_function("part => location.search.includes(part)", arg=part)
    page.wait_for_function("() => !document.body.classList.contains('waiting')")


def best(made: Made, scores: np.ndarray, k: int = 10) -> list[str]:
    return [f"train-{i}" for i in np.argsort(-scores)[:k]]


def test_recipe_and_damping_switch_in_place(page, address, made):
    page.goto(f"{address}/?query=3")
    page.evaluate("window.same = true")
    page.select_option("#recipe", "grad_dot")
    wait_for_address(page, "recipe=grad_dot")
    assert first_ids(page) == best(made, made.grad_dot[3])
    assert page.is_disabled("#damping")
    page.select_option("#recipe", "influence")
    wait_for_address(page, "recipe=influence")
    before = page.inner_text(".method")
    slider = page.locator('.damping input[type="range"]')
    slider.focus()
    for _ in range(5):
        slider.press("ArrowRight")
    wait_for_address(page, "damping=0.316")
    assert page.inner_text(".method") != before
    assert page.input_value("#damping") == "0.316"
    assert page.evaluate("document.activeElement.type") == "range"
    page.click("button.auto")
    wait_for_address(page, "damping=auto")
    assert page.evaluate("window.same")  # the page was never loaded anew


def test_the_keyboard_alone_is_enough(page, address, made):
    page.goto(f"{address}/?recipe=grad_dot")
    order = np.argsort(made.queries.p[-1])
    for index in order[1:3]:
        page.keyboard.press("j")
        wait_for_address(page, f"query={index}")
    page.keyboard.press("k")
    wait_for_address(page, f"query={order[1]}")
    assert first_ids(page) == best(made, made.grad_dot[order[1]])
    page.keyboard.press("2")
    assert (
        page.evaluate("document.activeElement.closest('li').querySelector('.id').title")
        == (best(made, made.grad_dot[order[1]])[1])
    )
    page.keyboard.press("Shift+Digit1")
    opponent = best(made, -made.grad_dot[order[1]])[0]
    assert page.inner_text("li:focus-within .id") == opponent
    page.keyboard.press("m")
    page.wait_for_selector("#marking[open]")
    page.keyboard.press("ArrowDown")  # from relabel to remove
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("by keyboard")
    page.keyboard.press("Enter")
    page.wait_for_selector("li:focus-within .badge.remove")
    (line,) = (made.run.path / "actions" / "marks.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == opponent
    assert json.loads(line)["note"] == "by keyboard"
    page.keyboard.press("Enter")  # opens the example
    page.wait_for_url("**/train/**")
    assert "by keyboard" in page.inner_text("#mark")


def test_slash_searches_and_help_opens_and_closes(page, address):
    page.goto(address)
    page.keyboard.press("/")
    page.keyboard.type("test-1")
    page.wait_for_function("() => document.querySelectorAll('#picker-list li').length === 12")
    assert page.evaluate("document.activeElement.id") == "search"
    assert page.input_value("#search") == "test-1"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#help[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#help:not([open])", state="attached")


def test_from_a_group_to_its_examples_to_a_decision_to_the_exported_list(page, served, tmp_path):
    """The way of whoever looks after the data, by mouse, from the first page to the file."""
    made = make_run(tmp_path / "run")
    page.goto(f"{served(made)}/?query=2&recipe=grad_dot")
    page.click("nav >> text=Groups")
    page.click("section:has(h2:text('By source')) a >> text=beta")
    page.wait_for_selector('[data-side="proponents"] li')
    assert page.input_value('select[name="source"]') == "beta"
    mine = made.grad_dot[2].copy()
    mine[[i for i in range(len(mine)) if i % 3 != 1]] = -np.inf  # sources go round: alpha, beta, …
    wanted = [f"train-{i}" for i in np.argsort(-mine) if mine[i] > 0][:10]
    assert first_ids(page) == wanted
    page.click('[data-side="proponents"] li:first-child .marker')
    page.check('#marking [value="remove"]')
    page.fill('#marking [name="note"]', "seen twice")
    page.click("#marking button[type=submit]")
    page.wait_for_selector('[data-side="proponents"] li:first-child .badge.remove')
    page.click("nav >> text=Marks")
    with page.expect_download() as started:
        page.click("text=CSV")
    with started.value.path().open() as file:
        (line,) = csv.DictReader(file)
    assert (line["id"], line["action"], line["note"]) == (wanted[0], "remove", "seen twice")


def test_two_recipes_are_compared_and_agree_with_themselves(page, address):
    page.goto(f"{address}/compare?query=1&recipe=grad_dot&other=grad_dot")
    agreed = page.locator("dl.facts, .facts").first.inner_text()
    assert agreed.count("100 %") == 2
    page.select_option('select[name="other"]', "trak")
    wait_for_address(page, "other=trak")
    ours, theirs = page.locator(".columns h2, h2").all_inner_texts()[:2]
    assert ours.startswith("grad_dot")
    assert theirs.startswith("trak")


def test_without_javascript_the_same_questions_are_asked_by_forms(browser, address, made):
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(f"{address}/?query=3")
    plain.select_option("#recipe", "grad_dot")
    plain.locator("form:has(#recipe) button:visible").first.click()
    plain.wait_for_url("**recipe=grad_dot**")
    shown = plain.locator('[data-side="proponents"] .id').evaluate_all("a => a.map(o => o.title)")
    assert shown == best(made, made.grad_dot[3])
    context.close()


def test_back_returns_to_the_query_before(page, address):
    page.goto(f"{address}/?query=4&page=1&order=position")
    page.click("#query-6")
    wait_for_address(page, "query=6")
    page.go_back()
    wait_for_address(page, "query=4")
    page.wait_for_selector("#query-4[aria-current]")


def test_the_second_of_two_users_is_told(browser, page, address):
    other = browser.new_context().new_page()
    for each in (page, other):
        each.goto(f"{address}/?query=8&recipe=trak")
        each.click('[data-side="proponents"] li:nth-child(3) .marker')
        each.wait_for_selector("#marking[open]")
    for each, action in ((page, "keep"), (other, "remove")):
        each.check(f'#marking [value="{action}"]')
        each.click("#marking button[type=submit]")
    page.wait_for_selector('[data-side="proponents"] li:nth-child(3) .badge.keep')
    other.wait_for_selector("#marking-fault:not([hidden])")
    assert "in the meantime" in other.inner_text("#marking-fault")
    other.context.close()


@pytest.mark.parametrize("shows", ["text", "image"])
def test_nothing_in_the_data_runs(page, served, tmp_path, shows):
    folder = tmp_path / '"><img src=x onerror=alert(1)><script>alert(1)<script>'
    address = served(make_run(folder, shows=shows, hostile=True))
    page.add_init_script("window.ran = 0; window.alert = () => { window.ran += 1; };")
    for path in ("/", "/?query=1", "/groups", "/compare", "/self-influence", "/train/0", "/run"):
        page.goto(address + path)
        assert page.evaluate("document.scripts.length") == 1
        assert page.evaluate("window.ran") == 0
    page.goto(f"{address}/?query=0")
    page.select_option('select[name="source"]', HOSTILE[0])
    wait_for_address(page, "source=")
    page.click('[data-side="proponents"] .marker')
    page.check('#marking [value="relabel"]')
    page.fill('#marking [name="label"]', HOSTILE[1])
    page.fill('#marking [name="note"]', HOSTILE[0])
    page.click("#marking button[type=submit]")
    page.wait_for_selector(".badge.relabel")
    page.goto(f"{address}/marks")
    assert HOSTILE[0] in page.inner_text(".note")
    assert page.evaluate("[window.ran, document.scripts.length]") == [0, 1]


@pytest.mark.parametrize(
    "path", ["/", "/groups", "/compare", "/self-influence", "/run", "/train/1"]
)
def test_nothing_sticks_out_at_400_pixels(browser, address, path):
    context = browser.new_context(viewport={"width": 400, "height": 800})
    narrow = context.new_page()
    narrow.goto(address + path)
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 400
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/groups", "/self-influence"])
def test_text_stands_out_from_its_ground(browser, address, path, scheme):
    """WCAG 2.2, 1.4.3: contrast of at least 4.5 for every text that is drawn."""
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(address + path)
    assert page.evaluate(CONTRAST) == []
    context.close()


def test_every_control_has_a_name(page, address):
    for path in ("/", "/compare", "/train/1", "/self-influence"):
        page.goto(address + path)
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input:not([type=hidden]), select, button, a")]
            .filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim()
              || one.querySelector("img[alt]")))
            .map((one) => one.outerHTML)"""
        )
        assert unnamed == []


def test_a_new_query_is_uploaded_and_answered(page, served, tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    file = tmp_path / "workload.toml"
    file.write_text(CONFIG.format(path=tmp_path / "run"))
    index_workload(load_config(file))
    opened = open_workload(str(file), ())
    assert opened.config is not None
    made = Made(opened.run, Known.draw(1, 1, 1, 0), Known.draw(1, 1, 1, 0))
    page.goto(served(made, make_example=opened.config.build_example()))
    page.click("text=New query")
    page.fill('[name="row"]', "1, 2")
    page.click("#upload button")
    page.wait_for_selector("#upload-fault:not([hidden])")
    assert "four numbers" in page.inner_text("#upload-fault")
    page.fill('[name="row"]', "0.5 -1, 2; 0")
    page.click("#upload button")
    page.wait_for_selector('[data-side="proponents"] li')
    assert "set=q-" in page.url


def test_a_run_that_breaks_says_what_is_wrong(page, served, tmp_path):
    made = make_run(tmp_path / "run")
    address = served(made)
    page.goto(address)
    for chunk in (made.run.path / "queries" / "test" / "rows").rglob("c/*/*/0"):
        Path(chunk).unlink()
    page.select_option("#recipe", "trak")
    page.wait_for_selector(".fault")
    assert "what to do" in page.inner_text(".fault")
    assert page.is_visible("#recipe")
