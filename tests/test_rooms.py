"""The house has floors: an import goes down, never up, and in no circle."""

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedlib"
# From the ground up: a room may use those below its floor, and itself.
FLOORS = (
    {"errors", "philox_kernel"},
    {"rng"},
    {"wire", "data", "models"},
    {"core"},
    {"methods", "engines"},
    {"runs"},
    {"claims", "theory", "own"},
    {"pages"},
    {"labs"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def imported(file: Path) -> Iterator[str]:
    """The modules of fedlib that a file imports, within functions and for types too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fedlib":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fedlib")


def room(module: str) -> str:
    return module.split(".")[1]


def arrows() -> Iterator[tuple[str, str]]:
    for module, file in MODULES.items():
        yield from ((module, other) for other in imported(file) if other != module and module != "fedlib")


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES if module != "fedlib"} == FLOOR.keys()


def test_no_import_goes_up_or_across() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, other in arrows()
        if room(module) != room(other) and FLOOR[room(module)] <= FLOOR[room(other)]
    ]
    assert not wrong


def test_no_imports_run_in_a_circle() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, other in arrows():
        graph[module].add(other)
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize(
    "module", [name for name, file in MODULES.items() if file.name == "__init__.py" and name != "fedlib"]
)
def test_a_room_s_door_holds_one_sentence(module: str) -> None:
    (sentence,) = ast.parse(MODULES[module].read_text(encoding="utf-8")).body
    assert isinstance(sentence, ast.Expr) and isinstance(sentence.value, ast.Constant)
    assert str(sentence.value.value).strip().endswith(".")


@pytest.mark.parametrize("module", [name for name in MODULES if ".labs" not in name])  # there anything is handed in
def test_nothing_is_probed(module: str) -> None:
    """What may be there and what must is a matter of types; whether the system has something is not."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            text = ast.unparse(node)
            assert text.startswith("hasattr(os,"), f"line {node.lineno}: {text}"
        assert not (isinstance(node, ast.Name) and node.id == "ModuleType"), f"line {node.lineno}"


def test_training_loads_neither_pages_nor_figures() -> None:
    program = "import sys, fedlib.runs.grid; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "fedlib.runs.rounds" in loaded
    upper = {f"fedlib.{name}" for rooms in FLOORS[FLOOR["runs"] + 1 :] for name in rooms}
    assert not loaded & {*upper, "matplotlib", "seaborn", "pandas", "IPython", "papermill", "dvc"}
