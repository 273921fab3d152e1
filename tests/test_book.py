"""The built book as a reader meets it: every page in headless Chromium, served from this machine, nothing from outside.

`built` says which book and which browser.
"""

import re
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
import yaml
from built import HTML, ROOT, Tab, chapters, pages
from playwright.sync_api import Browser, expect

pytestmark = pytest.mark.browser


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


def test_every_page_with_code_can_be_downloaded_as_a_notebook(browser: Browser) -> None:
    config = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())["sphinx"]["config"]
    address = config["html_theme_options"]["repository_url"]
    for name in chapters():
        source = ROOT / "book" / f"{name}.md"
        if source.is_file() and "kernelspec:" not in source.read_text():
            continue  # text alone
        notebook = nbformat.read(HTML / "_sources" / f"{name}.ipynb", as_version=4)
        assert any(cell.cell_type == "code" for cell in notebook.cells)
        page = (HTML / f"{name}.html").read_text()
        assert re.search(rf'href="[./]*_sources/{name}\.ipynb"', page), name
        assert ("launch-buttons" in page) == bool(address), "without an address they would lead nowhere"


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
