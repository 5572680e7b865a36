"""A browser for the tests of the page, and a crowd that contends for a limit meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the tests of the page need playwright (pip)")

playwright.expect.set_options(timeout=60000)

HERE = Path(__file__).resolve().parent
CHROMIUM = os.environ.get("PGLIMITS_TEST_CHROMIUM") or shutil.which("chromium")
AXE = os.environ.get("PGLIMITS_TEST_AXE", "")
CROWD = int(os.environ.get("PGLIMITS_TEST_CROWD", "4"))
"""Processes that contend while the page is used: 50 in a full run."""
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}

NASTY = (
    "<img src=x onerror=window.hacked=1>",
    "<script>window.hacked=1</script>",
    "\"' onmouseover='window.hacked=1' x=\"",
    "{{ 7 * 7 }} ${7*7} <%= 7 %>",
    "a?b=c#d;e:f@g+h\\i|j",
    "  two  blanks, ünïcode, 漢字, 😀, \u202eright to left\u202c, &lt;b&gt; &amp;",
    "javascript:window.hacked=1",
    "</table></dialog><h1>out</h1>",
)
"""Texts for holders and keys. Names may not have all of these characters."""
NAMES = (*(text.translate(str.maketrans("", "", "/%&<>")) for text in NASTY), ".", "..", "x" * 200)


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A browser, for one test: Playwright runs an event loop in this thread, where the other tests could run none."""
    if CHROMIUM is None:
        pytest.skip("the tests of the page need chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium: Any) -> Iterator[Callable[..., Any]]:
    """browse(viewport=NARROW, color_scheme="dark"): a tab. At the end, nothing may have gone wrong in any of them.

    ``tab.expected`` takes texts of errors that the test brings about.
    """
    contexts: list[Any] = []
    tabs: list[Any] = []

    def begin(**options: Any) -> Any:
        context = chromium.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
        context.set_default_timeout(60000)
        contexts.append(context)
        tab = context.new_page()
        tab.wrong = []
        tab.expected = []
        tab.on("console", lambda said: _note(tab, said))
        tab.on(
            "response",
            lambda got: tab.wrong.append(f"{got.status} {got.url}") if got.status >= 400 else None,
        )
        tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
        tabs.append(tab)
        return tab

    yield begin
    wrong = [text for tab in tabs for text in tab.wrong if not any(known in text for known in tab.expected)]
    hacked = [tab.url for tab in tabs if tab.evaluate("'hacked' in window")]
    for context in contexts:
        context.close()
    assert not wrong, wrong
    assert not hacked, hacked


def _note(tab: Any, said: Any) -> None:
    # What the server refused is noted with its URL as a response.
    if said.type in ("error", "warning") and "the server responded with a status of" not in said.text:
        tab.wrong.append(said.text)


def is_live(tab: Any) -> None:
    """Wait until news arrive there."""
    playwright.expect(tab.locator("#live-state")).to_have_attribute("data-kind", "on")


def does_not_scroll(tab: Any) -> None:
    """What is shown is no wider than the window."""
    found = tab.evaluate(
        """() => [document.documentElement.scrollWidth - innerWidth,
        [...document.querySelectorAll('body *')].filter(each => each.getBoundingClientRect().right > innerWidth + 1)
        .slice(0, 5).map(each => each.outerHTML.slice(0, 120))]"""
    )
    assert found[0] <= 0, (tab.url, found)


def axe(tab: Any, *rules: str) -> None:
    """Nothing that is shown is hard to use for those who see or move otherwise."""
    if not AXE:
        pytest.skip("PGLIMITS_TEST_AXE is to be the path of axe.min.js (npm pack axe-core)")
    if not tab.evaluate("'axe' in window"):
        tab.evaluate(Path(AXE).read_text(encoding="utf-8"))
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = list(rules)
    found = tab.evaluate("async (options) => (await axe.run(document, options)).violations", options)
    bad = [
        (each["id"], each["help"], [node["html"][:160] for node in each["nodes"]][:3])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert not bad, (tab.url, bad)


@pytest.fixture
def crowd() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """crowd(dsn, "name", how_many): processes that take and give back slots until the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(dsn: str, name: str, how_many: int = CROWD, keys: Sequence[str] = ("",)) -> list[subprocess.Popen[str]]:
        for number in range(how_many):
            started.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "page_worker.py"), dsn, name, keys[number % len(keys)]],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"
        return started

    yield begin
    for process in started:
        process.kill()
        process.communicate()
