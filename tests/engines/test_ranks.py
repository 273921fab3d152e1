"""Ranks that torchrun starts: the numbers of one process, and a clear end when a rank dies or was never started."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import known_answers
import projects
import pytest
import torch
from typing_extensions import override

from fedlib.core.client import Job, Memories, Upload
from fedlib.engines.in_process import InProcess
from fedlib.engines.select import open_engine
from fedlib.errors import RunError
from fedlib.runs import rounds
from fedlib.runs.spec import Spec

SCRIPT = Path(__file__).parent / "ranked.py"
# Error feedback, an optimizer that clients keep, BatchNorm, a downlink of its own, masks, a server with Adam
NAMES = ["eden fed back", "fedavg adam, kept", "fedavg batchnorm, poisson", "eden over levels", "fedpm", "fedpt"]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def launched(ranks: int, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, str(ranks), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def numbers_of_one_process(name: str, folder: Path) -> object:
    spec = Spec.from_dict(known_answers.TINY | known_answers.CASES[name])
    return known_answers.numbers(rounds.run(spec, InProcess(torch.device("cpu")), root=folder))


def test_the_numbers_are_those_of_one_process(tmp_path: Path) -> None:
    done = launched(3, str(SCRIPT), str(tmp_path), *NAMES)  # no cohort here can be dealt evenly to three
    assert done.returncode == 0, done.stderr[-2000:]
    for name in NAMES:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found == numbers_of_one_process(name, tmp_path / "alone"), name


class Noted(InProcess):
    """Says which rounds it trains."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.rounds: list[int] = []

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        self.rounds.append(round)
        return super().train(job, message, round, cohort, memories)


def test_a_rank_that_dies_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    name = "fedavg"
    done = launched(2, str(SCRIPT), str(tmp_path), name, "--mortal")
    assert done.returncode != 0 and not (tmp_path / f"{name}.json").exists()
    said = tmp_path / "error"  # unless torchrun was sooner to end rank 0
    assert not said.exists() or said.read_text().startswith("a rank died, or its machine is gone (")
    spec, engine = Spec.from_dict(known_answers.TINY | known_answers.CASES[name]), Noted()
    went_on = rounds.run(spec, engine, root=tmp_path)
    assert min(engine.rounds) == 2
    assert known_answers.numbers(went_on) == numbers_of_one_process(name, tmp_path / "alone")


def test_what_another_rank_cannot_do_is_told(tmp_path: Path) -> None:
    done = launched(2, str(SCRIPT), str(tmp_path), "fedavg", "--bare")
    assert done.returncode != 0
    assert (tmp_path / "error").read_text().startswith("rank 1 failed: SpecError: data: 'digits' is unknown")


def test_the_command_line(tmp_path: Path) -> None:
    projects.small(tmp_path)
    done = launched(2, "-m", "fedlib", *projects.RUN, "--engine", "ranks", FEDLIB_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("2 runs, 2 to train on cpu") == 1  # rank 0 alone speaks
    made = [json.loads(file.read_text())["made"]["engine"] for file in (tmp_path / "records").rglob("*.json")]
    assert made == ["Ranks: 2 x InProcess"] * 2


def test_without_torchrun_there_are_no_ranks() -> None:
    with pytest.raises(RunError, match="engine: ranks are started by torchrun: torchrun --nproc-per-node 2"):
        open_engine("ranks", "cpu")
