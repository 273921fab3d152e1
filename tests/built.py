"""The built book, for the tests that open it in headless Chromium: where it is, its pages, and how one is opened.

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

import pytest
from common import ROOT
from playwright.sync_api import Browser, ConsoleMessage, Page, Response, Route, expect, sync_playwright
from ruamel.yaml import YAML

HTML = Path(os.environ.get("FEDLIB_BOOK") or ROOT / "book" / "_build" / "html")
PATIENCE = 120_000  # ms: a machine may be busy with something else
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chapters() -> list[str]:
    """The pages of the table of contents, in reading order, the first one included."""
    toc = YAML(typ="safe").load((ROOT / "book" / "_toc.yml").read_text())

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


def launched() -> Iterator[Browser]:
    if not (HTML / "index.html").is_file():
        give_up(f"no book in {HTML}; build it with: make book")
    path = os.environ.get("FEDLIB_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        give_up("no Chromium; install it (Debian: apt-get install chromium) or name one with FEDLIB_CHROMIUM")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses to run as root with its sandbox
    expect.set_options(timeout=PATIENCE / 4)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--disable-background-networking", *sandbox])


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Quiet: what matters is seen by the browser."""


def served() -> Iterator[str]:
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


def opened(browser: Browser, site: str) -> Iterator[Tab]:
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    tab = Tab(page, site)
    yield tab
    page.close()
    assert not tab.problems
