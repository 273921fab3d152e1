"""The Makefile in folders such as readers have: with spaces and accents, without Git, inside another repository.

A stand-in for Python makes a stand-in environment, whose programs write down what they are asked for.
"""

import os
import shutil
import subprocess
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


def make(folder: Path, target: str) -> str:
    """What the stand-in programs were asked for."""
    base = folder.parents[1]
    env = {k: v for k, v in os.environ.items() if k not in ("FEDLIB_HOME", "PYTHONPATH", "MAKEFLAGS", "VIRTUAL_ENV")}
    command = ["make", target, f"PYTHON={base / 'python-stand-in'}"]
    done = subprocess.run(
        command, cwd=folder, env=env | {"SAID": str(base / "said")}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return (base / "said").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_targets_work_in_a_folder_with_spaces_and_accents(folder: Path, target: str) -> None:
    assert TARGETS[target] in make(folder, target)


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
