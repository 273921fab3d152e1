"""A Sphinx extension: each page with code can be downloaded as .ipynb, with its outputs, and opened elsewhere.

The theme offers a text notebook as .ipynb only where launch buttons are configured, and fails over launch buttons
without an address of the repository. Here the download is always there, and the launch buttons come with the address
(`repository_url` in `book/_config.yml`). They open the notebooks that lie beside the published pages, in `_sources`,
since Git holds neither the executed pages nor .ipynb files of the text ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from sphinx.application import Sphinx
from sphinx.config import Config

FETCH = """\
# Where fedlib is not installed, as on Colab or Binder: fetch the repository and install it. This takes minutes.
import importlib.util, subprocess, sys

if importlib.util.find_spec("fedlib") is None:
    subprocess.run(["git", "clone", "--depth=1", "{url}", "fedlib-book"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "./fedlib-book[book]"], check=True)
    sys.path.insert(0, "fedlib-book")"""


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", leave_out_launch_buttons)
    app.connect("html-page-context", offer_notebook)  # at priority 500; the theme makes its buttons at 501
    app.connect("html-page-context", launch_notebook, priority=502)
    app.connect("build-finished", write_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def executed(app: Sphinx, page: str) -> Path:
    """Where myst-nb leaves a page with code, if it is one."""
    return app.outdir.parent / "jupyter_execute" / f"{page}.ipynb"


def leave_out_launch_buttons(app: Sphinx, config: Config) -> None:
    if not config.html_theme_options.get("repository_url"):
        config.html_theme_options.pop("launch_buttons", None)


def offer_notebook(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if context.get("page_source_suffix") == ".md" and executed(app, pagename).is_file():
        context["ipynb_source"] = f"{pagename}.ipynb"


def launch_notebook(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    for group in context["header_buttons"]:
        if group.get("label") == "launch-buttons":
            for button in group["buttons"]:
                button["url"] = button["url"].replace(f"{pagename}.md", f"{pagename}.ipynb")


def write_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Each executed page into the book's `_sources`; with an address, after a cell that fetches the repository."""
    if exception or app.builder.format != "html":
        return
    url = app.config.html_theme_options.get("repository_url")
    for page in app.env.found_docs:
        source = executed(app, page)
        if not source.is_file():
            continue
        notebook = nbformat.read(source, as_version=4)
        if url:
            notebook.cells.insert(0, nbformat.v4.new_code_cell(FETCH.format(url=url), id="fetch"))
        target = app.outdir / "_sources" / f"{page}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
