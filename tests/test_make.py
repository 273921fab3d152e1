"""The Makefile in folders such as readers have: with spaces and accents, without Git, inside another repository.

A stand-in for Python makes a stand-in environment, whose programs write down what they are asked for.
"""

import os
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest
from common import ROOT

FOLDER = Path("Mes études") / "fed book"
STAND_IN = """#!/bin/sh
if [ "$2" = venv ]; then
  mkdir -p "$3/bin"
  for program in python pip dvc ruff mypy jupyter-book; do
    printf '#!/bin/sh\\necho "%s $*" >> "$SAID"\\n' $program > "$3/bin/$program"
    chmod +x "$3/bin/$program"
  done
fi
"""
TARGETS = {
    "env": "pip install --no-deps",
    "data": "data get fashion-mnist",
    "extra": "data get spoken-digits",
    "book": "dvc repro",
    "smoke": "dvc repro",
    "lab": "dvc repro",
    "labs": "fedlib labs",
    "check": "python -m pytest -n 2",
    "bench": "python bench/entropy.py",
    "portable": "python -m pytest -n 2",
    "links": "jupyter-book build book --builder linkcheck",
    "dist": "setuptools.build_meta",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tracked files without records, as a downloaded archive has them."""
    whole = tmp_path / FOLDER
    names = subprocess.run(["git", "-C", ROOT, "ls-files", "-z", "--", ":!records"], capture_output=True, check=False)
    if names.returncode:
        pytest.skip("this is no clone")
    for name in filter(None, names.stdout.decode().split("\0")):
        target = whole / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    stand_in = tmp_path / "python-stand-in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return whole


@pytest.fixture
def built(folder: Path) -> Path:
    """With a book of one page, a record to keep, and one that is not."""
    for name in ("book/_build/html/_sources/index.md", "book/_build/html/index.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for profile in ("lab", "smoke"):
        record = folder / "records" / "fedmrn" / profile / "one.json"
        record.parent.mkdir(parents=True)
        record.write_text(profile)
    return folder


def make(folder: Path, target: str) -> str:
    """What the stand-in programs were asked for."""
    base = folder.parents[1]
    env = {k: v for k, v in os.environ.items() if k not in ("FEDLIB_HOME", "PYTHONPATH", "MAKEFLAGS", "VIRTUAL_ENV")}
    command = ["make", target, f"PYTHON={base / 'python-stand-in'}"]
    done = subprocess.run(
        command, cwd=folder, env=env | {"SAID": str(base / "said")}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = base / "said"
    return said.read_text() if said.exists() else ""


@pytest.mark.parametrize("target", TARGETS)
def test_targets_work_in_a_folder_with_spaces_and_accents(built: Path, target: str) -> None:
    assert TARGETS[target] in make(built, target)


def test_dist_packs_the_book_and_the_records(built: Path) -> None:
    make(built, "dist")
    packed = {}
    for file in (built / "dist").iterdir():
        with tarfile.open(file) as archive:
            packed[file.name] = {member.name for member in archive if member.isfile()}
    book, records = sorted(packed)
    stem = f"fedlib-{tomllib.loads((built / 'pyproject.toml').read_text())['project']['version']}"
    assert (book, records) == (f"{stem}-book.tar.gz", f"{stem}-records.tar.gz")
    assert packed[book] == {f"{stem}-book/index.html", f"{stem}-book/_sources/index.md"}
    assert {f"{stem}-records/{name}" for name in ("LICENSE", "records/fedmrn/lab/one.json")} <= packed[records]
    assert not any("smoke" in name for name in packed[records])


def test_publish_pushes_the_book_and_nothing_else(built: Path) -> None:
    """Twice, the second time with a page less; checkout and index stay as they were."""

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=One", "-c", "user.email=one@localhost"]
        return subprocess.run(["git", *who, *arguments], cwd=built, check=True, capture_output=True, text=True).stdout

    remote = built.parents[1] / "remote.git"
    git("init", "-q", "--bare", str(remote))
    git("init", "-q", "-b", "main")
    git("remote", "add", "origin", str(remote))
    git("add", "README.md")
    git("commit", "-q", "-m", "First")
    git("add", "LICENSE")
    for pages in ({"_sources/index.md", "index.html"}, {"index.html"}):
        make(built, "publish")
        assert set(git("-C", str(remote), "ls-tree", "-r", "--name-only", "gh-pages").split()) == pages | {".nojekyll"}
        assert git("-C", str(remote), "log", "--format=%an", "gh-pages") == "One\n"
        assert git("branch", "--format=%(refname:short)") == "main\n"
        assert git("diff", "--cached", "--name-only") == "LICENSE\n"
        (built / "book/_build/html/_sources/index.md").unlink(missing_ok=True)


def test_publish_without_a_book_says_what_to_do(folder: Path) -> None:
    done = subprocess.run(["make", "publish"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode and "make book" in done.stderr


@pytest.mark.parametrize("around", ["no repository", "one that ignores it", "its own"])
def test_smoke_copies_the_project_with_git_and_without(folder: Path, around: str) -> None:
    home = {"no repository": None, "one that ignores it": folder.parents[1], "its own": folder}[around]
    if home:
        subprocess.run(["git", "init", "-q", home], check=True)
    if home == folder.parents[1]:
        (home / ".gitignore").write_text("*\n")
    (folder / "records").mkdir()
    (folder / "records" / "one.json").write_text("{}")
    make(folder, "smoke")
    copied = folder / ".smoke"
    assert (copied / "fedlib" / "runs" / "rounds.py").is_file() and (copied / "dvc.yaml").is_file()
    assert "profile: smoke" in (copied / "params.yaml").read_text()
    assert not (copied / "records").exists() and not (copied / ".venv").exists()
    assert (copied / "data").is_symlink()
    make(folder, "smoke")
    assert not (copied / ".smoke").exists(), "a copy holds none of the copy before"
