"""Many runs at once: the records of one after the other, whatever fails or is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from common import ROOT, session
from jobs import CPU, MakeSpec
from projects import put, write

from fedlib.__main__ import main
from fedlib.engines.in_process import InProcess
from fedlib.errors import Diverged, RunError
from fedlib.runs import grid, record, rounds
from fedlib.runs.checkpoint import Checkpoint
from fedlib.runs.record import Record
from fedlib.runs.spec import Spec


def text(found: Record) -> str:
    """With its fields in their order, so that Git shows a change where there is one."""
    return json.dumps(record.stable(found))


def every(results: Iterable[Record | RunError]) -> list[Record]:
    """Of runs none of which fails."""
    found = [r for r in results if not isinstance(r, RunError)]
    assert found
    return found


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_records_are_those_of_one_run_after_the_other(tiny: MakeSpec, tmp_path: Path) -> None:
    """Whatever else fails."""
    three = [
        tiny(name="one", method="fedmrn", rounds=4),
        tiny(name="two", partition={"kind": "dirichlet", "beta": 0.3, "seed": 7}, seed=2),
        tiny(name="three", method="signsgd", rounds=2),
    ]
    hopeless = tiny(name="hopeless", lr=1e12, batch=8)
    expected = [rounds.run(spec, InProcess(CPU), root=tmp_path / "reference") for spec in three]
    first, failed, *rest = grid.run_all([three[0], hopeless, *three[1:]], 2, root=tmp_path)
    assert isinstance(failed, Diverged) and "hopeless: round 1 got no usable update" in str(failed)
    assert not record.load(hopeless, tmp_path)
    found = every([first, *rest])
    assert [text(r) for r in found] == [text(r) for r in expected]
    assert len({text(r) for r in found}) == 3
    files = [record.path(spec, tmp_path) for spec in three]
    assert [record.read(file) for file in files] == found, "and they are saved"
    before = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    again = every(grid.run_all(three, 2, root=tmp_path))
    assert again[0] == found[0] and again[2] == found[2] and text(again[1]) == text(found[1])
    after = [file.stat().st_mtime_ns for file in files]
    assert (after[0], after[2]) == (before[0], before[2]) and after[1] > before[1], "only what is missing is trained"
    anew = every(grid.run_all(three[:1], 2, root=tmp_path, again=True))
    assert text(anew[0]) == text(found[0]) and files[0].stat().st_mtime_ns > after[0]


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


def started(runs: list[Spec], root: Path, saved: int) -> subprocess.Popen[str]:
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


def end(process: subprocess.Popen[str]) -> None:
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
    saved = [Checkpoint(spec, tmp_path).load(spec.chosen) for spec in runs]
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
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    write(tmp_path, methods=["plain"], grid={"lr": [0.1, 0.2]}, seeds=[0, 1], settings={"rounds": 1})
    command = ["run", "tiny", "--profile", "smoke", "--device", "cpu", "--processes", "2"]
    assert main([*command, "--only", "*lr-0.1*"]) == 0  # as many runs as processes: one after the other
    capfd.readouterr()
    assert main([*command, "--again", "--only", "*seed0"]) == 0 and main(command) == 0
    said = capfd.readouterr()
    assert "tiny, profile smoke: 2 runs, 2 to train on cpu" in said.out
    assert "(trained: asked for again)" in said.out
    assert "tiny, profile smoke: 4 runs, 1 to train on cpu" in said.out
    assert len(re.findall(r"^main_plain_iid_lr-0\.[12]_seed[01]: accuracy .*%, uplink .* MB", said.out, re.M)) == 3
    made = [json.loads(file.read_text())["made"]["engine"] for file in (tmp_path / "records").rglob("*.json")]
    assert len(made) == 4 and set(made) <= {"InProcess", "Auto", "auto"}
    assert main([*command, "--again"]) == 0
    assert "4 runs, 4 to train" in capfd.readouterr().out
    made = [json.loads(file.read_text())["made"]["engine"] for file in (tmp_path / "records").rglob("*.json")]
    assert made == ["InProcess"] * 4, "each whole in a process of its own"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_that_diverges_is_told_and_the_others_are_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    three = {"methods": ["plain"], "partitions": ["iid"], "seeds": [0], "grid": {"lr": [0.1, 1e12, 0.2]}}
    write(tmp_path, "main", put("profiles/smoke/tune-plain", three), put("settings/rounds/smoke", 1), **three)
    command = ["run", "tiny", "--profile", "smoke", "--device", "cpu", "--processes", processes]
    assert main(command) == 2
    said = capfd.readouterr()
    assert "failed: main_plain_iid_lr-1" in said.out and "error: 1 of 6 runs failed, the others are kept" in said.err
    assert "diverged: tune-plain_plain_iid_lr-1" in said.out, "in a search for settings it is a finding"
    assert len(list((tmp_path / "records").rglob("main_*.json"))) == 2
    assert len(list((tmp_path / "records").rglob("tune-*.json"))) == 2
    assert main([*command, "--only", "tune-*"]) == 0
