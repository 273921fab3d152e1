"""The digest of the code: it sees all that a run executes, and nothing that only moves or is laid out anew."""

import ast
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from jobs import CPU
from known_answers import CASES, TINY

from fedlib.engines.in_process import InProcess
from fedlib.methods import registry
from fedlib.models.registry import MODELS
from fedlib.runs import build, rounds, statements
from fedlib.runs.digest import INERT, PACKAGE, code_digest, reached
from fedlib.runs.spec import Spec
from fedlib.runs.statements import Statement


def choice(name: str) -> tuple[str, str, str, str]:
    """Method, network, data set and downlink of a short run."""
    spec = Spec.from_dict(TINY | CASES[name])
    return spec.method, spec.model, spec.data, (spec.downlink or {}).get("method", "")


def told(name: str, package: Path = PACKAGE) -> str:
    return code_digest(*choice(name), package=package)


NAMES = list({choice(name): name for name in CASES}.values())  # one for each choice
BEFORE = {name: told(name) for name in NAMES}
FILES = {statement.module for name in NAMES for statement in reached(*choice(name))}


def source(module: str) -> Path:
    return statements.source_of(module, PACKAGE)


# What a run executes


def place(code: Any) -> tuple[str, str, int]:
    """Module, name at its top level and line of a function."""
    parts = Path(code.co_filename).relative_to(PACKAGE.parent).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")
    return module, code.co_qualname.partition(".")[0], code.co_firstlineno


def executed(spec: Spec) -> set[tuple[str, str, int]]:
    """The functions of fedlib that a run enters; what a part that is named as inert calls for itself left out."""
    met: set[tuple[str, str, int]] = set()

    def ours(frame: Any) -> bool:
        return bool(frame.f_code.co_filename.startswith(str(PACKAGE)))

    def inert(frame: Any) -> bool:
        module, name, _ = place(frame.f_code)
        return f"{module}.{name}" in INERT or any(module == key or module.startswith(f"{key}.") for key in INERT)

    def note(frame: Any, event: str, argument: Any) -> None:
        if event != "call" or not ours(frame) or (at := place(frame.f_code)) in met:
            return
        caller = frame
        while caller is not None:
            if ours(caller) and inert(caller):
                return
            caller = caller.f_back
        met.add(at)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_load", build._load.__wrapped__)  # the data is read for every run
        sys.setprofile(note)
        try:
            rounds.run(spec, InProcess(CPU), root=Path(folder))
        finally:
            sys.setprofile(None)
    return met


@pytest.mark.parametrize("name", CASES)
def test_all_that_a_run_executes_is_hashed_or_named_as_inert(name: str) -> None:
    hashed = {(s.module, line) for s in reached(*choice(name)) for line in s.lines}
    ran = executed(Spec.from_dict(TINY | CASES[name]))
    assert len(ran) > 40
    assert not {at for at in ran if (at[0], at[2]) not in hashed}


# A change makes stale exactly what it can change


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the source, which the digest is taken of; the code that runs stays as it is."""
    copy = tmp_path / "fedlib"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def mutated(file: Path, statement: Statement) -> str:
    """The file's source, with one more expression in that statement."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (node,) = [n for n in tree.body if n.lineno in statement.lines]
    more = ast.parse("'changed'.upper()").body[0]
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        node.body.append(more)
    elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        node.value = ast.Tuple([node.value, ast.Constant("changed")], ast.Load())
    else:
        tree.body.append(more)
    return ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_changed_statement_makes_stale_the_runs_that_reach_it_and_no_others(package: Path, module: str) -> None:
    users: dict[Statement, set[str]] = defaultdict(set)
    for name in NAMES:
        for statement in reached(*choice(name)):
            if statement.module == module:
                users[statement].add(name)
    file = statements.source_of(module, package)
    statement = max(users, key=lambda s: (len(users[s]) < len(NAMES), len(s.text)))  # if possible one not used by all
    file.write_text(mutated(file, statement), encoding="utf-8")
    assert {name for name in NAMES if told(name, package) != BEFORE[name]} == users[statement]


def test_what_one_method_does_is_no_other_s_affair() -> None:
    used = {name: {s.module for s in reached(name, "mlp", "digits")} for name in registry.METHODS}
    assert not any("feddq" in module for module in used["fedmrn"])
    assert not any("fedmrn" in module for module in used["feddq"])
    assert "fedlib.wire.entropy" in used["topk"] - used["fedavg"]


@pytest.mark.parametrize(
    "old, new",
    [
        ("sum(column) / sum(counts) for", "sum(column) / sum(counts) + 0.01 for"),
        ('Rng(job.seed).child("server")', 'Rng(job.seed).child("other")'),
        ("is None else deviation", "is None else 2 * deviation"),
        ('Rng(job.seed).child("client", round, client)', 'Rng(job.seed).child("client", client)'),
        ("return MODELS[name](channels, side, classes, root)", "return MODELS[name](channels, side, classes, Rng(0))"),
    ],
    ids=["mean of an evaluation", "first state", "deviation", "a client's draws", "builder of networks"],
)
def test_a_changed_formula_cannot_hide(package: Path, old: str, new: str) -> None:
    file = next(f for f in package.rglob("*.py") if old in f.read_text(encoding="utf-8"))
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    for name in registry.METHODS:
        assert code_digest(name, "cnn4", "digits", package=package) != code_digest(name, "cnn4", "digits")


def test_another_choice_in_a_table_is_another_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: code_digest(name, "cnn4", "digits") for name in registry.METHODS}
    monkeypatch.setitem(registry.METHODS, "fednew", registry.METHODS["fedavg"])
    assert {name: code_digest(name, "cnn4", "digits") for name in before} == before
    monkeypatch.setitem(registry.METHODS, "fedavg", registry.METHODS["topk"])
    assert code_digest("fedavg", "cnn4", "digits") == before["topk"] != before["fedavg"]
    monkeypatch.setitem(MODELS, "cnn4", MODELS["cnn2"])
    assert code_digest("eden", "cnn4", "digits") != before["eden"]


def test_a_network_made_by_a_function_counts_with_what_that_was_given() -> None:
    assert len({code_digest("fedavg", f"emnist-hidden{h}", "digits") for h in (8, 32, 512)}) == 3


def test_networks_data_and_downlinks_count_where_they_are_used() -> None:
    assert code_digest("fedpm", "mlp256", "digits") != code_digest("fedpm", "conv6", "digits")
    assert code_digest("fedpm", "mlp", "digits") != code_digest("fedpm", "mlp", "fashion-mnist")
    assert len({code_digest("eden", "mlp", "digits", writer) for writer in ("", "feddq", "fedcompress")}) == 3


# A move makes nothing stale


def test_another_layout_of_all_files_makes_nothing_stale(package: Path) -> None:
    for file in package.rglob("*.py"):  # comments gone, docstrings kept, every line laid out anew
        file.write_text(ast.unparse(ast.parse(file.read_text(encoding="utf-8"))), encoding="utf-8")
    assert {name: told(name, package) for name in NAMES} == BEFORE


def test_a_function_may_move_to_another_file(package: Path) -> None:
    file = next(f for f in package.rglob("*.py") if "\ndef positive(" in f.read_text(encoding="utf-8"))
    text = file.read_text(encoding="utf-8")
    (node,) = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "positive"]
    lines = text.splitlines(keepends=True)
    moved = "".join(lines[node.lineno - 1 : node.end_lineno])
    (package / "elsewhere.py").write_text(f"import torch\nfrom torch import Tensor\n\n\n{moved}", encoding="utf-8")
    left = (
        "".join(lines[: node.lineno - 1])
        + "from fedlib.elsewhere import positive\n"
        + "".join(lines[node.end_lineno :])
    )
    file.write_text(left, encoding="utf-8")
    for name in ("fedmrn", "fedpm"):
        assert code_digest(name, "mlp", "digits", package=package) == code_digest(name, "mlp", "digits")
    changed = (package / "elsewhere.py").read_text(encoding="utf-8").replace("relu", "abs")
    (package / "elsewhere.py").write_text(changed, encoding="utf-8")
    assert code_digest("fedmrn", "mlp", "digits", package=package) != code_digest("fedmrn", "mlp", "digits")


# What the digest leaves out


def without_value(node: ast.FunctionDef) -> bool:
    return not any(isinstance(part, ast.Return) and part.value is not None for part in ast.walk(node))


def test_what_raises_gives_no_value() -> None:
    tree = ast.parse(source("fedlib.errors").read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert functions and all(without_value(node) for node in functions)


def test_everything_that_is_left_out_exists_and_has_a_reason() -> None:
    for name, reason in INERT.items():
        module, _, own = name.rpartition(".")
        assert reason and (source(name).exists() or hasattr(sys.modules[module], own)), name
