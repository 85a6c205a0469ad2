"""A headless browser: Debian's Chromium, or the one that CHROMIUM names, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def wide(browser) -> Iterator[Page]:
    """A page of a desktop, on which nothing may be wrong by the end."""
    yield from watched(browser, width=1280, height=900)


@pytest.fixture(params=["light", "dark"])
def phone(browser, request) -> Iterator[Page]:
    """A page of a phone in either theme."""
    yield from watched(browser, width=390, height=844, scheme=request.param)


def watched(browser: Browser, width: int, height: int, scheme: str = "light") -> Iterator[Page]:
    """A page without a network, whose console has no warning and no error in the end."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True, accept_downloads=True
    )
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    context.close()
    assert wrong == []
