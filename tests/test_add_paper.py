"""What the book says of adding a paper is what this repository looks like, with FedCompress for the paper."""

import re

import pytest
from common import ROOT
from test_environment import files

from fedlib.claims import score
from fedlib.core.method import Method, ModelWriter
from fedlib.methods import registry
from fedlib.methods.update_codec import UpdateCodec

PAGE = (ROOT / "book" / "start" / "add-a-paper.md").read_text()


def table(heading: str) -> list[str]:
    """The files in the first column of the table under a heading."""
    part = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE)


@pytest.mark.parametrize("paper", score.scored())
@pytest.mark.parametrize("name", table("Files of its own"))
def test_files_of_its_own(name: str, paper: str) -> None:
    assert "<paper>" in name
    places = (name, name.replace(".py", "/method.py"))  # a method of several modules has a folder
    assert any(list(ROOT.glob(place.replace("<paper>", paper).rstrip("/"))) for place in places)


@pytest.mark.parametrize("paper", score.scored())
@pytest.mark.parametrize("name", table("Files that name it"))
def test_files_that_name_it(name: str, paper: str) -> None:
    assert paper in (ROOT / name).read_text().lower()


def test_the_functions_that_a_method_must_have_are_on_the_page() -> None:
    named = re.findall(r"^\| `(\w+)` \| (?:server|client) \|", PAGE, re.MULTILINE)
    assert len(named) == 5 and set(named) == Method.__abstractmethods__
    assert UpdateCodec.__abstractmethods__ == {"encode", "decode"}


def test_every_file_that_names_all_papers_is_on_the_page() -> None:
    made = ("records/", "bench/results/", "scores/")
    chosen = (
        "experiments/compare.yaml",
        "notebooks/compare.md",
        "book/labs/",
        "tests/malformed.py",
    )  # need not have a sixth
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(errors="replace") for path in files()}
    named = {
        name
        for name, text in texts.items()
        if not name.startswith((*made, *chosen)) and all(re.search(rf"\b{paper}\b", text) for paper in score.scored())
    }
    assert named <= set(table("Files that name it"))


def test_all_that_a_method_may_have_is_on_the_page() -> None:
    shape = vars(Method) | vars(ModelWriter)
    hooks = {name for method in registry.METHODS.values() for name in vars(method) if name in shape and name[0] != "_"}
    assert {"broadcast", "phases", "check_writer"} <= hooks
    assert {hook for hook in hooks if f"`{hook}`" not in PAGE} == set()


def test_other_files_on_the_page_are_there() -> None:
    named = set(re.findall(r"`((?:fedlib|tests|bench|book|published|experiments)/[\w./-]+)`", PAGE))
    assert len(named) > 20
    assert {name for name in named if not (ROOT / name).exists()} == set()
