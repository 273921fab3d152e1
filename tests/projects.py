"""A project of a test's own, changes to its files, and commands that it must refuse."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ROOT
from ruamel.yaml import YAML

from fedlib.__main__ import main
from fedlib.errors import SpecError
from fedlib.runs import build, rounds
from fedlib.runs.experiments import specs

Refused = Callable[..., str]
Edit = Callable[[dict[str, Any]], object]

DIGITS = {"data": "digits", "model": "mlp", "clients": 10, "cohort": 3, "rounds": 2, "batch": 64, "evaluate_every": 1}
MAIN = "profiles/smoke/main"
HERE = f"{MAIN}/settings"
RUN = ("run", "fedmrn", "--profile", "smoke", "--engine", "process", "--device", "cpu")


def copy_to(root: Path) -> None:
    """The real experiments, claims and pages, but no data and no records."""
    for folder in ("experiments", "published", "notebooks", "bench/results"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "params.yaml", root)


def small(root: Path, **pages: str) -> None:
    """The same with FedMRN alone, two runs of two rounds on digits, and with these pages."""
    copy_to(root)
    for file in (*root.glob("experiments/*.yaml"), *root.glob("published/*.yaml")):
        if file.stem != "fedmrn":
            file.unlink()
    edit(root, put("profiles/smoke", {"main": group()}))
    for name, cell in pages.items():
        (root / "notebooks" / f"{name}.md").write_text(PAGE.format(cell))


# A page with a single cell
PAGE = """---
kernelspec: {{display_name: Python 3, language: python, name: python3}}
---

```{{code-cell}} ipython3
:tags: [parameters]

profile = "lab"
```

```{{code-cell}} ipython3
{}
```
"""


def group(**settings: Any) -> dict[str, Any]:
    """Two runs of two rounds on digits."""
    labels = ["fedavg", "fedmrn-binary"]
    return {"methods": labels, "partitions": ["iid"], "seeds": [0], "settings": DIGITS | settings}


SETTINGS = dict(data="digits", model="mlp", clients=10, cohort=2, rounds=2, epochs=1, batch=64, evaluate_every=1)
MASKED = {"mask": "signed", "magnitude": 0.05}
METHODS: dict[str, Any] = {
    "plain": {"method": "fedavg", "lr": 0.1, "hyper": {}, "source": "test"},
    "masked": {"method": "fedmrn", "lr": 0.2, "hyper": MASKED, "source": "test", "paper": "x"},
}
PARTITIONS = {"iid": {"kind": "iid", "seed": 5}, "skew": {"kind": "dirichlet", "beta": 0.3}}


def write(root: Path, name: str = "main", *changes: Edit, **own: Any) -> None:
    """A file of experiments, called tiny, of which profile smoke has one group; `own`: what that says."""
    content = {
        "settings": {name: {"unit": "", "source": "test", "smoke": value} for name, value in SETTINGS.items()},
        "methods": copy.deepcopy(METHODS),
        "partitions": copy.deepcopy(PARTITIONS),
        "profiles": {"smoke": {name: {"methods": ["plain"], "partitions": ["iid"], "seeds": [0]} | own}},
    }
    for change in changes:
        change(content)
    (root / "experiments").mkdir(exist_ok=True)
    YAML().dump(content, root / "experiments" / "tiny.yaml")


def objection(root: Path, *changes: Edit) -> str:
    """What is said against the runs of `tiny` after these changes; they are made ready, and never trained."""
    write(root, "main", *changes, methods=["plain", "masked"], settings={"rounds": 1})
    with pytest.raises(SpecError) as refusal:
        for spec in specs("tiny", "smoke", root=root):
            rounds.initial(build.job(spec, torch.device("cpu")))
    return str(refusal.value)


def edit(root: Path, change: Edit, folder: str = "experiments") -> None:
    """Change FedMRN's file."""
    file = root / folder / "fedmrn.yaml"
    content = YAML(typ="safe").load(file.read_text())
    change(content)
    YAML().dump(content, file)


def put(path: str, value: Any) -> Edit:
    """Set one value in the nested mappings and lists; `path` is separated by slashes."""
    return _at(path, lambda inner, last: inner.__setitem__(last, value))


def cut(path: str) -> Edit:
    return _at(path, lambda inner, last: inner.pop(last))


def _at(path: str, act: Callable[[Any, Any], object]) -> Edit:
    def change(content: Any) -> None:
        *steps, last = path.split("/")
        for step in steps:
            content = content[int(step) if isinstance(content, list) else step]
        act(content, int(last) if isinstance(content, list) else last)

    return change


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refusal(root: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """Standard error of a command that must end with status 2 and write nothing."""
    before = files(root)
    try:
        status: Any = main(list(arguments))
    except SystemExit as end:  # argparse
        status = end.code
    said = capsys.readouterr().err
    assert status == 2, said
    assert said.strip() and "Traceback" not in said
    assert files(root) == before
    return said
