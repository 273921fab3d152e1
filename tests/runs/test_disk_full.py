"""A disk that is full, a folder that is closed, a kill in the middle: whatever a command writes, the old file stays."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import (
    RUN,
    Before,
    Begun,
    Said,
    age,
    called,
    die_when_done,
    fill_disk,
    give_up_rights,
    save_never,
    save_often,
)
from common import ROOT
from projects import files, small, write

from fedlib.data import images, sets
from fedlib.runs import record

FETCHED = b"new" * 1000
OLD = b"old\n"


def know_set() -> None:
    """A data set of one file, which nobody but a folder has."""
    hash = "sha256:" + hashlib.sha256(FETCHED).hexdigest()
    entry = sets.Entry("tiny", images.read_digits, ("a",), folder="data", files=(("tiny/file", hash),))
    sets.ENTRIES["tiny"] = entry


class Kind:
    """Of writes: the command, what it writes, and how large no file may grow that this is cut short and nothing else.

    made: what stands there before, by a command of its own where it is not `OLD`.
    """

    def __init__(
        self, command: str, target: str, size: int, *before: Before, made: Callable[[Path], None] | None = None
    ) -> None:
        self.command, self.target, self.size, self.before, self.made = command.split(), target, size, before, made

    def prepare(self, root: Path) -> Path:
        """A project with the old file."""
        small(root, words='print("new" * 100_000)')
        write(root, seeds=[0], settings={"rounds": 2})
        (root / "mirror" / "tiny").mkdir(parents=True)
        (root / "mirror" / "tiny" / "file").write_bytes(FETCHED)
        (root / ".cache").mkdir()
        shutil.copytree(ROOT / "book" / "labs", root / "book" / "labs")
        target = root / self.target
        if self.made:
            self.made(root)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(OLD)
        return target

    def called(self, root: Path, *before: Before) -> Said:
        arguments = [part.replace("ROOT", str(root)) for part in self.command]
        return called(*arguments, home=root, before=(*self.before, *before))


def recorded(root: Path) -> None:
    assert called(*RUN, home=root).status == 0


def half_way(root: Path) -> None:
    """A run that was killed after its first checkpoint."""
    write(root, seeds=[0], settings={"rounds": 200})
    begun = Begun(*RUN, home=root, before=[save_often])
    while not list(root.glob(".cache/checkpoints/*/*/*.safetensors")):
        assert not begun.wait(0.01)
    begun.kill()
    for left in root.rglob(f"*{record.UNFINISHED}"):
        left.unlink()


KINDS = {
    "record": Kind(" ".join((*RUN, "--again")), "records/tiny/smoke/main_plain_iid_seed0.json", 500, made=recorded),
    "checkpoint": Kind(
        " ".join(RUN), ".cache/checkpoints/tiny/smoke/main_plain_iid_seed0.safetensors", 500, save_often, made=half_way
    ),
    "score": Kind("score --profile smoke", "scores/fedmrn/one-bit.json", 20),
    "page": Kind("page words --profile smoke", "book/compare/words.ipynb", 30_000),
    "lab": Kind("labs --folder ROOT/labs --replace", "labs/student/1-count-the-bytes.ipynb", 500),
    "schema": Kind("schema", "experiments/schema.json", 500),
    "data": Kind("data get tiny --mirror ROOT/mirror", "data/tiny/file", 500, know_set),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def check(kind: Kind, said: Said, why: str = "") -> None:
    """One line tells it, which begins with `error`; one before it may say that a checkpoint is not believed."""
    assert said.status == 2 and "Traceback" not in said.out + said.err, said
    lines = said.err.splitlines()
    if kind is KINDS["data"]:  # it names every source that was asked
        assert lines[0].startswith("error: ") and why in said.err
    else:
        assert lines[-1].startswith("error: ") and kind.target in lines[-1] and why in lines[-1], said.err
        assert not lines[:-1] or ("starting from the beginning" in lines[0] and not lines[1:-1])


def test_a_full_disk_and_a_kill_leave_the_old_file_and_nothing_else(kind: Kind, tmp_path: Path) -> None:
    target = kind.prepare(tmp_path)
    before = files(tmp_path)
    said = kind.called(tmp_path, functools.partial(fill_disk, kind.size))
    check(kind, said, "File too large")
    assert files(tmp_path) == before
    assert kind.called(tmp_path, die_when_done).status == -9
    assert before.items() < files(tmp_path).items() and age(tmp_path)
    check(kind, kind.called(tmp_path, functools.partial(fill_disk, kind.size)), "File too large")
    assert files(tmp_path) == before and target.is_file()


def close(target: Path) -> None:
    os.chmod(target.parent, 0o500)


def block(target: Path) -> None:
    shutil.rmtree(target.parent)
    target.parent.touch()


def rights_bind(folder: Path) -> bool:
    """Whether a process that gave its rights up is kept out of a closed folder."""
    (folder / "closed").mkdir(mode=0o500)
    said = called("schema", home=folder, before=[give_up_rights, functools.partial(touch, folder / "closed")])
    return "PermissionError" in said.err


def touch(folder: Path) -> None:
    (folder / "file").touch()


@pytest.mark.parametrize("fault", [close, block])
def test_what_stands_in_the_way_of_a_write_is_named_and_kept(
    kind: Kind, tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    if fault is close and not rights_bind(tmp_path):
        pytest.skip("permissions bind nobody here")
    if fault is block and kind is KINDS["schema"]:
        pytest.skip("without experiments it is no project")
    root = tmp_path / "project"
    target = kind.prepare(root)
    fault(target)
    before = files(root)
    check(kind, kind.called(root, give_up_rights))
    assert files(root) == before


def test_a_fetch_that_has_no_place_to_unpack(tmp_path: Path) -> None:
    kind = KINDS["data"]
    kind.prepare(tmp_path)
    (tmp_path / ".cache").rmdir()
    (tmp_path / ".cache").touch()
    said = kind.called(tmp_path)
    assert said.status == 2 and said.err.startswith(f"error: {tmp_path / '.cache'}: cannot be read or written")
    assert (tmp_path / kind.target).read_bytes() == OLD


def test_a_run_that_saves_no_checkpoint_needs_no_place_for_one(tmp_path: Path) -> None:
    write(tmp_path, seeds=[0])
    (tmp_path / ".cache").touch()
    assert called(*RUN, home=tmp_path, before=[save_never]).status == 0
    assert len(list((tmp_path / "records").rglob("*.json"))) == 1


def test_a_checkpoint_that_cannot_be_removed_is_told_and_fails_nothing(tmp_path: Path) -> None:
    if not rights_bind(tmp_path):
        pytest.skip("permissions bind nobody here")
    kind, root = KINDS["checkpoint"], tmp_path / "project"
    target = kind.prepare(root)
    close(target)
    said = called(*RUN, home=root, before=[give_up_rights, save_never])
    assert said.status == 0, said
    assert f"{target} cannot be removed (Permission denied)" in said.err and "Traceback" not in said.err
    assert len(list((root / "records").rglob("*.json"))) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_takes_no_more_is_told(tmp_path: Path) -> None:
    write(tmp_path, seeds=[0])
    ordinary = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fedlib", "status"],
            env=ordinary | {"FEDLIB_HOME": str(tmp_path)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "No space left on device" in done.stderr


def test_what_lies_outside_a_project_is_not_swept(tmp_path: Path) -> None:
    """There `data get` works too, perhaps in a folder with a cache of somebody else's."""
    (tmp_path / ".cache" / "fetch-abcdefgh").mkdir(parents=True)
    (tmp_path / ".cache" / "fetch-abcdefgh" / "file").touch()
    before, left = files(tmp_path), age(tmp_path)
    assert left and called("data", "check", "digits", home=tmp_path).status == 0
    assert files(tmp_path) == before
