"""Checkpoints: a run goes on from its own and from no other's; a write is whole or not at all."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import disk_full_after
from jobs import CPU, MakeSpec, Stopping, ran
from known_answers import CASES, TINY
from projects import files

from fedlib.engines.in_process import InProcess
from fedlib.errors import DataError
from fedlib.runs import checkpoint, record, rounds
from fedlib.runs.checkpoint import Checkpoint
from fedlib.runs.spec import Spec

HalfWay = tuple[Spec, Path]


@pytest.fixture
def half_way(tiny: MakeSpec, tmp_path: Path) -> HalfWay:
    """A spec with a checkpoint of its first two rounds."""
    spec = tiny(rounds=4)
    with pytest.raises(InterruptedError):
        rounds.run(spec, Stopping(3), root=tmp_path, save_every=0)
    loaded = Checkpoint(spec, tmp_path).load(spec.chosen)
    assert loaded and len(loaded[2]["rounds"]) == 2
    return spec, tmp_path


def asked(spec: Spec, root: Path) -> list[int]:
    """The rounds that a run trains; it ends as one that was never disturbed."""
    engine = Stopping()
    found = rounds.load_or_run(spec, engine, root=root)
    assert json.dumps(record.stable(found)) == json.dumps(ran(spec, root / "reference"))
    assert found["made"]["seconds"] >= 0 and all(entry["seconds"] >= 0 for entry in found["rounds"])
    return engine.asked


def test_a_run_goes_on_after_its_last_saved_round(half_way: HalfWay) -> None:
    assert asked(*half_way) == [3, 4]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("rounds") != 1])
def test_every_method_s_state_comes_back(name: str, tmp_path: Path) -> None:
    spec = Spec.from_dict(TINY | CASES[name])
    with pytest.raises(InterruptedError):
        rounds.run(spec, Stopping(2), root=tmp_path, save_every=0)
    assert asked(spec, tmp_path) == [2, 3]


@pytest.mark.parametrize(
    "changes", [{"lr": 0.2}, {"seed": 1}, {"rounds": 5}, {"method": "fedmrn"}], ids=lambda changes: next(iter(changes))
)
def test_a_checkpoint_of_another_spec_is_ignored(tiny: MakeSpec, half_way: HalfWay, changes: dict[str, Any]) -> None:
    other = tiny(**{"rounds": 4} | changes)  # of the same name, so of the same file
    assert asked(other, half_way[1]) == list(range(1, other.rounds + 1))


@pytest.mark.parametrize(
    "owner, name, value",
    [(checkpoint, "code_of", lambda spec: "0" * 16), (checkpoint, "LAYOUT", 1), (torch, "__version__", "0.0.0")],
    ids=["code", "layout", "torch"],
)
def test_a_checkpoint_of_other_code_or_another_torch_is_ignored(
    half_way: HalfWay, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    spec, root = half_way
    monkeypatch.setattr(owner, name, value)
    assert Checkpoint(spec, root).load(spec.chosen) is None
    assert asked(spec, root) == [1, 2, 3, 4]


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_damaged_checkpoint_is_ignored(half_way: HalfWay, length: int, caplog: pytest.LogCaptureFixture) -> None:
    file = Checkpoint(*half_way).file
    file.write_bytes(file.read_bytes()[:length])
    assert asked(*half_way) == [1, 2, 3, 4]
    assert caplog.messages == [f"{file} does not fit its digest: ignored, starting from the beginning"]


def test_a_checkpoint_with_one_bit_flipped_is_never_believed(half_way: HalfWay) -> None:
    spec, root = half_way
    here = Checkpoint(spec, root)
    content = here.file.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 200).tolist():
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        here.file.write_bytes(flipped)
        assert here.load(spec.chosen) is None, bit
    here.file.write_bytes(content)
    assert here.load(spec.chosen) is not None


def test_a_foreign_file_in_its_place_is_ignored(half_way: HalfWay) -> None:
    here = Checkpoint(*half_way)
    here.file.write_bytes(safetensors.torch.save({"weight": torch.zeros(2)}))
    assert here.load(half_way[0].chosen) is None
    here.file.unlink()
    here.file.mkdir()
    assert here.load(half_way[0].chosen) is None


def test_a_temporary_file_left_by_a_kill_is_ignored(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny()
    for target in (record.path(spec, tmp_path), Checkpoint(spec, tmp_path).file):
        target.parent.mkdir(parents=True)
        (target.parent / f".{target.name}.abcdefgh{record.UNFINISHED}").write_bytes(b'{"half')
    assert record.load(spec, tmp_path) is None
    assert Checkpoint(spec, tmp_path).load(spec.chosen) is None
    assert asked(spec, tmp_path) == [1, 2, 3]
    found = record.load(spec, tmp_path)
    assert found and json.dumps(record.stable(found)) == json.dumps(ran(spec, tmp_path / "reference"))


def test_what_killed_writes_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    record.write(tmp_path / "records" / "kept.json", b"{}")
    old, new = (tmp_path / "records" / f".{name}.json.x{record.UNFINISHED}" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"{")
    os.utime(old, (time.time() - 61,) * 2)
    record.sweep(tmp_path)
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [new.name, "kept.json"]


# Disk full


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, size: int) -> None:
    target = tmp_path / "folder" / "file.json"
    with disk_full_after(size), pytest.raises(DataError, match="what stood there is kept"):
        record.write(target, b"new" * 100_000)
    assert files(tmp_path) == {}
    record.write(target, b"old")
    with disk_full_after(size), pytest.raises(DataError, match="what stood there is kept"):
        record.write(target, b"new" * 100_000)
    assert files(tmp_path) == {"folder/file.json": b"old"}
    record.write(target, b"new")
    assert files(tmp_path) == {"folder/file.json": b"new"}


def test_a_full_disk_at_a_checkpoint_or_the_record_keeps_the_old_ones(half_way: HalfWay) -> None:
    spec, root = half_way
    before = files(root)
    with disk_full_after(500), pytest.raises(DataError, match="what stood there is kept"):
        rounds.run(spec, InProcess(CPU), root=root, save_every=0)
    assert files(root) == before
    with disk_full_after(500), pytest.raises(DataError, match="what stood there is kept"):
        rounds.load_or_run(spec, InProcess(CPU), root=root)
    assert files(root) == before
    found = rounds.load_or_run(spec, InProcess(CPU), root=root)
    old = files(root)
    with disk_full_after(500), pytest.raises(DataError, match="what stood there is kept"):
        rounds.load_or_run(spec, InProcess(CPU), root=root, again=True)
    assert files(root) == old
    assert rounds.load_or_run(spec, InProcess(CPU), root=root) == found


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    target, versions = tmp_path / "file", [bytes([index]) * 200_000 for index in range(2)]
    record.write(target, versions[0])
    reader = "import sys; from pathlib import Path\nseen = {Path(sys.argv[1]).read_bytes() for _ in range(3000)}\n"
    check = "print(*sorted((len(s), s[0], len(set(s))) for s in seen))"
    watching = subprocess.Popen([sys.executable, "-c", reader + check, str(target)], stdout=subprocess.PIPE, text=True)
    count = 0
    while watching.poll() is None:
        count += 1
        record.write(target, versions[count % 2])
        time.sleep(0)
    said = watching.communicate()[0]
    assert watching.returncode == 0
    assert set(said.strip().replace(") (", ")|(").split("|")) <= {"(200000, 0, 1)", "(200000, 1, 1)"}
