"""The labs' notebooks hold what they should, for students and for teachers, and run."""

import contextlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat
import pytest

from fedlib.__main__ import main
from fedlib.errors import FedlibError
from fedlib.labs import notebooks, questions

PAGES = notebooks.sources()
NAMES = [page.stem for page in PAGES]
Cell = Any


def cells(*sources: tuple[str, str, list[str]]) -> Any:
    made = nbformat.v4.new_notebook()
    for kind, source, tags in sources:
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        made.cells.append(new(source, metadata={"tags": tags} if tags else {}))
    return made


def test_a_solution_becomes_a_stub_that_names_what_others_read() -> None:
    solution = "import math\nsecret = 3\na: int = secret\ndef f(x):\n    inner = x\n    return inner\nb, unread = 1, 2"
    notebook = cells(
        ("code", "import os", ["hide-input"]),
        ("code", solution, ["solution", "hide-input"]),
        ("code", "print(f(a), b)", []),
    )
    made = notebooks.student(notebook)
    assert made.cells[1].source == "# Your code\na = ...\nf = ...\nb = ..."
    assert [cell.metadata for cell in made.cells] == [{}, {}, {}]
    assert notebooks.teacher(notebook).cells[1].source == f"# Solution\n{solution}"
    assert notebook.cells[1].source == solution  # the argument is left as it was
    with pytest.raises(FedlibError, match="defines no name"):
        notebooks.student(cells(("code", "print(1)", ["solution"])))


@pytest.mark.parametrize(
    ("myst", "plain"),
    [
        ("(label)=\n# Title", "# Title"),
        ("see {ref}`Counting <counting-bytes>`, {ref}`counting-bytes`", "see *Counting*, *counting bytes*"),
        ("{ref}`two\nlines <label>`", "*two\nlines*"),
        ("{math}`x = 1` {cite:p}`mcmahan2017`", "$x = 1$ [mcmahan2017]"),
        ("$$\nx\n$$ (name)\nmore", "$$\nx\n$$\nmore"),
        (
            "```{admonition} Why\n:class: tip\n\nBecause.\n\nYes.\n```\nmore",
            "> **Why**\n>\n> Because.\n>\n> Yes.\nmore",
        ),
        (":::{note}\nOne.\n:::", "> **Note**\n>\n> One."),
    ],
)
def test_myst_becomes_what_plain_jupyter_shows(myst: str, plain: str) -> None:
    assert notebooks.readable(myst) == plain


@pytest.mark.parametrize("myst", ["{glue:text}`x`", "```{figure} x.png\n```"])
def test_myst_without_a_plain_form_is_refused(myst: str) -> None:
    with pytest.raises(FedlibError, match="has no plain form"):
        notebooks.readable(myst)


def code(notebook: Any) -> list[Cell]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_seven_labs_and_each_question_is_asked_once() -> None:
    assert [name[0] for name in NAMES] == list("1234567")
    text = "".join(page.read_text() for page in PAGES)
    assert re.findall(r'checks\.check\("([^"]+)"', text) == list(questions.QUESTIONS)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_solution_leaks_into_a_student_s_notebook(page: Path) -> None:
    source, made = jupytext.read(page), notebooks.student(jupytext.read(page))
    lines = {line.strip() for cell in made.cells for line in cell.source.splitlines()}
    solutions = [cell for cell in code(source) if notebooks.solves(cell)]
    assert solutions
    for cell in solutions:
        assert not lines & {line.strip() for line in cell.source.splitlines() if line.strip()}
    assert len(code(made)) == len(code(source))
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(made))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_check_follows_each_solution_and_a_prediction_is_asked_for(page: Path) -> None:
    found = code(jupytext.read(page))
    for cell, after in itertools.pairwise(found):
        if notebooks.solves(cell):
            assert after.source.startswith("checks.check(") and not after.metadata.get("tags")
    assert any(re.search(r"^\w.* = \.\.\.(, \.\.\.)?  # ", cell.source, re.MULTILINE) for cell in found)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_both_notebooks_are_made_the_same_every_time_and_are_valid(page: Path) -> None:
    made = notebooks.made(page)
    assert made == notebooks.made(page)
    assert made.keys() == {"student", "teacher"}
    for data in made.values():
        nbformat.validate(nbformat.reads(data.decode(), as_version=4))
        assert not re.search(rb"\{(ref|admonition|note|math)\}|^\(|\)=\\n", data)


def executed(page: Path, kind: Callable[[Any], Any], folder: Path) -> Any:
    """A notebook after a kernel has run it, up to the first error."""
    notebook = kind(jupytext.read(page))
    with contextlib.suppress(nbclient.exceptions.CellExecutionError):
        nbclient.NotebookClient(
            notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_teacher_s_notebook_runs_to_its_end(page: Path, tmp_path: Path) -> None:
    made = executed(page, notebooks.teacher, tmp_path)
    outputs = [output for cell in code(made) for output in cell.outputs]
    assert [output.evalue for output in outputs if output.output_type == "error"] == []
    assert all(cell.execution_count for cell in code(made))
    assert "Computing in this lab" in outputs[-1].text
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert list(tmp_path.iterdir()) == []  # neither records nor checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_student_s_notebook_stops_at_its_first_check(page: Path, tmp_path: Path) -> None:
    made = executed(page, notebooks.student, tmp_path)
    first = next(index for index, cell in enumerate(code(made)) if cell.source.startswith("checks.check("))
    errors = [
        (index, output)
        for index, cell in enumerate(code(made))
        for output in cell.outputs
        if output.output_type == "error"
    ]
    ((index, error),) = errors
    assert index == first
    assert error.ename == "NotYet" and "still the stub" in error.evalue
    assert error.traceback == [f"NotYet: {error.evalue}"] and "\n" not in error.evalue


# Files


def test_the_command_writes_both_kinds_and_keeps_what_was_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "course"
    assert main(["labs", "--folder", str(folder)]) == 0
    files = sorted(folder.rglob("*.ipynb"))
    assert [path.relative_to(folder).as_posix() for path in files] == [
        f"{kind}/{name}.ipynb" for kind in ("student", "teacher") for name in NAMES
    ]
    assert len(capsys.readouterr().out.splitlines()) == 14
    before = {path: path.read_bytes() for path in files}

    files[0].write_text("my work")
    files[1].unlink()
    assert main(["labs", "--folder", str(folder)]) == 2
    said = capsys.readouterr().err
    assert files[0].name in said and "--replace" in said and "Traceback" not in said
    assert files[0].read_text() == "my work" and not files[1].exists()

    assert main(["labs", "--folder", str(folder), "--replace"]) == 0
    assert {path: path.read_bytes() for path in files} == before


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["labs", "--folder", str(tmp_path / "file")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
