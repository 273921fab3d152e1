"""The built book as a reader meets it: every page in headless Chromium, served from this machine, nothing from outside.

FEDLIB_BOOK names the folder with the pages (default: book/_build/html), FEDLIB_CHROMIUM the browser. Without a book or
a browser these tests are skipped, but where CI is set they fail.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from playwright.sync_api import Browser, ConsoleMessage, Page, Response, Route, expect, sync_playwright

ROOT = Path(__file__).parents[1]
HTML = Path(os.environ.get("FEDLIB_BOOK") or ROOT / "book" / "_build" / "html")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

pytestmark = pytest.mark.browser


def chapters() -> list[str]:
    """The pages of the table of contents, in reading order, the first one included."""
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())

    def walk(node: dict[str, Any]) -> Iterator[str]:
        if "file" in node:
            yield node["file"]
        for key in ("parts", "chapters", "sections"):
            for child in node.get(key, []):
                yield from walk(child)

    return [toc["root"], *walk(toc)]


def pages() -> list[str]:
    """Every HTML page of the built book, search and index included."""
    found = (path.relative_to(HTML).as_posix() for path in HTML.rglob("*.html"))
    return sorted(name for name in found if not name.startswith("_"))


def give_up(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(f"BROWSER TESTS NOT RUN: {reason}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not (HTML / "index.html").is_file():
        give_up(f"no book in {HTML}; build it with: make book")
    path = os.environ.get("FEDLIB_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        give_up("no Chromium; install it (Debian: apt-get install chromium) or name one with FEDLIB_CHROMIUM")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to run as root with its sandbox
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--disable-background-networking", *sandbox])


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Quiet: what matters is seen by the browser."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of the book, served on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(HTML))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@dataclass
class Tab:
    """A browser's page, and what went wrong in it: errors in the console, requests for other sites, missing files."""

    page: Page
    site: str
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self.see_message)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("response", self.see_response)
        self.page.route("**/*", self.keep_inside)

    def see_message(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def see_response(self, response: Response) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status} {response.url}")

    def keep_inside(self, route: Route) -> None:
        if route.request.url.startswith((self.site, "data:", "blob:")):
            route.continue_()
        else:
            self.problems.append(f"leaves the site: {route.request.url}")
            route.abort()

    def open(self, name: str) -> Page:
        self.page.goto(self.site + name, wait_until="networkidle")
        return self.page


@pytest.fixture
def tab(browser: Browser, site: str) -> Iterator[Tab]:
    page = browser.new_page()
    page.set_default_timeout(30_000)
    tab = Tab(page, site)
    yield tab
    page.close()
    assert not tab.problems


@pytest.fixture(scope="module")
def anchors(browser: Browser, site: str) -> dict[str, set[str]]:
    """The ids on every page, that a link may point to."""
    page = browser.new_page(java_script_enabled=False)
    found = {}
    for name in pages():
        page.goto(site + name)
        found[name] = set(page.eval_on_selector_all("[id]", "all => all.map(e => e.id)"))
    page.close()
    return found


def test_every_chapter_is_a_page(browser: Browser) -> None:
    assert {f"{name}.html" for name in chapters()} <= set(pages())


# The names are collected before any test runs; with no book there is one case, which says so.
@pytest.mark.parametrize("name", pages() or ["index.html"])
def test_page(name: str, tab: Tab, anchors: dict[str, set[str]]) -> None:
    page = tab.open(name)
    assert page.title()

    # Mathematics: MathJax is there and has set every formula.
    formulas = page.locator(".math").count()
    if formulas:
        expect(page.locator(".math:has(mjx-container)")).to_have_count(formulas)
        assert page.locator("mjx-merror").all_text_contents() == []

    # Figures: loaded, and with a text of their own (Sphinx puts the file's path where none is given).
    for image in page.locator("img").all():
        source, text = image.get_attribute("src") or "", image.get_attribute("alt") or ""
        assert image.evaluate("e => e.complete && e.naturalWidth > 0"), source
        assert len(text) > 10 and Path(source).name not in text, f"{source} needs alt text, has {text!r}"

    # Links inside the book lead to a page, and to a place on it.
    for address in page.eval_on_selector_all("a[href]", "all => all.map(e => e.href)"):
        link = urlsplit(address)
        target = link.path.removeprefix("/") or "index.html"
        if address.startswith(tab.site) and target.endswith(".html"):
            assert target in anchors, address
            assert not link.fragment or link.fragment in anchors[target], address


def test_next_leads_through_all_chapters(tab: Tab) -> None:
    page = tab.open("index.html")
    for name in chapters()[1:]:
        page.locator("a.right-next").click()
        page.wait_for_url(f"{tab.site}{name}.html")


def test_side_bar_leads_to_every_chapter(tab: Tab) -> None:
    page = tab.open("index.html")
    for name in chapters()[1:]:
        page.locator(f"nav.bd-links a[href$='{name.rsplit('/', 1)[-1]}.html']").click()
        page.wait_for_url(f"{tab.site}{name}.html")


def test_search_finds_a_word_and_leads_to_it(tab: Tab) -> None:
    page = tab.open("index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("Fashion-MNIST")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?*")
    expect(page.locator("#search-results li").first).to_be_visible()
    page.locator("#search-results li a[href*='install']").first.click()
    expect(page.locator("h1").first).to_contain_text("Install")


def test_search_for_an_unknown_word_finds_nothing(tab: Tab) -> None:
    page = tab.open("search.html?q=zyzzyva")
    expect(page.locator("#search-results")).to_contain_text("did not match any documents")


def test_definition_and_exercise_are_set(tab: Tab) -> None:
    expect(tab.open("index.html").locator("div.proof.definition")).to_contain_text("Cost of a message")
    page = tab.open("start/laptop.html")
    expect(page.locator("div.exercise")).to_contain_text("How large is one message?")
    solution = page.locator("div.solution")
    expect(solution.get_by_text("12")).to_be_hidden()
    solution.locator(".toggle-button").click()
    expect(solution).to_contain_text("times fewer")
