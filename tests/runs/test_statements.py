"""The text of a statement: equal for equal code however it is laid out, on every Python."""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlib.runs import statements
from fedlib.runs.digest import PACKAGE

MODULES = statements.modules_of(PACKAGE)
SOURCE = '''"""Head."""

import math  # needed


def area(r: float, k: int = 2) -> float:
    """Area of a circle.

    r: in metres
    """
    # the formula
    import os

    return math.pi * r**k  # r squared


class Circle:
    """Round."""

    label: str = "not # a comment"
    text = """not a docstring"""

    def method(self) -> None:
        "Docstring of one line."
        return None
'''


def texts(code: str) -> list[str]:
    return sorted(s.text for s in statements.parsed("fedlib.example", code, MODULES)[0])


@pytest.mark.parametrize(
    "old, new",
    [
        ("  # r squared", ""),
        ("    # the formula\n", "\n\n    # one\n\n    # two\n"),
        ("Area of a circle.", "Área of a “disc” # no comment"),
        ('"""Head."""', '"""Longer\n\nhead."""'),
        ("\n\n\n", "\n"),
        ("import os", "import os.path"),
        ("r: float, k: int", "r: int, k: float"),
        ("return math.pi * r**k", "return (\n        math.pi * r**k\n    )"),
        ("(r: float, k: int = 2)", "(\n    r: float,\n    k: int = 2,\n)"),
        ('"not # a comment"', "'not # a comment'"),
        ("label: str", "label: object"),
    ],
)
def test_layout_comments_docstrings_and_annotations_change_no_text(old: str, new: str) -> None:
    assert old in SOURCE
    assert texts(SOURCE.replace(old, new)) == texts(SOURCE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("r**k", "r**3"),
        ("k: int = 2", "k: int = 3"),
        ("k: int = 2", "*, k: int = 2"),
        ("math.pi", "math.e"),
        ("not # a comment", "not # the same"),
        ("not a docstring", "changed"),
        ("    return None", "return None"),
        ("label: str", "label: ClassVar[str]"),
        ("label: str =", "label ="),
        ("def method", "@property\n    def method"),
    ],
)
def test_every_other_edit_changes_the_text(old: str, new: str) -> None:
    assert old in SOURCE
    with contextlib.suppress(IndentationError):  # an unreadable file has no text at all
        assert texts(SOURCE.replace(old, new)) != texts(SOURCE)


@pytest.mark.parametrize(
    "code",
    [
        'def f(x): "doc"; return x * 2\n',
        'def f(x, y=x * 2):\n    """doc"""\n',
        "a = 1\n\x0c\n# comment\nb = x * 2  # comment\n",
        'a = f"{x * 2}"  # comment\n',
        "f = lambda x: x * 2\n",
        "a = [x * 2 for x in y if x]\n",
        "if x:\n    pass\nelif x * 2:\n    pass\n",
        "@decorated(x * 2)\ndef f(): ...\n",
        "def f(*, y=x * 2): ...\n",
        "match x:\n    case 1:\n        y = x * 2\n",
    ],
)
def test_no_layout_hides_a_formula(code: str) -> None:
    assert texts(code) != texts(code.replace("x * 2", "x * 3"))


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=40))
def test_no_comment_changes_the_text(comment: str) -> None:
    assert texts(f"a = '#'  #{comment}\nb = 2\n") == texts("a = '#'\nb = 2\n")


def test_a_local_variable_reaches_nothing_of_its_name() -> None:
    code = "def f(count):\n    return count, [width for width in count], other\n"
    (statement,) = statements.parsed("fedlib.example", code, MODULES)[0]
    assert {place.name for place in statement.reaches} == {"other"}


def other_pythons() -> dict[str, str]:
    """Interpreters of other versions that start; one that is a shim (pyenv) is looked up beside its shim."""
    found = {}
    for version in ("3.11", "3.12", "3.13", "3.14"):
        on_path = shutil.which(f"python{version}")
        if f"{sys.version_info.major}.{sys.version_info.minor}" == version or not on_path:
            continue
        beside = sorted(Path(on_path).parents[1].glob(f"versions/{version}*/bin/python{version}"))
        for candidate in (on_path, *map(str, beside)):
            if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
                found[version] = candidate
                break
    return found


PROGRAM = """
import hashlib, importlib.util, json, pathlib, sys
here = pathlib.Path(sys.argv[1])
loaded = importlib.util.spec_from_file_location("statements", here)
module = importlib.util.module_from_spec(loaded)
sys.modules["statements"] = module
loaded.loader.exec_module(module)
for name in sys.argv[2:]:
    found, _ = module.parsed("fedlib.example", open(name, encoding="utf-8").read(), frozenset())
    print(hashlib.sha256(json.dumps(sorted(s.text for s in found)).encode()).hexdigest())
"""


def test_every_python_gives_the_same_texts(tmp_path: Path) -> None:
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python (3.11 to 3.14) on PATH: that digests agree between versions stays UNTESTED here")
    awkward = tmp_path / "awkward.py"
    awkward.write_text(SOURCE + "a = f'{1:#x} # {2!r:>{3}}' 'b' f'{4}'  # comment\n", encoding="utf-8")
    names = [str(name) for name in (*sorted(PACKAGE.rglob("*.py")), awkward)]
    said = {}
    for version, python in (pythons | {"this": sys.executable}).items():
        command = [python, "-c", PROGRAM, str(statements.source_of("fedlib.runs.statements", PACKAGE)), *names]
        said[version] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(said["this"]) == len(names) > 20
    for version, hashes in said.items():
        different = [name for name, one, other in zip(names, hashes, said["this"], strict=True) if one != other]
        assert not different, version
