"""From the labs' pages to notebooks for plain Jupyter: a student's without solutions, a teacher's with them."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat

from fedlib.data.sources import home
from fedlib.errors import FedlibError
from fedlib.pages.execute import normalise
from fedlib.runs.record import sweep
from fedlib.runs.record import write as write_file

Notebook = Any  # nbformat is untyped
SOLUTION = "solution"
STUB = "# Your code"

DIRECTIVE = re.compile(
    r"^(`{3,}|:{3,})\{([\w:-]+)\}[ \t]*(.*)\n((?::[\w-]+:.*\n)*)\n?([\s\S]*?)^\1[ \t]*$", re.MULTILINE
)
ROLE = re.compile(r"\{([\w:]+)\}`([^`]+)`")
TITLES = {"note": "Note", "tip": "Tip", "warning": "Warning", "important": "Important", "admonition": ""}


def student(notebook: Notebook) -> Notebook:
    """A copy in which a stub stands for each cell tagged `solution`. SpecError: see `plain`."""
    made = plain(notebook)
    others = [cell.source for cell in made.cells if cell.cell_type == "code" and not solves(cell)]
    for cell in made.cells:
        if solves(cell):
            cell.source = stub(cell.source, others)
            cell.metadata = nbformat.NotebookNode()
    return made


def teacher(notebook: Notebook) -> Notebook:
    """A copy with its solutions, each marked as one."""
    made = plain(notebook)
    for cell in made.cells:
        if solves(cell):
            cell.source = f"# Solution\n{cell.source}"
    return made


def solves(cell: Any) -> bool:
    return SOLUTION in cell.metadata.get("tags", [])


def stub(solution: str, others: list[str]) -> str:
    """The names that the solution defines and another cell reads, each set to the ellipsis."""
    read = {node.id for code in others for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    names = [name for name in defined(solution) if name in read]
    if not names:
        raise FedlibError(f"a solution defines no name that another cell reads: {solution[:60]!r}")
    return "\n".join([STUB, *(f"{name} = ..." for name in names)])


def defined(code: str) -> list[str]:
    """Names bound by a cell's own statements, in order: functions and assignments, imports left out."""
    found: dict[str, None] = {}
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found[statement.name] = None
        elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
            stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
            found |= {node.id: None for node in stored if isinstance(node.ctx, ast.Store)}
    return list(found)


def plain(notebook: Notebook) -> Notebook:
    """A copy without outputs, times and random ids, its prose as plain Jupyter shows it.

    FedlibError: a directive or role that has no plain form.
    """
    made = normalise(copy.deepcopy(notebook))
    made.metadata = nbformat.NotebookNode(kernelspec=made.metadata.get("kernelspec", {}))
    made.nbformat, made.nbformat_minor = 4, 5
    for cell in made.cells:
        cell.metadata = nbformat.NotebookNode(tags=[SOLUTION]) if solves(cell) else nbformat.NotebookNode()
        if cell.cell_type == "markdown":
            cell.source = readable(cell.source)
        else:
            cell.outputs, cell.execution_count = [], None
    return made


def readable(text: str) -> str:
    """MyST as common Markdown: an admonition is a quotation, a reference its text, a label nothing."""
    text = re.sub(r"^\([\w-]+\)=\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\$\$[ \t]*\([\w-]+\)[ \t]*$", "$$", text, flags=re.MULTILINE)
    return ROLE.sub(_role, DIRECTIVE.sub(_directive, text))


def _directive(found: re.Match[str]) -> str:
    _, name, title, _, body = found.groups()
    if name not in TITLES:
        raise FedlibError(f"labs: the directive {name!r} has no plain form; allowed: {', '.join(TITLES)}")
    quoted = [f"**{title or TITLES[name]}**", "", *body.strip().splitlines()]
    return "\n".join(f"> {line}".rstrip() for line in quoted)


def _role(found: re.Match[str]) -> str:
    name, target = found.groups()
    if name == "math":
        return f"${target}$"
    if name not in ("ref", "doc", "prf:ref", "eq", "cite:p", "cite:t"):
        raise FedlibError(f"labs: the role {name!r} has no plain form")
    titled = re.fullmatch(r"(.*?)\s*<[^>]+>", target, re.DOTALL)
    text = titled[1] if titled else target.replace("-", " ")
    return f"[{target}]" if name.startswith("cite") else f"*{text}*"


def sources(root: Path | None = None) -> list[Path]:
    """The labs' pages in their order, by the numbers in their names."""
    return sorted(((root or home()) / "book" / "labs").glob("[0-9]*.md"))


def made(page: Path) -> dict[str, bytes]:
    """A page's two notebooks as files, by kind; the same bytes every time."""
    notebook = jupytext.read(page)
    return {
        kind.__name__: (nbformat.writes(kind(notebook)).rstrip("\n") + "\n").encode() for kind in (student, teacher)
    }


def write(folder: Path, *, replace: bool = False) -> list[Path]:
    """Write folder/student/*.ipynb and folder/teacher/*.ipynb; what was written, and what was there already.

    A notebook that is there with other content may be somebody's work: FedlibError, and nothing is written, unless
    `replace`. FedlibError also where the folder cannot be read or written.
    """
    files = {folder / kind / f"{page.stem}.ipynb": data for page in sources() for kind, data in made(page).items()}
    for kind in ("student", "teacher"):
        sweep(folder / kind)
    try:
        changed = {path: data for path, data in files.items() if not path.exists() or path.read_bytes() != data}
        there = [str(path) for path in changed if path.exists()]
        if there and not replace:
            raise FedlibError(
                f"labs: {there[0]}{f' and {len(there) - 1} more' if there[1:] else ''} would be lost, and may hold "
                "somebody's work; move it away, name another --folder, or say --replace"
            )
        for path, data in changed.items():
            write_file(path, data)
    except OSError as error:
        raise FedlibError(f"folder: {str(folder)!r} cannot be read ({error}); name another --folder") from error
    return list(files)
