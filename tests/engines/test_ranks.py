"""Ranks that torchrun starts: the numbers of one process, and a clear end when a rank dies or was never started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import known_answers
import pytest
import torch

from fedlib.engines.in_process import InProcess
from fedlib.engines.select import open_engine
from fedlib.errors import RunError
from fedlib.runs import rounds
from fedlib.runs.spec import Spec

SCRIPT = Path(__file__).parent / "ranked.py"
# Error feedback, an optimizer that clients keep, BatchNorm, a downlink of its own, masks, a server with Adam
NAMES = ["eden fed back", "fedavg adam, kept", "fedavg batchnorm, poisson", "eden over levels", "fedpm", "fedpt"]


def launched(folder: Path, *words: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, str(SCRIPT), str(folder), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def numbers_of_one_process(name: str, folder: Path) -> object:
    spec = Spec.from_dict(known_answers.TINY | known_answers.CASES[name])
    return known_answers.numbers(rounds.run(spec, InProcess(torch.device("cpu")), root=folder))


def test_the_numbers_are_those_of_one_process(tmp_path: Path) -> None:
    done = launched(tmp_path, *NAMES)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in NAMES:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found == numbers_of_one_process(name, tmp_path / "alone"), name


def test_a_rank_that_dies_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    name = "fedavg"
    done = launched(tmp_path, name, "--mortal")
    assert done.returncode != 0 and not (tmp_path / f"{name}.json").exists()
    said = tmp_path / "error"
    assert not said.exists() or said.read_text().startswith(
        "a rank died, or its machine is gone ("
    )  # if not killed first
    (checkpoint,) = (tmp_path / ".cache").rglob("*.safetensors")
    before = checkpoint.stat().st_mtime_ns
    spec = Spec.from_dict(known_answers.TINY | known_answers.CASES[name])
    went_on = rounds.run(spec, InProcess(torch.device("cpu")), root=tmp_path)
    assert before and known_answers.numbers(went_on) == numbers_of_one_process(name, tmp_path / "alone")


def test_without_torchrun_there_are_no_ranks() -> None:
    with pytest.raises(RunError, match="engine: ranks are started by torchrun: torchrun --nproc-per-node 2"):
        open_engine("ranks", "cpu")
