"""How far a reader has to go: the lines of the files that the README names, and of all functions that one round of a
method enters."""

import ast
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from known_answers import CASES, TINY

from fedlib.engines.in_process import InProcess
from fedlib.methods.registry import METHODS
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec

ROOT = Path(__file__).parents[1]
WITHIN = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")  # lines of a function that is entered itself
# Lines that one round may enter, by short run. Whoever needs more looks for the simpler design first.
BUDGET = {
    "fedavg": 590,
    "drive": 710,
    "eden fed back": 710,
    "fedcompress": 1110,  # two phases, distillation at the server, and a score: the longest way of all
    "feddq": 830,
    "fedmrn": 740,
    "fedpm": 840,
    "fedpt": 615,
    "fedsparsify": 750,
    "fedzip": 930,
    "signsgd": 665,
    "signvote": 640,
    "terngrad": 810,
    "topk": 810,
}


def test_the_stops_that_the_readme_names_are_short() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Where to read\n")[1].split("\n## ")[0]
    stops = [re.findall(r"`([\w/]+\.py)`", line) for line in section.splitlines() if re.match(r"\d\. ", line)]
    assert len(stops) == 4 and all(stops)
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in itertools.chain(*stops)]
    found = sum(1 for text in texts for line in text.splitlines() if line.strip())
    print(f"the README's stops: {found} lines")
    assert found < 700


def entered(run: Callable[[], Any]) -> set[CodeType]:
    """The functions of fedlib that are called."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT / "fedlib")) and code.co_name not in WITHIN:
            found.add(code)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def lines(codes: set[CodeType]) -> int:
    """Lines of code of all these functions, without docstrings, comments and blank lines; nested ones count once."""
    places: set[tuple[str, int]] = set()
    for code in codes:
        source, first = inspect.getsourcelines(code)
        kept = {first + n for n, line in enumerate(source) if line.strip() and not line.strip().startswith("#")}
        if code.co_consts and isinstance(code.co_consts[0], str) and code.co_consts[0].strip():  # a docstring, if first
            tree = ast.parse(textwrap.dedent("".join(source)))
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                    text = node.body[0]
                    kept -= {first + n - 1 for n in range(text.lineno, (text.end_lineno or text.lineno) + 1)}
        places |= {(code.co_filename, line) for line in kept}
    return len(places)


def test_every_method_has_a_budget() -> None:
    assert {Spec.from_dict(TINY | CASES[name]).method for name in BUDGET} == METHODS.keys()


@pytest.mark.parametrize("name", BUDGET)
def test_a_round_stays_within_its_budget(name: str) -> None:
    spec = Spec.from_dict(TINY | CASES[name] | {"rounds": 1})
    engine = InProcess(torch.device("cpu"))
    job = build.job(spec, engine.device)
    state = rounds.initial(job)
    found = lines(entered(lambda: rounds.one_round(spec, job, engine, state, 1, {}, {})))
    print(f"{name}: {found} lines")
    assert found <= BUDGET[name]
