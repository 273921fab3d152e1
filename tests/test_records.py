"""Records: what makes one stale, what it holds, and that its bytes are those that were really passed."""

import ast
import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlib.data import sets
from fedlib.engines import in_process
from fedlib.engines.in_process import InProcess, Memories
from fedlib.methods import registry
from fedlib.runs import record, rounds
from fedlib.runs.record import essence
from fedlib.runs.spec import Spec

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]


def run(spec: Spec, root: Path, engine: Any = None) -> record.Record:
    return rounds.run(spec, engine or InProcess(CPU), root=root)


# Freshness


@pytest.fixture
def kept(tiny: MakeSpec, tmp_path: Path) -> tuple[Spec, record.Record]:
    """A spec and its saved record, read back."""
    spec = tiny()
    rounds.load_or_run(spec, InProcess(CPU), root=tmp_path)
    found = record.load(spec, tmp_path)
    assert found and record.stale(found, spec) == ""
    return spec, found


@pytest.mark.parametrize(
    "field, value",
    [
        *[("seed", 1), ("lr", 0.2), ("rounds", 4), ("epochs", 2), ("batch", 16), ("clients", 11), ("cohort", 3)],
        *[("evaluate_every", 1), ("method", "fedmrn"), ("model", "cnn2"), ("data", "fashion-mnist")],
        *[("partition", {"kind": "iid", "seed": 2}), ("label", "other"), ("optimizer", "adam")],
    ],
)
def test_another_spec_makes_a_record_stale(
    tiny: MakeSpec, kept: tuple[Spec, record.Record], field: str, value: Any
) -> None:
    assert re.search(rf"spec differs in {field}\b", record.stale(kept[1], tiny(**{field: value})))


def test_other_hyper_parameters_make_a_record_stale(tiny: MakeSpec, tmp_path: Path) -> None:
    found = run(tiny(method="fedmrn", hyper={"magnitude": 0.01}), tmp_path)
    assert record.stale(found, tiny(method="fedmrn", hyper={"magnitude": 0.01})) == ""
    assert "hyper" in record.stale(found, tiny(method="fedmrn", hyper={"magnitude": 0.02}))


@pytest.mark.parametrize(
    "key, words", [("data", "data set differs"), ("code", "code has changed"), ("format", "format")]
)
def test_other_data_code_or_format_makes_a_record_stale(kept: tuple[Spec, record.Record], key: str, words: str) -> None:
    spec, found = kept
    assert words in record.stale(found | {key: "other"}, spec)
    assert words in record.stale({k: v for k, v in found.items() if k != key}, spec)


def test_a_field_that_a_record_is_too_old_to_have_stands_for_its_default(
    tiny: MakeSpec, kept: tuple[Spec, record.Record]
) -> None:
    spec, found = kept
    old = found | {"spec": {k: v for k, v in found["spec"].items() if k not in ("sampling", "held_out")}}
    assert record.stale(old, spec) == ""
    assert "spec differs in sampling" in record.stale(old, tiny(sampling="spaced"))
    assert "spec differs in lr" in record.stale(
        found | {"spec": {k: v for k, v in old["spec"].items() if k != "lr"}}, spec
    )


def test_every_reason_is_told(tiny: MakeSpec, kept: tuple[Spec, record.Record]) -> None:
    reason = record.stale(kept[1] | {"data": "other", "code": "other"}, tiny(lr=0.2, batch=16))
    assert all(words in reason for words in ("lr", "batch", "data", "code"))


def test_a_change_of_the_data_set_s_entry_is_another_data_set() -> None:
    entry = sets.ENTRIES["digits"]
    changed: list[dict[str, Any]] = [
        {"mean": (0.4,)},
        {"std": (0.4,)},
        {"scale": 15.0},
        {"version": 2},
        {"shipped": "sha256:0"},
        {"files": (("a", "sha256:0"),)},
    ]
    digests = {sets.digest(sets.Entry(**(vars(entry) | change))) for change in [{}, *changed]}
    assert len(digests) == len(changed) + 1


def test_a_fresh_record_is_not_trained_again_and_a_stale_one_is(tiny: MakeSpec, tmp_path: Path) -> None:
    class Refuses(InProcess):
        def train(self, *arguments: Any, **options: Any) -> Any:
            raise AssertionError("trained")

    spec, refuses = tiny(), Refuses(CPU)
    first = rounds.load_or_run(spec, InProcess(CPU), root=tmp_path)
    assert rounds.load_or_run(spec, refuses, root=tmp_path) == first
    with pytest.raises(AssertionError, match="trained"):
        rounds.load_or_run(spec, refuses, root=tmp_path, again=True)
    with pytest.raises(AssertionError, match="trained"):
        rounds.load_or_run(tiny(lr=0.3), refuses, root=tmp_path)
    assert record.load(spec, tmp_path) == first


# Digest of the code


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package, which the digest is taken of; the code that runs stays as it is."""
    copy = tmp_path / "fedlib"
    shutil.copytree(ROOT / "fedlib", copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(record, "PACKAGE", copy)
    record.code_digest.cache_clear()
    yield copy
    record.code_digest.cache_clear()


def digests() -> dict[str, str]:
    record.code_digest.cache_clear()
    return {method: record.code_digest(method, "cnn4") for method in registry.METHODS}


SHARED = (
    *("core/client", "rng", "wire/container", "wire/floats", "methods/messages", "models/cnn", "models/initializers"),
    *("data/partition", "models/freezing", "core/task", "core/uploads", "runs/rounds", "core/optimizers"),
    *("core/averaging", "core/loss", "core/plan"),
)


@pytest.mark.parametrize("name", SHARED)
def test_a_change_of_a_shared_module_changes_every_digest(package: Path, name: str) -> None:
    before, file = digests(), package / f"{name}.py"
    file.write_text(file.read_text() + "\n\n# a comment\n")
    assert digests() == before
    file.write_text(file.read_text() + "changed = 1\n")
    after = digests()
    assert all(after[method] != before[method] for method in before)


COMPRESSED = registry.METHODS.keys() - {"fedavg"}
CLUSTERED = {"fedcompress", "fedzip"}
CODED = {*CLUSTERED, "feddq", "fedmrn", "fedpm", "fedsparsify", "terngrad", "topk"}  # by entropy


def place(method: str) -> str:
    """Of its module below the package, without ".py"."""
    return registry.METHODS[method].__name__.removeprefix("fedlib.").replace(".", "/")


def room(method: str) -> str:
    """The folder of a method of several modules."""
    return place(method).removesuffix("/method")


@pytest.mark.parametrize(
    "name, told",
    [
        *[(place(name), {name}) for name in registry.METHODS if name != "drive"],
        ("methods/baselines/drive", {"drive", "eden"}),  # EDEN takes what it can from DRIVE
        ("wire/rotation", {"drive", "eden"}),
        ("methods/update_codec", COMPRESSED - {"feddq", "fedpm", "fedpt", *CLUSTERED}),
        (f"{room('fedpm')}/masks", {"fedpm"}),
        (f"{room('feddq')}/quantizers", {"feddq"}),
        (f"{room('feddq')}/schedules", {"feddq"}),
        ("wire/levels", {"feddq"}),
        *[
            (f"{room('fedpt')}/{name}", {"fedpt"})
            for name in ("mechanisms", "accounting", "tree_sensitivity", "private_server")
        ],
        *[(f"{room('fedcompress')}/{name}", CLUSTERED) for name in ("clustering", "messages", "augmentation")],
        ("wire/codebook", CLUSTERED),
        *[(f"{room('fedcompress')}/{name}", {"fedcompress"}) for name in ("distillation", "adaptive_clusters")],
        ("data/synthetic", {"fedcompress"}),
        ("wire/bits", COMPRESSED - {"fedpt"}),
        ("wire/entropy", CODED),
        ("wire/contexts", CODED),
    ],
)
def test_a_change_of_what_some_methods_use_changes_their_digests_alone(
    package: Path, name: str, told: set[str]
) -> None:
    before, file = digests(), package / f"{name}.py"
    file.write_text(file.read_text() + "\nchanged = 1\n")
    after = digests()
    changed = {method for method in before if after[method] != before[method]}
    assert changed == told, f"methods that use {name}: mend the sets above"


@pytest.mark.parametrize(
    "name",
    [
        *("errors", "__main__", "theory/fedmrn", "theory/fedcompress"),
        *("data/archive", "data/images", "data/sources", "data/sound", "data/text"),
        *(f"engines/{name}" for name in ("select", "automatic", "in_process", "pool", "shared_memory")),
        *(f"engines/{name}" for name in ("gpu_steps", "cuda_graph", "vmapped")),
        *(f"runs/{name}" for name in ("record", "checkpoint", "machine", "experiments", "progress", "grid")),
        *(f"claims/{name}" for name in ("score", "measures", "benchmarks", "scorecard")),
        *(f"pages/{name}" for name in ("figures", "execute", "fedpt", "fedcompress", "scorecard")),
        *(f"pages/{name}" for name in ("sphinx_downloads", "api_reference")),
    ],
)
def test_a_change_of_what_makes_no_number_changes_no_digest(package: Path, name: str) -> None:
    before, file = digests(), package / f"{name}.py"
    file.write_text(file.read_text() + "\nchanged = 1\n")
    assert digests() == before


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("models/cnn", "deviation=0.01", "deviation=0.02"),
        ("models/initializers", 'root.child("initial weights")', 'root.child("other weights")'),
        ("core/client", '.child("client", round, client_id)', '.child("client", client_id)'),
    ],
    ids=["initial deviation", "initial weights", "a client's randomness"],
)
def test_a_changed_formula_cannot_hide(package: Path, name: str, old: str, new: str) -> None:
    before = digests()
    files = [package / f"{name}.py", *package.rglob("*.py")]  # wherever the formula has moved to
    file = next(f for f in files if old in f.read_text())
    file.write_text(file.read_text().replace(old, new))
    after = digests()
    assert all(after[method] != before[method] for method in before)


def test_what_a_broadcast_is_written_by_counts_where_it_is_used(package: Path) -> None:
    def found() -> list[str]:
        record.code_digest.cache_clear()
        return [record.code_digest("eden", "cnn4", writer) for writer in ("", "feddq", "fedcompress")]

    # The codec's own interface counts for all: the task names it as a type.
    for name, told in (("model_codec", [True, True, True]), ("feddq/quantizers", [False, True, False])):
        before, file = found(), package / "methods" / f"{name}.py"
        file.write_text(file.read_text() + "\nchanged = 1\n")
        assert [a != b for a, b in zip(found(), before, strict=True)] == told


def test_a_new_method_leaves_the_others_digests(package: Path) -> None:
    before = digests()
    source = (package / "methods" / "fedavg.py").read_text()
    (package / "methods" / "fednew.py").write_text(source.replace("fedavg", "fednew"))
    table = package / "methods" / "registry.py"
    text = table.read_text().replace('"fedavg": fedavg', '"fedavg": fedavg, "fednew": fednew')
    table.write_text(text.replace("import fedavg", "import fednew, fedavg"))
    assert "fednew" in table.read_text()
    assert digests() == before


def test_another_model_file_changes_the_digest_of_its_models_alone(package: Path) -> None:
    (package / "models" / "other.py").write_text("other = 1\n")
    assert digests() == digests()
    assert record.code_digest("fedavg", "cnn4") == record.code_digest("fedavg", "mlp")  # of one module
    before = {model: record.code_digest("fedpm", model) for model in ("mlp", "mlp256", "conv6")}
    file = package / "models" / "masked.py"
    file.write_text(file.read_text() + "\nchanged = 1\n")
    record.code_digest.cache_clear()
    assert {m for m in before if record.code_digest("fedpm", m) != before[m]} == {"mlp256", "conv6"}


# Essence of a source file

SOURCE = '''"""Head."""

import math  # needed


def area(r: float) -> float:
    """Area of a circle.

    r: in metres
    """
    # the formula
    return math.pi * r**2  # r squared


class Circle:
    """Round."""

    label = "not # a comment"
    text = """not a docstring"""

    def method(self) -> None:
        "Docstring of one line."
        return None
'''


def test_essence_has_no_comments_docstrings_and_blank_lines() -> None:
    assert essence(SOURCE).splitlines() == [
        "import math",
        "def area(r: float) -> float:",
        "    return math.pi * r**2",
        "class Circle:",
        '    label = "not # a comment"',
        '    text = """not a docstring"""',
        "    def method(self) -> None:",
        "        return None",
    ]


@pytest.mark.parametrize(
    "old, new",
    [
        ("# r squared", "# another comment"),
        ("  # r squared", ""),
        ("    # the formula\n", ""),
        ("    # the formula\n", "\n\n    # one\n\n    # two\n"),
        ("Area of a circle.", "Área of a “disc” # no comment"),
        ("Docstring of one line.", "Other."),
        ('"""Head."""', '"""Longer\n\nhead."""'),
        ("\n\n\n", "\n"),
        ("import math  #", "import math #"),
    ],
)
def test_edits_of_comments_docstrings_and_blank_lines_change_no_essence(old: str, new: str) -> None:
    assert old in SOURCE
    assert essence(SOURCE.replace(old, new)) == essence(SOURCE)


@pytest.mark.parametrize(
    "old, new",
    [
        ("r**2", "r**3"),
        ("math.pi", "3"),
        ("not # a comment", "not # the same"),
        ("not a docstring", "changed"),
        ("    return None", "return None"),
        ("r: float", "r: int"),
        ("import math  #", "import cmath  #"),
    ],
)
def test_every_other_edit_changes_the_essence(old: str, new: str) -> None:
    assert old in SOURCE
    changed = SOURCE.replace(old, new)
    with contextlib.suppress(IndentationError):  # an unreadable file has no essence at all
        assert essence(changed) != essence(SOURCE)


@pytest.mark.parametrize(
    "source",
    [
        'def f(x): "doc"; return x * 2\n',
        'def f(x):\n    "doc"; return x * 2\n',
        'def f(x, y=x * 2):\n    """doc"""\n',
        "a = 1\n\x0c\n# comment\nb = x * 2  # comment\n",
        'a = "one\u2028two"  # comment\nb = x * 2  # comment\n',
        'a = """\n\n# x * 2\n"""\n',
        'a = f"{x * 2}"  # comment\n',
        "a = [  # comment\n    x * 2,\n    # comment\n]\n",
    ],
    ids=["one line", "one line body", "default", "form feed", "line separator", "string", "f-string", "list"],
)
def test_no_layout_hides_a_formula(source: str) -> None:
    assert essence(source) != essence(source.replace("x * 2", "x * 3"))


def test_a_blank_line_inside_a_string_is_part_of_it() -> None:
    assert essence('a = """1\n\n2"""\n') != essence('a = """1\n2"""\n')


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=40))
def test_no_comment_changes_the_essence(comment: str) -> None:
    assert essence(f"a = '#'  #{comment}\nb = 2\n") == "a = '#'\nb = 2"


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


def test_every_python_gives_the_same_essence(tmp_path: Path) -> None:
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python (3.11 to 3.14) on PATH: that digests agree between versions stays UNTESTED here")
    source = (ROOT / "fedlib" / "runs" / "record.py").read_text()
    (function,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "essence"]
    program = "import ast, hashlib, io, sys, tokenize\n" + ast.unparse(function)
    program += "\nfor name in sys.argv[1:]:"
    program += "\n    print(hashlib.sha256(essence(open(name, encoding='utf-8').read()).encode()).hexdigest())\n"
    script = tmp_path / "essence.py"
    script.write_text(program)
    awkward = tmp_path / "awkward.py"
    awkward.write_text(SOURCE + "a = f'{1:#x} # {2}'  # comment\n")
    names = [str(name) for name in (*sorted((ROOT / "fedlib").rglob("*.py")), awkward)]
    said = {
        version: subprocess.run(
            [python, str(script), *names], capture_output=True, text=True, check=True
        ).stdout.split()
        for version, python in (pythons | {"this": sys.executable}).items()
    }
    assert len(said["this"]) == len(names) > 20
    for version, hashes in said.items():
        different = [name for name, one, other in zip(names, hashes, said["this"], strict=True) if one != other]
        assert not different, version


# What a record holds


def test_a_record_is_complete(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny(method="fedmrn", hyper={"mask": "signed"}, rounds=3, evaluate_every=2)
    found = run(spec, tmp_path)
    assert Spec.from_dict(found["spec"]) == spec
    assert found["code"] == record.code_digest("fedmrn", "mlp") and found["data"] == sets.digest("digits")
    assert found["partition"] == in_process.task_of(spec.key(), CPU).partition.hash
    assert found["parameters"] == {"weights": 64 * 64 + 64 * 10, "others": 0, "frozen": 0}
    assert [entry["round"] for entry in found["rounds"]] == [1, 2, 3]
    for entry in found["rounds"]:
        evaluated = entry["round"] in (2, 3)  # every second, and the last
        assert (entry["accuracy"] is not None) == (entry["loss"] is not None) == evaluated
        assert entry["uplink_bytes"] > 0 and entry["downlink_bytes"] > 0 and entry["seconds"] >= 0
        assert entry["paper_bits"] == 4 * 4736 and len(entry["clients"]) == 4 and entry["refused"] == []
        assert len(entry["clients"]) == len(set(entry["clients"])) == 4
        assert all(0 <= client < 10 for client in entry["clients"])
    final, last = found["final"], found["rounds"][-1]
    assert (final["accuracy"], final["loss"]) == (last["accuracy"], last["loss"])
    assert 0 <= final["accuracy"] <= 1 and math.isfinite(final["loss"])
    assert final["uploads"] == sum(len(entry["clients"]) for entry in found["rounds"])
    for name in ("uplink_bytes", "downlink_bytes", "paper_bits"):
        assert final[name] == sum(entry[name] for entry in found["rounds"])
    made = found["made"]
    assert made["engine"] == "InProcess" and made["device"].startswith("cpu")
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", made["commit"])
    assert made["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "numpy", "torchvision", "safetensors", "constriction"} <= made["versions"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["time"]) and made["seconds"] >= 0


def test_a_record_comes_back_from_its_text_with_one_line_a_round(tiny: MakeSpec, tmp_path: Path) -> None:
    found = run(tiny(), tmp_path)
    text = record.text(found)
    assert json.loads(text) == found
    assert list(json.loads(text))[-1] == "rounds"
    lines = text.splitlines()
    assert [json.loads(line.strip().rstrip(",")) for line in lines if '"round":' in line] == found["rounds"]
    assert text.endswith("}\n")
    saved = record.save(found, tmp_path)
    assert saved == tmp_path / "records" / "tiny" / "smoke" / "main_fedavg_iid_seed0.json"
    assert saved.read_text() == text and record.load(tiny(), tmp_path) == found


def test_two_runs_of_one_spec_are_equal_to_the_byte(tiny: MakeSpec, tmp_path: Path) -> None:
    def stable(spec: Spec) -> str:
        return json.dumps(record.stable(run(spec, tmp_path)))

    specs = [tiny(), tiny(method="fedmrn"), tiny(model="cnn2", rounds=1, cohort=2)]
    first = [stable(spec) for spec in specs]
    torch.manual_seed(99)  # no global generator has a say
    assert [stable(spec) for spec in reversed(specs)] == first[::-1]  # nor has what ran before
    assert stable(tiny(seed=1)) != first[0]


def test_stable_leaves_out_times_and_the_machine_alone(tiny: MakeSpec, tmp_path: Path) -> None:
    found = run(tiny(), tmp_path)
    stable = record.stable(found)
    assert found.keys() - stable.keys() == {"made"}
    for entry, kept in zip(found["rounds"], stable["rounds"], strict=True):
        assert entry.keys() - kept.keys() == {"seconds"}
        assert all(entry[key] == value for key, value in kept.items())


# The ledger


class Weighing(InProcess):
    """The reference engine, beside which every message is weighed."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.up: dict[int, int] = {}
        self.down: dict[int, int] = {}

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Any, memories: Memories = None
    ) -> Iterator[tuple[int, Any]]:
        for client, upload in super().train(spec, message, round, cohort, memories):
            assert type(message) is bytes and type(upload) is bytes
            self.down[round] = self.down.get(round, 0) + len(message)
            self.up[round] = self.up.get(round, 0) + len(upload)
            yield client, upload


@pytest.mark.parametrize("method", ["fedavg", "fedmrn"])
@pytest.mark.parametrize("model", ["mlp", "cnn2"])
def test_the_ledger_adds_up_what_was_passed(tiny: MakeSpec, tmp_path: Path, method: str, model: str) -> None:
    scale, spec = Weighing(), tiny(method=method, model=model, rounds=2, cohort=3)
    found = run(spec, tmp_path, scale)
    assert [entry["uplink_bytes"] for entry in found["rounds"]] == [scale.up[1], scale.up[2]]
    assert [entry["downlink_bytes"] for entry in found["rounds"]] == [scale.down[1], scale.down[2]]
    final, weights = found["final"], found["parameters"]["weights"]
    assert final["uplink_bytes"] == sum(scale.up.values()) == sum(final["uplink_parts"].values())
    assert final["downlink_bytes"] == sum(scale.down.values())
    assert list(final["uplink_parts"]) == [*registry.METHODS[method].SECTIONS, "container"]
    total = weights + found["parameters"]["others"]
    part = {"fedavg": ("model", 4 * total), "fedmrn": ("mask", -(-weights // 8))}[method]
    assert final["uplink_parts"][part[0]] == 6 * part[1]
    assert 0 < final["uplink_parts"]["container"] <= 6 * 64
    assert final["paper_bits"] == 6 * {"fedavg": 32 * total, "fedmrn": weights}[method]


# Cost does not grow with the clients that exist


def test_memory_and_work_do_not_grow_with_the_population(tiny: MakeSpec, tmp_path: Path) -> None:
    def specs(clients: int) -> Spec:
        return tiny(clients=clients, partition={"kind": "resampled", "size": 40, "seed": 1}, cohort=5, rounds=2)

    def cost(clients: int) -> tuple[int, int]:
        """Peak of Python's and numpy's memory in bytes, and how many Python functions were called in the rounds."""
        in_process.task_of.cache_clear()
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        tracemalloc.start()
        sys.setprofile(count)
        try:
            run(specs(clients), tmp_path)
        finally:
            sys.setprofile(None)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return peak, calls

    run(specs(100), tmp_path)  # caches and late imports
    (peak, calls), (large_peak, large_calls) = cost(100), cost(100_000)
    # One byte a client would be 100 kB; a list of them 800 kB.
    assert large_peak - peak < 90_000
    assert abs(large_calls - calls) < 0.02 * calls


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_process_with_a_hundred_thousand_clients_is_no_larger(tiny: MakeSpec, tmp_path: Path) -> None:
    program = """
import json, resource, sys, torch
from pathlib import Path
from fedlib.engines.in_process import InProcess
from fedlib.runs import rounds
from fedlib.runs.spec import Spec
rounds.run(Spec.from_dict(json.loads(sys.argv[1])), InProcess(torch.device("cpu")), root=Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    sizes = []
    for clients in (100, 100_000):
        spec = tiny(clients=clients, partition={"kind": "resampled", "size": 40, "seed": 1}, cohort=5, rounds=3)
        command = [sys.executable, "-c", program, spec.key(), str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
        sizes.append(int(done.stdout))
    assert sizes[1] - sizes[0] < 30_000  # kB, of some 500,000: room for the allocator's whims
