"""The built book as its readers meet it: every page in headless Chromium, served from this machine, nothing from
outside; with a mouse and without, without sight, on a small screen, in the dark and on paper.

`built` says which book and which browser. axe-core, which `make axe` fetches with npm, looks at every page; without it
these tests are skipped, but where CI is set they fail. All stand in one file, so that one browser serves them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
import pytest
from built import HTML, Tab, chapters, give_up, opened, pages
from common import ROOT
from playwright.sync_api import Browser, Page, ViewportSize, expect
from ruamel.yaml import YAML

pytestmark = pytest.mark.browser
NARROW: ViewportSize = {"width": 390, "height": 844}
WIDE: ViewportSize = {"width": 1280, "height": 800}
PAPER: ViewportSize = {"width": 794, "height": 1123}


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


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core at the version that the Makefile pins."""
    (version,) = re.findall(r"^AXE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folder = ROOT / ".cache" / "axe" / "node_modules" / "axe-core"
    if not (folder / "axe.min.js").is_file() or f'"version": "{version}"' not in (folder / "package.json").read_text():
        give_up(f"no axe-core {version} in .cache/axe; install npm and run: make axe")
    return (folder / "axe.min.js").read_text()


# Opening a page is what takes time: each is opened once for all tests of a page, the last of which changes it.
# The names are collected before any test runs; with no book there is one case, which says so.
@pytest.fixture(scope="module", params=pages() or ["index.html"])
def visited(request: pytest.FixtureRequest, browser: Browser, site: str) -> Iterator[Tab]:
    for tab in opened(browser, site):
        tab.page.set_viewport_size(WIDE)
        tab.page.emulate_media(color_scheme="light")
        tab.open(request.param)
        yield tab


def violations(page: Page, *rules: str) -> list[str]:
    """What axe finds wrong, of those rules or of all, where it bars readers; the script has to be in the page."""
    only = {"runOnly": list(rules)} if rules else {}
    found: list[dict[str, Any]] = page.evaluate(
        "options => axe.run(document, options).then(result => result.violations)",
        {"resultTypes": ["violations"]} | only,
    )
    return [
        f"{rule['id']} ({rule['impact']}): {node['html'][:120]}: {node['failureSummary'][:200]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


def page_scrolls(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def tab_to(page: Page, selector: str, most: int) -> None:
    """Press Tab until what is selected has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"{selector} is not reached by {most} presses of Tab")


def test_page(visited: Tab, anchors: dict[str, set[str]]) -> None:
    page = visited.page
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
        if address.startswith(visited.site) and target.endswith(".html"):
            assert target in anchors, address
            assert not link.fragment or link.fragment in anchors[target], address


def test_page_is_accessible(visited: Tab, axe: str) -> None:
    page = visited.page
    page.add_style_tag(content="* { transition: none !important }")  # no colours on their way
    page.evaluate("document.querySelectorAll('.toggle-hidden').forEach(e => e.classList.remove('toggle-hidden'))")
    page.evaluate(axe)
    wrong = violations(page)

    page.emulate_media(color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    wrong += [f"dark: {found}" for found in violations(page, "color-contrast")]
    page.emulate_media(color_scheme="light")

    page.set_viewport_size(NARROW)
    for _ in range(100):  # the theme waits before it looks at the new width
        if not (unreachable := violations(page, "scrollable-region-focusable")):
            break
        page.wait_for_timeout(100)
    wrong += [f"narrow: {found}" for found in unreachable]
    if page_scrolls(page):
        wrong.append("narrow: the page scrolls sideways")

    page.set_viewport_size(PAPER)
    page.emulate_media(media="print")
    bars = [bar for bar in (".bd-sidebar-primary", ".bd-sidebar-secondary") if page.locator(bar).is_visible()]
    wrong += [f"print: {bar} is shown" for bar in bars]
    width = page.evaluate("document.querySelector('.bd-article-container').getBoundingClientRect().width")
    share = width / PAPER["width"]
    if share < 0.95:
        wrong.append(f"print: the article takes {share:.0%} of the paper's width")
    assert not wrong, "\n".join(wrong)


def test_axe_sees_what_is_wrong(tab: Tab, axe: str) -> None:
    page = tab.open("start/install.html")
    page.evaluate(axe)
    page.evaluate(
        "document.querySelector('article').innerHTML += '<p style=\"color: #eee; background: #fff\">pale</p>'"
    )
    assert [found.split()[0] for found in violations(page, "color-contrast")] == ["color-contrast"]


def test_every_chapter_is_a_page(browser: Browser) -> None:
    assert {f"{name}.html" for name in chapters()} <= set(pages())


def test_every_page_with_code_can_be_downloaded_as_a_notebook(browser: Browser) -> None:
    config = YAML(typ="safe").load((ROOT / "book" / "_config.yml").read_text())["sphinx"]["config"]
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


def test_next_and_the_side_bar_lead_through_all_chapters(tab: Tab) -> None:
    """On each page both links to the following chapter can be clicked; they are in turn."""
    page = tab.open("index.html")
    for index, name in enumerate(chapters()[1:]):
        address = f"{tab.site}{name}.html"
        links = [
            page.locator("a.right-next"),
            page.locator(f"nav.bd-links a[href$='{name.rsplit('/', 1)[-1]}.html']"),
        ]
        assert [link.evaluate("e => e.href") for link in links] == [address] * 2
        links[index % 2 - 1].click(trial=True)
        links[index % 2].click()
        page.wait_for_url(address, wait_until="domcontentloaded")


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


def test_the_first_tab_stop_leads_past_the_side_bar(tab: Tab) -> None:
    page = tab.open("index.html")
    page.keyboard.press("Tab")
    expect(page.locator("#pst-skip-link a")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("#main-content$"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('#main-content').contains(document.activeElement)")


def test_search_and_side_bar_are_reached_by_keys(tab: Tab) -> None:
    page = tab.open("start/install.html")
    tab_to(page, ".search-button-field", 10)
    page.keyboard.press("Enter")
    expect(page.locator("dialog input[type=search]")).to_be_focused()
    page.keyboard.press("Escape")
    tab_to(page, "nav.bd-links a[href$='laptop.html']", 20)
    page.keyboard.press("Enter")
    page.wait_for_url("**/start/laptop.html")


def test_side_bar_of_a_small_screen_opens_by_keys(tab: Tab) -> None:
    tab.page.set_viewport_size(NARROW)
    page = tab.open("start/install.html")
    expect(page.locator("nav.bd-links")).to_be_hidden()
    tab_to(page, ".primary-toggle", 10)
    page.keyboard.press("Enter")
    expect(page.locator("nav.bd-links").first).to_be_visible()


def test_solution_opens_by_keys(tab: Tab) -> None:
    page = tab.open("start/laptop.html")
    solution = page.locator("div.solution")
    tab_to(page, "div.solution .toggle-button", 100)
    expect(solution.get_by_text("12")).to_be_hidden()
    page.keyboard.press("Enter")
    expect(solution).to_contain_text("times fewer")
    expect(solution.locator(".toggle-button")).to_have_attribute("aria-expanded", "true")
