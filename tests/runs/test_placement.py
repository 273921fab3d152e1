"""Which runs go to a GPU where nobody says; the GPU is a stub of torch's word that there is one."""

import dataclasses
from pathlib import Path

import pytest
import torch
from jobs import MakeSpec
from projects import Refused

from fedlib.__main__ import main
from fedlib.runs import placement


def test_work_by_hand(tiny: MakeSpec) -> None:
    """The perceptron: 64 x 64 and 64 x 10 weights, each met forwards and for its own gradient, the second also for its
    input's."""
    assert placement.work(tiny(model="mlp", batch=16)) == 16 * (2 * 64 * 64 + 3 * 64 * 10)


def test_small_runs_stay_on_the_cores(tiny: MakeSpec) -> None:
    perceptron, pooled = tiny(model="mlp", batch=16), tiny(model="pooled4", batch=20)
    assert placement.groups([perceptron, pooled], cores=1) == {"cuda": [pooled], "cpu": [perceptron]}
    assert placement.groups([perceptron, pooled], cores=64) == {"cpu": [perceptron, pooled]}
    huge = dataclasses.replace(perceptron, batch=10_000)
    assert placement.groups([huge, perceptron, huge], cores=2) == {"cuda": [huge, huge], "cpu": [perceptron]}
    assert placement.groups([], cores=2) == {}


def test_the_command_line_puts_digits_on_the_cores_of_a_gpu_machine(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["run", "fedmrn", "--profile", "smoke", "--processes", "2"]) == 0
    assert "2 runs, 2 to train on cpu" in capsys.readouterr().out
    assert len(list((digits / "records").rglob("*.json"))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("asked", [("--device", "cuda"), ("--engine", "graphed")])
def test_who_asks_for_a_gpu_or_its_engine_gets_it(
    digits: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "device: cuda takes no work" in refused("run", "fedmrn", "--profile", "smoke", *asked)
