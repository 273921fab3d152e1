"""From a text notebook to an executed page: run by papermill, then cleared of times and random ids."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import papermill

from fedlib.data.sources import home
from fedlib.errors import FedlibError, SpecError, require_name
from fedlib.runs import record

CELL_SECONDS = 1800  # papermill itself sets no limit


def make(paper: str, profile: str, parameters: dict[str, Any] | None = None, root: Path | None = None) -> Path:
    """Execute notebooks/<paper>.md into book/papers, or book/compare where it is no paper's; on failure the old page
    stays.

    Raises SpecError for a parameter that the notebook does not have, FedlibError when a cell fails.
    """
    root = root or home()
    given = {"profile": profile} | (parameters or {})
    check_parameters(paper, given, root)
    folder = "papers" if (root / "published" / f"{paper}.yaml").is_file() else "compare"
    target = root / "book" / folder / f"{paper}.ipynb"
    try:
        executed = papermill.execute_notebook(
            jupytext.read(root / "notebooks" / f"{paper}.md"),
            None,
            parameters=given,
            kernel_name="python3",
            cwd=str(root),
            progress_bar=os.isatty(2),
            execution_timeout=CELL_SECONDS,
        )
    except papermill.PapermillExecutionError as error:
        if error.ename in {kind.__name__ for kind in FedlibError.__subclasses__()}:
            raise FedlibError(f"notebooks/{paper}.md: {error.evalue}") from error
        raise FedlibError(f"notebooks/{paper}.md failed in a cell; the old page was kept.\n{error}") from error
    except (RuntimeError, TimeoutError) as error:  # of a kernel that died, never began, or was too slow
        what = str(error).strip() or type(error).__name__
        raise FedlibError(
            f"notebooks/{paper}.md: {what}; the old page was kept; make it again, on a machine with more memory or time"
        ) from error
    record.write(target, nbformat.writes(normalise(executed)).encode())
    return target


def check_parameters(paper: str, given: Iterable[str], root: Path | None = None) -> None:
    """SpecError for a parameter that the paper's notebook does not have: papermill itself would only log it."""
    root = root or home()
    require_name("paper or page", paper, [path.stem for path in (root / "notebooks").glob("*.md")])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"{paper}.ipynb")
        jupytext.write(jupytext.read(root / "notebooks" / f"{paper}.md"), source)
        known = papermill.inspect_notebook(str(source))
    for name in given:
        if name not in known:
            has = ", ".join(sorted(known)) or "none: it needs a cell tagged parameters"
            raise SpecError(f"parameter: {name!r} is unknown to notebooks/{paper}.md; it has {has}")


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without times and random ids, so that the same results give the same bytes."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("jupytext", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"].append("remove-cell")
    return notebook
