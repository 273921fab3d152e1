"""What a record says of the machine that made it; the GPU here is a stub of torch's words about one."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import CPU, MakeSpec, Stopping

from fedlib.engines.in_process import InProcess
from fedlib.runs import machine, rounds
from fedlib.runs.checkpoint import Checkpoint

GPU = torch.device("cuda")
GPU_FIELDS = {"name", "memory", "driver", "cuda", "cudnn", "precision"}
HERE = f"cpu ({machine.processor()})"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU, as torch would describe it."""
    found = SimpleNamespace(name="NVIDIA A", total_memory=2**33)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    return found


def test_of_a_cpu_a_record_says_its_name_alone() -> None:
    devices = machine.joined([], CPU)
    assert devices == [{"name": HERE}]
    found = machine.made(devices, "InProcess", 1.0)
    assert found["device"] == HERE
    assert found.keys() == {"time", "seconds", "device", "engine", "commit", "versions"}


def test_of_a_gpu_a_record_says_what_its_numbers_hang_on(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine.made(machine.joined([], GPU), "Graphed", 1.0)
    assert found["device"] == "NVIDIA A"
    (gpu,) = found["gpus"]
    assert gpu.keys() == GPU_FIELDS
    assert (gpu["memory"], gpu["driver"], gpu["cuda"]) == (2**33, "580.65.06", torch.version.cuda)
    assert gpu["precision"].keys() == {"matmul", "cudnn", "benchmark"}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert machine.joined([], GPU)[0]["driver"] == "unknown"


def test_devices_are_named_in_their_order(card: SimpleNamespace) -> None:
    devices: list[dict[str, Any]] = []
    for name, where in (("A", GPU), ("A", GPU), ("B", GPU), ("", CPU), ("B", GPU)):
        card.name = name
        devices = machine.joined(devices, where)
    found = machine.made(devices, "", 0)
    assert found["device"] == f"A, then B, then {HERE}, then B"
    assert [gpu["name"] for gpu in found["gpus"]] == ["A", "B", "B"]
    card.total_memory += 1  # another card of the same name
    again = machine.made(machine.joined(devices, GPU), "", 0)
    assert (again["device"], len(again["gpus"])) == (found["device"], 4)


def test_a_run_that_goes_on_elsewhere_names_both_devices(
    tiny: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = itertools.cycle(["old", "new"])
    monkeypatch.setattr(machine, "processor", lambda: next(names))
    spec = tiny(rounds=3)
    with pytest.raises(InterruptedError):
        rounds.run(spec, Stopping(2), root=tmp_path, save_every=0)
    loaded = Checkpoint(spec, tmp_path).load(spec.chosen)
    assert loaded and loaded[2]["devices"] == [{"name": "cpu (old)"}]
    found = rounds.run(spec, InProcess(CPU), root=tmp_path)
    assert found["made"]["device"] == "cpu (old), then cpu (new)"


def test_the_page_on_records_describes_all_that_is_said_of_a_gpu() -> None:
    page = (Path(__file__).parents[2] / "book" / "reference" / "records.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith("| `gpus` |"))
    assert all(f"`{field}`" in line for field in GPU_FIELDS | {"benchmark"})
