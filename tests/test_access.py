"""The built book for readers without a mouse, without sight, on a small screen, in the dark and on paper.

axe-core, which `make axe` fetches with npm, looks at every page; without it these tests are skipped, but where CI is
set they fail.
"""

import re
from typing import Any

import pytest
from built import ROOT, Tab, give_up, pages
from playwright.sync_api import Page, ViewportSize, expect

pytestmark = pytest.mark.browser
NARROW: ViewportSize = {"width": 390, "height": 844}
WIDE: ViewportSize = {"width": 1280, "height": 800}
PAPER: ViewportSize = {"width": 794, "height": 1123}


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core at the version that the Makefile pins."""
    (version,) = re.findall(r"^AXE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folder = ROOT / ".cache" / "axe" / "node_modules" / "axe-core"
    if not (folder / "axe.min.js").is_file() or f'"version": "{version}"' not in (folder / "package.json").read_text():
        give_up(f"no axe-core {version} in .cache/axe; install npm and run: make axe")
    return (folder / "axe.min.js").read_text()


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


# One visit a page, because opening it is what takes time.
@pytest.mark.parametrize("name", pages() or ["index.html"])
def test_page_bars_no_reader(name: str, tab: Tab, axe: str) -> None:
    page = tab.page
    page.set_viewport_size(WIDE)
    page.emulate_media(color_scheme="light")
    tab.open(name)
    page.add_style_tag(content="* { transition: none !important }")  # no colours on their way
    page.evaluate("document.querySelectorAll('.toggle-hidden').forEach(e => e.classList.remove('toggle-hidden'))")
    page.evaluate(axe)
    wrong = violations(page)

    page.emulate_media(color_scheme="dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    wrong += [f"dark: {found}" for found in violations(page, "color-contrast")]
    page.emulate_media(color_scheme="light")

    page.set_viewport_size(NARROW)
    for _ in range(20):  # the theme waits before it looks at the new width
        page.wait_for_timeout(500)
        if not (unreachable := violations(page, "scrollable-region-focusable")):
            break
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


def test_axe_sees_what_is_wrong(tab: Tab, axe: str) -> None:
    page = tab.open("start/install.html")
    page.evaluate(axe)
    page.evaluate(
        "document.querySelector('article').innerHTML += '<p style=\"color: #eee; background: #fff\">pale</p>'"
    )
    assert [found.split()[0] for found in violations(page, "color-contrast")] == ["color-contrast"]
