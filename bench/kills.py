"""SIGKILL at random moments, until a command ends by itself: then its files must be those of an undisturbed one."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import projects
from commands import Before, Begun, age, save_often
from known_answers import TINY
from malformed import EVERY

from fedlib.data import images, sets
from fedlib.engines.select import open_engine
from fedlib.runs import record, rounds
from fedlib.runs.spec import Spec

# Runs, and what of them goes from round to round beside the model
STATEFUL = {
    "fedavg adam, kept": "Adam's moments, with the clients",
    "eden fed back": "what compression lost, with the clients",
    "topk": "the same",
    "feddq symmetric": "the losses that set the width",
    "fedpm regularized": "counts of the Beta distributions, for some rounds",
    "fedpt in private": "the tree of DP-FTRL, and momentum",
    "fedsparsify": "what is pruned",
    "fedmrn": "nothing",
}
# What the page shows of its runs
CELL = """from fedlib.claims import results

runs, rounds = results.read("fedmrn", profile)
print(runs[["run", "state", "accuracy"]], rounds[["run", "accuracy"]])"""
MOST = 5  # kills of one command, which may then end
PARTS = {f"part{number}": random.Random(number).randbytes(8_000_000) for number in range(4)}


@dataclasses.dataclass(frozen=True)
class Job:
    """A command in a project, and what is done in its process before; or a call in the command's place."""

    name: str
    command: tuple[str, ...] = ()
    before: tuple[Before, ...] = ()
    call: Callable[[list[str]], int] | None = None

    def begin(self, root: Path) -> Begun:
        command = [part.replace("ROOT", str(root)) for part in self.command]
        return Begun(*command, home=root, before=self.before, call=self.call)

    def end(self, root: Path) -> None:
        said = self.begin(root).wait()
        assert said is not None and said.status == 0, said


def train(name: str, engine: str, root: list[str]) -> int:
    spec = Spec.from_dict(TINY | EVERY[name] | {"rounds": 6})
    with open_engine(engine, "cpu", 2) as opened:
        rounds.load_or_run(spec, opened, root=Path(root[0]))
    return 0


def know_set() -> None:
    """A data set that a folder has."""
    files = tuple((f"tiny/{name}", f"sha256:{hashlib.sha256(content).hexdigest()}") for name, content in PARTS.items())
    sets.ENTRIES["tiny"] = sets.Entry("tiny", images.read_digits, ("a",), folder="data", files=files)


RUN = ("--profile", "smoke", "--engine", "process", "--device", "cpu")
COMMANDS = (
    Job("page", ("page", "fedmrn", *RUN), (save_often,)),
    Job("score", ("score", "--profile", "smoke")),
    Job("data get", ("data", "get", "tiny", "--mirror", "ROOT/mirror"), (know_set,)),
)
SWEEP = Job("status", ("status", "--profile", "smoke"))  # as any start does
RUNS = tuple(
    Job(f"{name}, {engine}", ("ROOT",), (save_often,), functools.partial(train, name, engine))
    for name, engine in itertools.product(STATEFUL, ("process", "pool"))
)


def prepare(root: Path) -> None:
    """A project with two short runs of FedMRN, a small page of them, and a folder that has a data set."""
    projects.small(root, fedmrn=CELL)
    (root / "mirror" / "tiny").mkdir(parents=True)
    for name, content in PARTS.items():
        (root / "mirror" / "tiny" / f"{name}.gz").write_bytes(gzip.compress(content, 1, mtime=0))


def contents(root: Path) -> dict[str, bytes]:
    """All files; of a record what two runs share."""
    found = projects.files(root)
    for name in found:
        if name.startswith("records/"):
            found[name] = json.dumps(record.stable(record.read(root / name))).encode()
    return found


def survives(job: Job, draw: random.Random) -> Iterator[bool]:
    """For each kill whether the files were right when the command had ended by itself at last."""
    with tempfile.TemporaryDirectory() as quiet, tempfile.TemporaryDirectory() as killed:
        for folder in map(Path, (quiet, killed)):
            prepare(folder)
        begin = time.monotonic()
        job.end(Path(quiet))
        seconds, kills = time.monotonic() - begin, 0
        while not (said := (begun := job.begin(Path(killed))).wait(draw.uniform(0, seconds) if kills < MOST else None)):
            begun.kill()
            kills += 1
        age(Path(killed))
        for folder in map(Path, (quiet, killed)):
            SWEEP.end(folder)
        right = said.status == 0 and contents(Path(killed)) == contents(Path(quiet))
        if not right:
            print(f"{job.name}: other files than undisturbed; {said}")
        yield from [right] * kills


def attack_by_kills(count: int) -> dict[str, int]:
    draw, found, jobs = random.Random(0), list[bool](), itertools.cycle((*COMMANDS, *RUNS))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        SWEEP.end(Path(folder))  # the first of all takes longer than any other
    with tqdm(total=count, unit="kill", disable=None) as bar:
        while len(found) < count:
            for right in survives(next(jobs), draw):
                found.append(right)
                bar.update()
    print(f"survived {sum(found)} of {len(found)}")
    return {"kills": len(found), "survived": sum(found)}
