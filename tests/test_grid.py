"""Grids: the runs that an experiment file asks for, many of them at once, how uploads pass, and which runs count."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlib.__main__ import main
from fedlib.claims import measures
from fedlib.engines.in_process import InProcess
from fedlib.engines.pool import Pool
from fedlib.engines.shared_memory import Laid, Shelf
from fedlib.errors import PayloadError, RunError, SpecError
from fedlib.runs import grid, record, rounds
from fedlib.runs.checkpoint import Checkpoint
from fedlib.runs.experiments import papers, specs
from fedlib.runs.record import Record
from fedlib.runs.spec import PROFILES, Spec

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]


# The shelf


def sides(places: int) -> tuple[Shelf, Shelf]:
    """The worker's and the parent's, at the ends of a real pipe."""
    ours, theirs = multiprocessing.Pipe()
    return Shelf(theirs, places), Shelf(ours, places)


def taken(parent: Shelf) -> bytes:
    laid = parent.connection.recv()
    assert isinstance(laid, Laid)
    return bytes(parent.take(laid))


@pytest.mark.parametrize("places", [1, 2, 3])
def test_messages_of_any_size_arrive_as_they_were(places: int) -> None:
    worker, parent = sides(places)
    for number, size in enumerate((5, 5, 1, 0, 6, 100_000, 3, 0, 99_999, 100_001, 1)):
        message = bytes([number]) * size
        worker.put(message)
        laid = parent.connection.recv()
        assert laid == (size, size if size in (6, 100_000, 100_001) or number == 0 else 0), "a new shelf when it grows"
        assert bytes(parent.take(laid)) == message


def test_places_are_used_in_turns_and_a_larger_shelf_begins_anew() -> None:
    worker, parent = sides(3)
    for message in (b"aaaa", b"bb", b"cccc", b"dd"):
        worker.put(message)
        assert taken(parent) == message
    assert worker.memory is not None and parent.memory is not None
    assert worker.memory[:] == parent.memory[:] == b"ddaabb\0\0cccc", "the very same memory"
    worker.put(b"eeeee")
    assert taken(parent) == b"eeeee"
    assert parent.memory[:] == b"eeeee" + bytes(10)


def test_messages_that_wait_survive_a_larger_one_behind_them() -> None:
    worker, parent = sides(2)
    for first, second in ((b"small", b"much larger" * 1000), (b"x" * 20_000, b"y"), (b"1", b"2" * 30_000)):
        worker.put(first)
        worker.put(second)
        assert taken(parent) == first
        assert taken(parent) == second


def test_what_was_taken_stays_as_it_is() -> None:
    worker, parent = sides(2)
    kept = []
    for number in range(8):
        worker.put(bytes([number]) * 10)
        kept.append(parent.take(parent.connection.recv()))
    assert kept == [bytes([number]) * 10 for number in range(8)]
    kept[7][:] = b"0123456789"  # it is the parent's own
    assert worker.memory is not None and worker.memory[10:] == bytes([7]) * 10


def test_the_first_message_may_be_empty() -> None:
    worker, parent = sides(2)
    for message in (b"", b"", b"then more", b""):
        worker.put(message)
        assert taken(parent) == message


@settings(deadline=None)
@given(st.integers(1, 3), st.lists(st.binary(min_size=1, max_size=40) | st.none(), max_size=40))
def test_a_shelf_is_a_queue(places: int, steps: list[bytes | None]) -> None:
    """None takes the oldest message; so does a message for which there is no place left."""
    worker, parent = sides(places)
    waiting: deque[bytes] = deque()
    for step in steps:
        if waiting and (step is None or len(waiting) == places):
            assert taken(parent) == waiting.popleft()
        if step is not None:
            worker.put(step)
            waiting.append(step)
    while waiting:
        assert taken(parent) == waiting.popleft()
    worker.connection.close()
    parent.connection.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_growing_leaves_no_open_files_behind() -> None:
    worker, parent = sides(2)
    counts = []
    for size in range(1, 60):
        worker.put(bytes(size))
        taken(parent)
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert max(counts) == counts[0]


def test_a_job_that_waits_in_the_pipe_is_no_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS Python has the receipt of a descriptor acknowledged by a byte that comes back through the same pipe. A
    worker's next job lies there already, whenever it holds two."""
    monkeypatch.setattr(reduction, "ACKNOWLEDGE", True)
    worker, parent = sides(2)
    parent.connection.send(("client", 1, 7))
    failed: list[Exception] = []

    def put() -> None:
        try:
            worker.put(b"message")
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    try:
        assert taken(parent) == b"message"
        thread.join(10)
        assert not thread.is_alive() and failed == []
        assert worker.connection.recv() == ("client", 1, 7)
    finally:
        parent.connection.close()
        thread.join(10)


# Pool.call; its functions must be a module's own, since workers import them


def later(engine: InProcess, number: int, seconds: float) -> tuple[int, str, bool]:
    time.sleep(seconds)
    return number, engine.name, multiprocessing.parent_process() is not None


def message_of(engine: InProcess, number: int, size: int) -> bytes:
    return bytes([number]) * size


def odd_only(engine: InProcess, number: int) -> int:
    if number % 2 == 0:
        raise LookupError(f"{number} is even")
    return number


def refuse(engine: InProcess) -> None:
    raise PayloadError("not a record")


class TwoPartError(Exception):
    """Pickles, but its class cannot be called again with what was pickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)
        self.two = two


def fail_in_two_parts(engine: InProcess) -> None:
    raise TwoPartError("one", "two")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as opened:
        yield opened


@pytest.fixture
def mortal() -> Iterator[Pool]:
    """A pool of one process that the test may ruin."""
    with Pool(1) as opened:
        yield opened


@pytest.mark.timeout(60)
def test_results_come_in_order_whoever_is_done_first(pool: Pool) -> None:
    found = list(pool.call(later, [(k, 0.1 if k in (0, 3) else 0.0) for k in range(7)]))
    assert found == [(k, "InProcess", True) for k in range(7)]
    assert list(pool.call(later, [])) == []
    assert list(pool.call(later, [(5, 0.0)])) == [(5, "InProcess", True)]


@pytest.mark.timeout(60)
def test_messages_pass_between_processes(pool: Pool) -> None:
    """Growing and shrinking, two on their way at once in each worker, and again with the same shelves."""
    sizes = [1, 5, 3, 70_000, 200_000, 2, 199_999, 300_000, 300_001, 7]
    for _ in range(2):
        found = list(pool.call(message_of, list(enumerate(sizes))))
        assert found == [bytes([number]) * size for number, size in enumerate(sizes)]


@pytest.mark.timeout(60)
def test_a_message_without_bytes_ends_no_worker(mortal: Pool) -> None:
    assert list(mortal.call(message_of, [(1, 0), (2, 3), (3, 0)])) == [b"", b"\2\2\2", b""]


@pytest.mark.timeout(60)
def test_an_error_is_raised_in_its_turn_and_the_pool_goes_on(pool: Pool) -> None:
    begun = pool.call(odd_only, [(1,), (3,), (4,), (5,), (6,)])
    assert [next(begun), next(begun)] == [1, 3]
    with pytest.raises(LookupError, match="4 is even"):
        next(begun)
    assert list(pool.call(odd_only, [(7,), (9,), (11,)])) == [7, 9, 11]


@pytest.mark.timeout(60)
def test_an_update_that_cannot_be_sent_is_no_result_of_a_call(pool: Pool) -> None:
    """In a round it stands for the client's upload; whoever called a function would take it for its result."""
    with pytest.raises(PayloadError, match="not a record"):
        list(pool.call(refuse, [()]))


@pytest.mark.timeout(25)
@pytest.mark.parametrize("function", [fail_in_two_parts, lambda engine: None], ids=["error", "function"])
def test_what_cannot_be_passed_is_an_error_and_leaves_nobody_waiting(mortal: Pool, function: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017 - pickle's own, of whatever type
        list(mortal.call(function, [()]))
    if mortal.workers:
        assert list(mortal.call(odd_only, [(1,), (3,)])) == [1, 3]
    else:
        with pytest.raises(RunError):
            list(mortal.call(odd_only, [(1,), (3,)]))


# All runs at once


def text(found: Record) -> str:
    return json.dumps(record.stable(found), sort_keys=True)


def every(results: Iterable[Record | RunError]) -> list[Record]:
    """Of runs none of which fails."""
    found = [r for r in results if not isinstance(r, RunError)]
    assert found
    return found


@pytest.fixture(scope="module")
def three(tiny: MakeSpec) -> list[Spec]:
    return [
        tiny(name="one", method="fedmrn", rounds=4),
        tiny(name="two", partition={"kind": "dirichlet", "beta": 0.3, "seed": 7}, seed=2),
        tiny(name="three", method="signsgd", rounds=2),
    ]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_records_are_those_of_one_run_after_the_other(three: list[Spec], tmp_path: Path) -> None:
    expected = [rounds.run(spec, InProcess(CPU), root=tmp_path / "reference") for spec in three]
    found = every(grid.run_all(three, 2, root=tmp_path))
    assert [text(r) for r in found] == [text(r) for r in expected]
    assert len({text(r) for r in found}) == 3
    files = [record.path(spec, tmp_path) for spec in three]
    assert [json.loads(file.read_text()) for file in files] == found, "and they are saved"
    before = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    again = every(grid.run_all(three, 2, root=tmp_path))
    assert again[0] == found[0] and again[2] == found[2] and text(again[1]) == text(found[1])
    after = [file.stat().st_mtime_ns for file in files]
    assert (after[0], after[2]) == (before[0], before[2]) and after[1] > before[1], "only what is missing is trained"
    anew = every(grid.run_all(three[:1], 2, root=tmp_path, again=True))
    assert text(anew[0]) == text(found[0]) and files[0].stat().st_mtime_ns > after[0]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_record_has_its_fields_in_the_order_of_its_spec(three: list[Spec], tmp_path: Path) -> None:
    """As text too it is that of one run after the other, so that Git shows a change where there is one."""
    (found,) = every(grid.run_all(three[1:2], 1, root=tmp_path))
    expected = rounds.run(three[1], InProcess(CPU), root=tmp_path / "reference")
    assert json.dumps(record.stable(found)) == json.dumps(record.stable(expected))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_that_fails_does_not_stop_the_others(three: list[Spec], tiny: MakeSpec, tmp_path: Path) -> None:
    hopeless = tiny(name="hopeless", clients=10**6, cohort=1)
    first, failed, last = grid.run_all([three[0], hopeless, three[2]], 2, root=tmp_path)
    assert first == record.load(three[0], tmp_path) and last == record.load(three[2], tmp_path) is not None
    assert isinstance(failed, RunError) and "hopeless: round 1 got no usable update" in str(failed)
    assert not record.load(hopeless, tmp_path)


def test_no_runs_at_all(tmp_path: Path) -> None:
    assert list(grid.run_all([], 2, root=tmp_path)) == []


SCRIPT = """
import json, sys
from pathlib import Path
from fedlib.runs import grid, rounds
from fedlib.runs.spec import Spec
rounds.run.__kwdefaults__["save_every"] = 0.0  # in the workers too: they import this file
if __name__ == "__main__":
    specs = [Spec.from_dict(values) for values in json.loads(sys.argv[1])]
    for found in grid.run_all(specs, 2, root=Path(sys.argv[2])):
        print(found["spec"]["name"], flush=True)
"""


def session(leader: int) -> list[int]:
    """Living processes of a session (field 6 of /proc/PID/stat; field 3 is the state, Z when dead)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def started(runs: list[Spec], root: Path, saved: int) -> "subprocess.Popen[str]":
    """run_all with checkpoints after every round, in a session of its own, so many of its runs past their first."""
    script = root / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps([spec.as_dict() for spec in runs]), str(root)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list(root.glob(".cache/checkpoints/tiny/smoke/*.safetensors"))) < saved:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def end(process: "subprocess.Popen[str]") -> None:
    for each in session(process.pid):
        os.kill(each, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_no_worker_outlives_its_killed_parent(tiny: MakeSpec, tmp_path: Path) -> None:
    """However long their runs: a second start would train, and write, the same runs beside them."""
    process = started([tiny(name=f"run{k}", seed=k, rounds=1_000_000) for k in range(3)], tmp_path, saved=2)
    try:
        assert len(session(process.pid)) >= 3  # parent, two workers
        process.kill()
        process.wait()
        for _ in range(100):
            if not session(process.pid):
                return
            time.sleep(0.1)
        pytest.fail(f"left behind: {session(process.pid)}")
    finally:
        end(process)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_runs_go_on_from_what_was_saved(tiny: MakeSpec, tmp_path: Path) -> None:
    runs = [tiny(name=f"run{k}", seed=k, rounds=150) for k in range(3)]
    end(started(runs, tmp_path, saved=1))
    saved = [Checkpoint(spec, tmp_path).load() for spec in runs]
    done = [log["rounds"] for _, _, log in (each for each in saved if each)]
    assert len(done) >= 1 and all(done), "no kill fell before the end of a run"
    found = every(grid.run_all(runs, 2, root=tmp_path))
    for spec, checkpoint, entry in zip(runs, saved, found, strict=True):
        assert text(entry) == text(rounds.run(spec, InProcess(CPU), root=tmp_path / "reference"))
        if checkpoint:
            log = checkpoint[2]["rounds"]
            assert entry["rounds"][: len(log)] == log, "not trained again: even the seconds are the same"
    assert not list(tmp_path.glob(".cache/checkpoints/**/*.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_command_runs_a_grid_side_by_side(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLIB_HOME", str(home))
    write(home, methods=["plain"], grid={"lr": [0.1, 0.2]}, seeds=[0, 1], settings={"rounds": 1})
    command = ["run", "tiny", "--profile", "smoke", "--device", "cpu", "--processes", "2"]
    assert main([*command, "--only", "*lr-0.1*"]) == 0  # as many runs as processes: one after the other
    capfd.readouterr()
    assert main([*command, "--again", "--only", "*seed0"]) == 0 and main(command) == 0
    said = capfd.readouterr()
    assert "tiny, profile smoke: 2 runs, 2 to train on cpu" in said.out
    assert "(trained: asked for again)" in said.out
    assert "tiny, profile smoke: 4 runs, 1 to train on cpu" in said.out
    assert len(re.findall(r"^main_plain_iid_lr-0\.[12]_seed[01]: accuracy .*%, uplink .* MB", said.out, re.M)) == 3
    made = [json.loads(file.read_text())["made"]["engine"] for file in (home / "records").rglob("*.json")]
    assert len(made) == 4 and set(made) <= {"InProcess", "Auto", "auto"}
    assert main([*command, "--again"]) == 0
    assert "4 runs, 4 to train" in capfd.readouterr().out
    made = [json.loads(file.read_text())["made"]["engine"] for file in (home / "records").rglob("*.json")]
    assert made == ["InProcess"] * 4, "each whole in a process of its own"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_that_diverges_is_told_and_the_others_are_kept(
    home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    monkeypatch.setenv("FEDLIB_HOME", str(home))
    write(home, methods=["plain"], grid={"lr": [0.1, 1e12, 0.2]}, settings={"rounds": 1})
    assert main(["run", "tiny", "--profile", "smoke", "--device", "cpu", "--processes", processes]) == 2
    said = capfd.readouterr()
    assert "failed: main_plain_iid_lr-1" in said.out and "error: 1 of 3 runs failed, the others are kept" in said.err
    assert len(list((home / "records").rglob("*.json"))) == 2
    write(home, name="tune-plain", methods=["plain"], grid={"lr": [0.1, 1e12, 0.2]}, settings={"rounds": 1})
    assert main(["run", "tiny", "--profile", "smoke", "--device", "cpu", "--processes", processes]) == 0
    assert "diverged: tune-plain_plain_iid_lr-1" in capfd.readouterr().out, "in a search for settings it is a finding"
    assert len(list((home / "records").rglob("tune-*.json"))) == 2


# What an experiment file asks for

SETTINGS = dict(data="digits", model="mlp", clients=10, cohort=2, rounds=2, epochs=1, batch=64, evaluate_every=1)
MASKED = {"mask": "signed", "magnitude": 0.05}
METHODS: dict[str, Any] = {
    "plain": {"method": "fedavg", "lr": 0.1, "hyper": {}, "source": "test"},
    "masked": {"method": "fedmrn", "lr": 0.2, "hyper": MASKED, "source": "test", "paper": "x"},
}
PARTITIONS = {"iid": {"kind": "iid", "seed": 5}, "skew": {"kind": "dirichlet", "beta": 0.3}}


def write(root: Path, name: str = "main", **main_group: Any) -> None:
    group = {"methods": ["plain"], "partitions": ["iid"], "seeds": [0]} | main_group
    content = {
        "settings": {name: {"unit": "", "source": "test", "smoke": value} for name, value in SETTINGS.items()},
        "methods": METHODS,
        "partitions": PARTITIONS,
        "profiles": {"smoke": {name: group}},
    }
    (root / "experiments" / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for folder in ("experiments", "published"):
        (tmp_path / folder).mkdir()
    return tmp_path


def runs_of(root: Path, **main_group: Any) -> list[Spec]:
    write(root, **main_group)
    return specs("tiny", "smoke", root=root)


def test_every_combination_once_in_the_order_of_the_file(home: Path) -> None:
    found = runs_of(
        home,
        methods=["plain", "masked"],
        partitions=["iid", "skew"],
        seeds=[0, 3],
        grid={"lr": [0.5, 0.25], "batch": [8]},
    )
    assert [spec.name for spec in found] == [
        f"main_{label}_{split}_lr-{lr}_batch-8_seed{seed}"
        for split in ("iid", "skew")
        for label in ("plain", "masked")
        for lr in (0.5, 0.25)
        for seed in (0, 3)
    ]
    last = found[-1]
    assert (last.label, last.split, last.method, last.lr, last.batch, last.seed) == (
        *("masked", "skew", "fedmrn"),
        *(0.25, 8, 3),
    )
    assert last.hyper == MASKED and last.partition == {"kind": "dirichlet", "beta": 0.3, "seed": 3}
    assert found[0].partition == {"kind": "iid", "seed": 5}
    assert len({spec.key() for spec in found}) == 16


def test_without_axes_names_are_as_before(home: Path) -> None:
    (spec,) = runs_of(home)
    assert spec.name == "main_plain_iid_seed0" and (spec.lr, spec.batch) == (0.1, 64)
    assert runs_of(home, grid={}) == [spec]


def test_an_axis_of_the_method_s_own_settings(home: Path) -> None:
    found = runs_of(home, methods=["masked"], grid={"hyper.masking": ["sm", "pm"], "hyper.magnitude": [0.1, 1]})
    assert [spec.name for spec in found] == [
        f"main_masked_iid_masking-{masking}_magnitude-{size}_seed0" for masking in ("sm", "pm") for size in (0.1, 1)
    ]
    assert [spec.hyper for spec in found] == [
        MASKED | {"masking": masking, "magnitude": size} for masking in ("sm", "pm") for size in (0.1, 1)
    ]
    assert {spec.lr for spec in found} == {0.2}


def test_a_group_s_own_settings_and_its_axes_come_before_the_file_s(home: Path) -> None:
    found = runs_of(home, settings={"rounds": 7, "batch": 3}, grid={"batch": [4, 5], "method": ["fedavg", "signsgd"]})
    assert {spec.rounds for spec in found} == {7}
    assert [(spec.batch, spec.method) for spec in found] == [
        *((4, "fedavg"), (4, "signsgd")),
        *((5, "fedavg"), (5, "signsgd")),
    ]


def test_a_method_by_another_label(home: Path) -> None:
    """The label tells groups' methods together, and is what a claim names; the settings are the key's."""
    first, second, third = runs_of(home, methods=["plain", {"other": "masked"}, {"third": "plain"}])
    assert [spec.label for spec in (first, second, third)] == ["plain", "other", "third"]
    assert second.name == "main_other_iid_seed0"
    assert (second.method, second.lr, second.hyper) == ("fedmrn", 0.2, MASKED)
    assert (third.method, third.hyper) == ("fedavg", {})


def test_a_name_that_is_an_integer_in_one_axis_and_a_float_in_another_run(home: Path) -> None:
    assert [spec.name for spec in runs_of(home, grid={"lr": [1, 0.1]})] == [
        "main_plain_iid_lr-1_seed0",
        "main_plain_iid_lr-0.1_seed0",
    ]


BAD_GROUPS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "axis not a list": ({"grid": {"lr": 0.1}}, ["main", "grid.lr", "0.1", "list"]),
    "axis a text": ({"grid": {"hyper.masking": "sm"}}, ["grid.hyper.masking", "'sm'", "list"]),
    "axes not a mapping": ({"grid": ["lr"]}, ["main.grid", "['lr']", "mapping"]),
    "no axes": ({"grid": None}, ["main.grid", "None", "mapping"]),
    "unknown field": ({"grid": {"rate": [0.1]}}, ["'rate'", "lr"]),
    "unknown field of the method": ({"grid": {"hyper.masking": ["sm"]}}, ["hyper", "'masking'", "none"]),
    "field of no part": ({"grid": {"partition.beta": [0.1]}}, ["partition.beta"]),
    "value out of range": ({"grid": {"lr": [0.1, -1]}}, ["lr", "-1"]),
    "value of the method out of range": (
        {"methods": ["masked"], "grid": {"hyper.noise": ["gauss", "laplace"]}},
        ["hyper.noise", "'laplace'", "gauss"],
    ),
    "value a list": ({"grid": {"lr": [[0.1]]}}, ["lr", "[0.1]"]),
    "axis without values": ({"grid": {"lr": []}}, ["matches no run"]),
    "axis a number": ({"grid": {1: [2]}}, ["1"]),
    "unknown method": ({"methods": ["plane"]}, ["methods", "'plane'", "plain"]),
    "unknown method behind a label": ({"methods": [{"x": "plane"}]}, ["methods", "'plane'", "plain"]),
    "label of many": ({"methods": [{"x": ["plain"]}]}, ["methods", "['plain']"]),
    "label of none": ({"methods": [{}]}, ["methods", "{}"]),
    "two labels": ({"methods": [{"x": "plain", "y": "plain"}]}, ["methods", "'x'"]),
    "label a number": ({"methods": [{1: "plain"}]}, ["methods", "1"]),
    "label a path": ({"methods": [{"../x": "plain"}]}, ["methods", "../x"]),
    "label with a folder": ({"methods": [{"a/b": "plain"}]}, ["methods", "a/b"]),
    # Two runs of one name would write one record, which is then stale for one of them for ever.
    "value twice": ({"grid": {"lr": [0.1, 0.1]}}, ["main_plain_iid_lr-0.1_seed0"]),
    "seed twice": ({"seeds": [0, 1, 0]}, ["main_plain_iid_seed0"]),
    "label twice": ({"methods": ["plain", {"plain": "masked"}]}, ["main_plain_iid_seed0"]),
    # These are made from what the group says besides; an axis of them would change the name and nothing else.
    **{
        f"axis without effect: {name}": ({"grid": {name: values}}, [name])
        for name, values in {
            "seed": [5, 6],
            "label": ["x", "y"],
            "split": ["x"],
            "name": ["x"],
            "group": ["x"],
            "paper": ["x"],
            "profile": ["lab"],
            "partition": [{"kind": "resampled", "size": 40}],
            "hyper": [{"mask": "signed"}],
        }.items()
    },
}


@pytest.mark.parametrize("group, words", BAD_GROUPS.values(), ids=BAD_GROUPS)
def test_a_group_that_cannot_be_is_named(home: Path, group: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        runs_of(home, **group)
    assert [word for word in words if word not in str(error.value)] == []


def test_names_of_the_real_grids_are_unique_and_legal_everywhere() -> None:
    for paper in papers():
        for profile in PROFILES:
            names = [spec.name for spec in specs(paper, profile)]
            assert len({name.lower() for name in names}) == len(names), "also where case does not count"
            assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}", name) for name in names)


# Which runs of a grid count


def ran(label: str, group: str, split: str, lr: float, seed: int, *accuracies: float | None) -> Record:
    entries = [{"accuracy": accuracy} for accuracy in accuracies]
    final = {
        "accuracy": accuracies[-1],
        "uploads": 2,
        "uplink_bytes": 210,
        "uplink_parts": {"mask": 200, "refused": 10},
    }
    spec = dict(label=label, group=group, split=split, lr=lr, seed=seed)
    return {"spec": spec, "rounds": entries, "final": final, "parameters": {"weights": 100}}


RAN = [
    ran("a", "main", "iid", 0.1, 0, 0.5, None, 0.6),
    ran("a", "main", "iid", 0.1, 1, 0.7, None, 0.9),
    ran("a", "main", "iid", 0.3, 0, 0.2, None, 1.0),
    ran("a", "main", "iid", 0.3, 1, 0.2, None, 0.3),  # mean 0.65, at 0.1 it is 0.75
    ran("b", "main", "iid", 0.1, 0, 0.1, None, 0.2),
    ran("b", "main", "iid", 0.3, 0, 0.1, None, 0.5),
    ran("b", "main", "skew", 0.1, 0, 0.1, None, 0.1),
    ran("b", "wide", "iid", 0.1, 0, 0.3, None, 0.4),
    ran("a", "wide", "iid", 0.1, 0, 0.8, None, 0.8),
    ran("c", "main", "iid", 0.1, 1, 0.4, None, 0.4),
    ran("c", "wide", "iid", 0.1, 0, 0.4, None, 0.75),
]


def chosen(cases: measures.Cases) -> dict[tuple[str, str, str], tuple[set[float], list[int]]]:
    return {case: ({r["spec"]["lr"] for r in runs.values()}, sorted(runs)) for case, runs in cases.items()}


@pytest.mark.parametrize("order", [1, -1])
def test_each_method_has_the_learning_rate_with_the_best_mean(order: int) -> None:
    """Not the best single run, not the first nor the last; for each group and partition by itself."""
    records = RAN[::order]
    assert chosen(measures.by_case(records, ["a", "b"], ["main"])) == {
        ("a", "main", "iid"): ({0.1}, [0, 1]),
        ("b", "main", "iid"): ({0.3}, [0]),
        ("b", "main", "skew"): ({0.1}, [0]),
    }
    assert chosen(measures.by_case(records, ["a"], ["wide", "main"])) == {
        ("a", "main", "iid"): ({0.1}, [0, 1]),
        ("a", "wide", "iid"): ({0.1}, [0]),
    }
    assert measures.by_case(records, ["d"], ["main"]) == measures.by_case(records, ["a"], []) == {}
    kept = [
        (s["label"], s["group"], s["split"], s["lr"], s["seed"]) for s in (r["spec"] for r in measures.best(records))
    ]
    assert sorted(kept) == [
        ("a", "main", "iid", 0.1, 0),
        ("a", "main", "iid", 0.1, 1),
        ("a", "wide", "iid", 0.1, 0),
        ("b", "main", "iid", 0.3, 0),
        ("b", "main", "skew", 0.1, 0),
        ("b", "wide", "iid", 0.1, 0),
        ("c", "main", "iid", 0.1, 1),
        ("c", "wide", "iid", 0.1, 0),
    ]


def test_gaps_of_accuracy_by_hand() -> None:
    """Only where both have run: a and b share seed 0 of main and of wide, a and c seed 1 of main and seed 0 of wide."""
    both = measures.accuracy_gap(RAN, ["a"], ["main", "wide"], ["b", "c"])
    assert {case: pytest.approx(values) for case, values in both.items()} == {
        "a against b, main, iid": [10.0],  # 0.6 - 0.5
        "a against c, main, iid": [50.0],  # 0.9 - 0.4
        "a against b, wide, iid": [40.0],
        "a against c, wide, iid": [5.0],
    }
    assert measures.accuracy_gap(RAN, ["b"], ["main"], ["a"]) == {"b, main, iid": [pytest.approx(-10.0)]}
    assert measures.accuracy_gap(RAN, ["b"], ["main"], ["c"]) == {}, "no seed in common"


def test_gaps_of_speed_by_hand() -> None:
    """The mean over the evaluated rounds: a 0.55 and 0.8, b 0.3, c 0.4; the middle round was not evaluated."""
    found = measures.speed_gap(RAN, ["a"], ["main"], ["b", "c"])
    assert found == {
        "a against b, main, iid": [pytest.approx(25.0)],
        "a against c, main, iid": [pytest.approx(40.0)],
    }
    late, early = ran("a", "main", "iid", 0.1, 0, 0.0, 0.9), ran("b", "main", "iid", 0.1, 0, 0.8, 0.9)
    assert measures.speed_gap([late, early], ["a"], ["main"], ["b"]) == {"a, main, iid": [pytest.approx(-40.0)]}
    assert measures.accuracy_gap([late, early], ["a"], ["main"], ["b"]) == {"a, main, iid": [pytest.approx(0.0)]}


def test_bytes_by_hand() -> None:
    """200 bytes of mask for two uploads of 100 weights: 8 bits each; 10 bytes were refused and count for nobody."""
    assert measures.bits_per_weight(RAN, ["a"], ["main"], "mask") == {"a, main, iid": [8.0, 8.0]}
    assert measures.upload_bytes(RAN[0]) == 100
    large = ran("b", "main", "iid", 0.1, 0, 0.5)
    large["final"]["uplink_bytes"] = 6410
    assert measures.upload_ratio([RAN[0], large], ["a"], ["main"], ["b"]) == {"a, main, iid": [32.0]}
