"""The built site in a headless browser, opened from its folder: ``make site-check`` runs these where Chromium is."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, CDPSession, Page, ViewportSize

from docs.site.chooser.formulas import WIDTHS
from seqarch.layers import MIXERS
from tests.support.chooser_settings import numbers, setting
from tests.support.paths import ROOT

HTML = ROOT / "build" / "site" / "html"
SUPPORT = ROOT / "tests" / "support"
PAGES = sorted(path for path in HTML.rglob("*.html"))
PHONE, DESK = ViewportSize(width=390, height=844), ViewportSize(width=1280, height=900)
LOOKED_AT = (
    *("index", "start", "chooser", "mixers", "mixers/gated_delta_net", "ops/delta_rule", "results/initialisation"),
    *("api/seqarch.layers", "bench", "search", "tutorials/run_a_sweep"),
)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a phone's width, none of whose errors are left unseen."""
    made = browser.new_page(viewport=PHONE)
    said: list[str] = []
    made.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    made.on("requestfailed", lambda request: said.append(f"not loaded: {request.url}"))
    made.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url))
    yield made
    made.close()
    assert not said


def address(name: str, fragment: str = "") -> str:
    return (HTML / f"{name}.html").as_uri() + fragment


def test_there_are_pages():
    assert len(PAGES) > 150


def processor_time(thread: CDPSession) -> float:
    """Milliseconds that the thread of the page has worked since it was asked for, whatever else the machine does."""
    metrics = {each["name"]: each["value"] for each in thread.send("Performance.getMetrics")["metrics"]}
    return 1000 * metrics["TaskDuration"]


@pytest.mark.parametrize("part", range(4))
def test_every_page_opens_within_a_second_and_is_as_wide_as_a_phone(page: Page, part: int):
    """In processor time: by the clock a page waits for others where they have the machine."""
    thread = page.context.new_cdp_session(page)
    for path in PAGES[part::4]:
        thread.send("Performance.disable")
        thread.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(path.as_uri(), wait_until="load")
        assert 0 < processor_time(thread) < 1000, f"{path} takes a second and more"
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], f"{path} is {wide} pixels wide"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_text_stands_out_from_its_ground(page: Page, name: str, theme: Literal["light", "dark"]):
    """WCAG 2.2, level AA: a contrast of 4.5, of large text 3."""
    page.set_viewport_size(DESK)
    page.emulate_media(color_scheme=theme)
    page.goto(address(name))
    found = page.evaluate((Path(__file__).parent / "contrast.js").read_text(encoding="utf-8"))
    assert not found, json.dumps(found[:5], indent=1)


def chooser(page: Page, **settings: str) -> None:
    """Open the chooser with some settings in its address."""
    page.goto("about:blank")
    page.goto(address("chooser", f"#{urlencode(settings)}" if settings else ""))


def test_the_choosers_numbers_are_the_librarys(page: Page):
    rng = random.Random(5)
    settings = [setting(rng, WIDTHS, 3) for _ in range(200)]
    chooser(page)
    page.add_script_tag(path=SUPPORT / "chooser_numbers.js")
    found = page.evaluate(
        "(all) => { const formulas = new seqarch.Formulas(seqarchFormulas);"
        " return all.map((each) => chooserNumbers(formulas, each)); }",
        settings,
    )
    expected = [numbers(each) for each in settings]
    for each, ours, theirs in zip(settings, found, expected, strict=True):
        assert "error" in ours if theirs is None else ours == theirs, each
    assert sum(theirs is not None for theirs in expected) > 150


def test_the_table_shows_the_librarys_numbers(page: Page):
    chooser(page, pattern="3*mamba2 attention", length="5000", width="512", depth="8", memory="10 MB")
    own = {"pattern": "3*mamba2 attention", "length": 5000, "width": 512, "depth": 8}
    for pattern in ("3*mamba2 attention", "gla", "nsa"):
        wanted = numbers({"dtype": "float32", "channel": "swiglu", "vocabulary": 50304, **own, "pattern": pattern})
        cells = page.locator(f'#rows tr:has(th[data-pattern="{pattern}"]) td')
        shown = [cells.nth(i).get_attribute("data-exact") for i in (0, 2, 4)]
        assert wanted is not None
        assert shown == [wanted["stateBytes"], wanted["stepFlops"], wanted["parameters"]]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("pattern", "3*mamba2 &", "expected a mixer, found '&'"),
        ("pattern", "gated_delta", "did you mean 'gated_delta_net'"),
        ("pattern", "attention(num_heads=2)", "this page counts with default options and window="),
        ("length", "0", "length is 0, expected 1 to"),
        ("length", "1000000000000", "length is 1,000,000,000,000, expected 1 to"),
        ("length", "many", "expected a whole number"),
        ("depth", "7", ""),
        ("memory", "a lot", "expected a size such as 100 MB"),
    ],
)
def test_bad_input_is_said_beside_it_and_the_rest_goes_on(page: Page, name: str, text: str, said: str):
    chooser(page)
    page.fill(f"#{name}", text)
    field = "pattern" if name == "depth" else name
    shown = page.locator(f"#{field}-error").inner_text()
    assert said in shown if said else "use a multiple of 4" in shown
    assert page.locator("#rows tbody tr").count() >= len(MIXERS)
    page.fill("#memory", "1 GB")
    assert "within 1 GB" in page.locator("#answer").inner_text()


def test_a_link_restores_the_view(page: Page):
    chooser(page)
    page.fill("#pattern", "mamba2 attention(window=512)")
    page.select_option("#width", "1024")
    page.select_option("#shown", "step")
    page.check("#fitting")
    shown = page.locator("#rows").inner_text()
    link = page.evaluate("location.href")
    page.goto("about:blank")
    page.goto(link)
    assert page.input_value("#pattern") == "mamba2 attention(window=512)"
    assert page.input_value("#width") == "1024"
    assert page.is_checked("#fitting")
    assert page.locator("#rows").inner_text() == shown


def test_the_chooser_is_used_by_the_keyboard(page: Page):
    chooser(page)
    page.focus("#pattern")
    page.keyboard.press("Control+A")
    page.keyboard.type("mamba")
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#width") != "768"
    page.locator("#rows thead button").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator("#rows thead th").nth(1).get_attribute("aria-sort") == "descending"
    assert page.evaluate("document.activeElement.textContent") == "Memory"


@pytest.mark.parametrize(
    ("script", "said"),
    [("chooser-measured.js", "could not be read"), ("chooser-families.js", "could not be read"),
     ("chooser-formulas.js", "The formulas could not be read")],
)  # fmt: skip
def test_a_damaged_file_is_said_and_the_rest_works(browser: Browser, tmp_path: Path, script: str, said: str):
    copy = tmp_path / "html"
    shutil.copytree(HTML / "_static", copy / "_static")
    shutil.copy(HTML / "chooser.html", copy)
    damaged = copy / "_static" / "chooser" / script
    damaged.write_text(damaged.read_text(encoding="utf-8")[:200], encoding="utf-8")
    page = browser.new_page(viewport=DESK)
    page.goto((copy / "chooser.html").as_uri())
    errors = page.locator(".chooser-error:visible")
    assert said in " ".join(errors.all_inner_texts())
    assert page.locator("#rows tbody tr").count() == (0 if "formulas" in script else len(MIXERS) + 1)
    page.close()


def test_a_search_finds_pages_with_no_network(page: Page):
    page.goto(address("search") + "?q=delta+rule")
    # Results come one after the other, and the line above them counts them when the last has come.
    page.wait_for_function("() => /\\d/.test(document.querySelector('#search-results .search-summary')?.textContent)")
    found: Any = page.locator("#search-results li a").evaluate_all("(links) => links.map((link) => link.href)")
    assert any("delta_rule" in link for link in found)


def test_the_line_of_a_row_is_lit_where_the_row_has_the_focus(page: Page):
    chooser(page)
    page.locator('#rows th[data-pattern="mla"] a').focus()
    assert page.locator("#plot .lit").evaluate_all("(lines) => lines.map((line) => line.dataset.name)") == ["mla"]
