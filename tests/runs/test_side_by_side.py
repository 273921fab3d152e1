"""Several processes at the same files: each ends as if it were alone, and nobody sees half a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from commands import RUN, Begun, Said, save_often
from projects import files, small, write

from fedlib.data import sources
from fedlib.runs import record
from fedlib.runs.experiments import specs
from fedlib.runs.record import UNFINISHED
from fedlib.runs.spec import Spec

# What a page may do with records, many times
READ = """import json, pathlib
for _ in range(500):
    found = [json.loads(path.read_text()) for path in sorted(pathlib.Path("records").glob("*/*/*.json"))]
print([record["final"] for record in found])"""


def ended(begun: Begun) -> Said:
    said = begun.wait()
    assert said is not None and said.status == 0 and said.err == "", said
    return said


def stable(spec: Spec, root: Path) -> str:
    found = record.load(spec, root)
    assert found and not record.stale(found, spec)
    return json.dumps(record.stable(found))


def test_two_processes_with_one_run_end_with_one_record(tmp_path: Path) -> None:
    """They share a checkpoint, which each replaces after every round and removes at its end."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for root in (alone, shared):
        root.mkdir()
        write(root, seeds=[0], settings={"rounds": 30})
    (spec,) = specs("tiny", "smoke", root=alone)
    ended(Begun(*RUN, home=alone))
    for more in ((), ("--again",)):
        with Begun(*RUN, *more, home=shared, before=[save_often]) as one:
            two = Begun(*RUN, *more, home=shared, before=[save_often])
            assert all("1 to train" in ended(begun).out for begun in (one, two)), "they were not at work together"
        assert stable(spec, shared) == stable(spec, alone)
        assert files(shared).keys() == files(alone).keys()


def test_scores_and_pages_are_made_while_runs_replace_their_records(tmp_path: Path) -> None:
    small(tmp_path, few=READ)
    training = ("run", "fedmrn", *RUN[2:], "--again")
    readers = (("score", "--profile", "smoke"), ("page", "few", "--profile", "smoke"))
    for command in (training, *readers):
        ended(Begun(*command, home=tmp_path))
    before, trained = files(tmp_path), 0
    reading = [Begun(*command, home=tmp_path) for command in readers]
    while any(reader.process.is_alive() for reader in reading):
        ended(Begun(*training, home=tmp_path))
        trained += 1
    assert all(ended(reader) for reader in reading)
    after = files(tmp_path)
    changed = [name for name in before if before[name] != after[name]]
    assert trained > 1 and after.keys() == before.keys()
    assert len(changed) == 2 and all(name.startswith("records/fedmrn/smoke/") for name in changed)


def meet() -> None:
    """Two processes wait for each other before the first file that either removes."""
    remove = os.unlink

    def after_both(file: Path, **options: Any) -> None:
        (sources.home() / f"met-{os.getpid()}").touch()
        while len(list(sources.home().glob("met-*"))) < 2:
            time.sleep(0.01)
        remove(file, **options)

    os.unlink = after_both  # type: ignore[assignment]


def test_two_that_score_remove_the_same_old_files(tmp_path: Path) -> None:
    small(tmp_path)
    ended(Begun("score", "--profile", "smoke", home=tmp_path))
    before = files(tmp_path)
    (tmp_path / "scores" / "old").mkdir()
    for number in range(20):
        (tmp_path / "scores" / "old" / f"{number}.json").touch()
    command = ("score", "--profile", "smoke")
    with Begun(*command, home=tmp_path, before=[meet]) as one, Begun(*command, home=tmp_path, before=[meet]) as two:
        ended(one)
        ended(two)
    for met in tmp_path.glob("met-*"):
        met.unlink()
    assert files(tmp_path) == before


# What is being written, and what was left behind


def pause_when_done() -> None:
    """A write waits for a file called `go` in the experiments' folder before it changes its file's name."""
    rename, go = os.replace, sources.home() / "experiments" / "go"

    def paused(source: str, target: Path) -> None:
        while not go.exists():
            time.sleep(0.01)
        rename(source, target)

    os.replace = paused  # type: ignore[assignment]


@pytest.mark.parametrize("seconds", [-1e7, 1e7], ids=["back", "ahead"])
def test_a_clock_that_jumps_sweeps_no_file_of_a_living_process(tmp_path: Path, seconds: float) -> None:
    """What stands beside it, and is as old or as new, is swept."""
    write(tmp_path)
    folder, left = tmp_path / "experiments", tmp_path / "experiments" / f".left.json.x{UNFINISHED}"
    with Begun("schema", home=tmp_path, before=[pause_when_done]) as begun:
        while not (writing := list(folder.glob(f".schema.json.*{UNFINISHED}"))) or not writing[0].stat().st_size:
            assert not begun.wait(0.01)
        left.touch()
        for file in (left, *writing):
            os.utime(file, (time.time() + seconds,) * 2)
        ended(Begun("status", home=tmp_path))
        assert writing[0].exists() and not left.exists()
        (folder / "go").touch()
        ended(begun)
    assert json.loads((folder / "schema.json").read_text())
