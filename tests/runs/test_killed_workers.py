"""A worker that is killed, as by a machine short of memory: a clear line, and the next start makes the same records."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import RUN, Begun, called, save_often
from common import session
from projects import files, small, write

from fedlib.runs import record
from fedlib.runs.checkpoint import Checkpoint
from fedlib.runs.experiments import specs

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
TRAIN, ENGINE = RUN[:-2], RUN[-2:]


def kill_worker(begun: Begun, when: Callable[[], bool]) -> str:
    """Kill one of its workers at a moment; what it says to that."""
    while not when():
        assert not begun.wait(0.01)
    assert begun.process.pid
    lines = {each: Path(f"/proc/{each}/cmdline").read_bytes() for each in session(begun.process.pid)}
    workers = [each for each, line in lines.items() if b"spawn_main" in line]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    said = begun.wait()
    assert said and said.status == 2 and "Traceback" not in said.out + said.err, said
    return said.err


def records(root: Path) -> list[str]:
    """The repeatable part of all that are planned, each of them fresh."""
    found = list(record.fresh(specs("tiny", "smoke", root=root), root))
    assert not any(reason for _, _, reason in found)
    return [json.dumps(record.stable(each)) for _, each, _ in found if each]


def test_a_run_goes_on_after_its_pool_lost_a_worker(tmp_path: Path) -> None:
    alone, hurt = tmp_path / "alone", tmp_path / "hurt"
    for root in (alone, hurt):
        root.mkdir()
        write(root, seeds=[0], settings={"rounds": 60})
    (spec,) = specs("tiny", "smoke", root=hurt)
    with Begun(*TRAIN, "--engine", "pool", "--processes", "2", home=hurt, before=[save_often]) as begun:
        said = kill_worker(begun, Checkpoint(spec, hurt).file.exists)
    assert said.startswith("error: ") and "a worker process died (out of memory?); try --engine process" in said
    saved = Checkpoint(spec, hurt).load(spec.chosen)
    assert saved and record.load(spec, hurt) is None, "the kill came too late"
    for root in (alone, hurt):
        assert called(*RUN, home=root).status == 0
    assert records(hurt) == records(alone)
    found, done = record.load(spec, hurt), saved[2]["rounds"]
    assert found and found["rounds"][: len(done)] == done, "not trained again: even the seconds are the same"


def test_a_grid_that_lost_a_worker_keeps_what_is_done(tmp_path: Path) -> None:
    alone, hurt = tmp_path / "alone", tmp_path / "hurt"
    for root in (alone, hurt):
        root.mkdir()
        write(root, seeds=list(range(8)), settings={"rounds": 50})
    with Begun(*TRAIN, "--processes", "2", home=hurt) as begun:
        said = kill_worker(begun, lambda: any(hurt.rglob("records/*/*/*.json")))
    assert said.startswith("error: a worker process died (out of memory?); try --engine process")
    kept = {name: content for name, content in files(hurt).items() if name.startswith("records")}
    assert 0 < len(kept) < 8
    for root in (alone, hurt):
        assert called(*RUN, home=root).status == 0
    assert records(hurt) == records(alone)
    assert kept.items() < files(hurt).items()


def test_a_page_whose_kernel_is_killed_stays_as_it_was(tmp_path: Path) -> None:
    small(tmp_path, fatal="import os; os.kill(os.getpid(), 9)")
    target = tmp_path / "book" / "compare" / "fatal.ipynb"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"old\n")
    before = files(tmp_path)
    said = called("page", "fatal", "--profile", "smoke", home=tmp_path)
    assert said.status == 2 and "Traceback" not in said.err
    assert "\nerror: notebooks/fatal.md: Kernel died; the old page was kept; make it again" in said.err
    assert files(tmp_path) == before
