"""Downloads and launch buttons: what the Sphinx extension does with options, buttons and executed pages."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from fedlib.pages import sphinx_downloads

URL = "https://github.com/someone/somebook"


def book(folder: Path, url: str) -> Any:
    """A book with one executed page, `one`, as far as the extension looks at it."""
    executed = folder / "jupyter_execute" / "one.ipynb"
    executed.parent.mkdir()
    cells = [nbformat.v4.new_code_cell("1 + 1", id="first")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), executed)
    options = {"repository_url": url, "launch_buttons": {"colab_url": "https://example.org"}}
    return SimpleNamespace(
        outdir=folder / "html",
        builder=SimpleNamespace(format="html"),
        config=SimpleNamespace(html_theme_options=options),
        env=SimpleNamespace(found_docs={"one", "two"}),
    )


@pytest.mark.parametrize("url", ["", URL])
def test_launch_buttons_need_an_address(tmp_path: Path, url: str) -> None:
    app = book(tmp_path, url)
    sphinx_downloads.leave_out_launch_buttons(app, app.config)
    assert ("launch_buttons" in app.config.html_theme_options) == bool(url)


@pytest.mark.parametrize("url", ["", URL])
def test_notebooks_come_with_the_way_to_fedlib_where_there_is_one(tmp_path: Path, url: str) -> None:
    app = book(tmp_path, url)
    sphinx_downloads.write_notebooks(app, None)
    sources = [cell.source for cell in nbformat.read(tmp_path / "html" / "_sources" / "one.ipynb", as_version=4).cells]
    assert sources[-1] == "1 + 1"
    assert len(sources) == (2 if url else 1)
    assert all(URL in source for source in sources[:-1])
    for source in sources:
        compile(source, "cell", "exec")
    assert not (tmp_path / "html" / "_sources" / "two.ipynb").exists()


def test_a_failed_build_writes_nothing(tmp_path: Path) -> None:
    sphinx_downloads.write_notebooks(book(tmp_path, URL), ValueError())
    assert not (tmp_path / "html").exists()


def test_only_pages_with_code_are_offered(tmp_path: Path) -> None:
    app, with_code, without = book(tmp_path, ""), {"page_source_suffix": ".md"}, {"page_source_suffix": ".md"}
    sphinx_downloads.offer_notebook(app, "one", "", with_code, None)
    sphinx_downloads.offer_notebook(app, "two", "", without, None)
    assert with_code["ipynb_source"] == "one.ipynb" and "ipynb_source" not in without


def test_launch_buttons_open_the_notebook(tmp_path: Path) -> None:
    buttons = [{"url": f"{URL}/blob/gh-pages/_sources/one.md"}]
    context = {"header_buttons": [{"label": "download-buttons"}, {"label": "launch-buttons", "buttons": buttons}]}
    sphinx_downloads.launch_notebook(book(tmp_path, URL), "one", "", context, None)
    assert buttons == [{"url": f"{URL}/blob/gh-pages/_sources/one.ipynb"}]
