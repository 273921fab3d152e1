"""Proof by running that two states of the code make equal records; only then do records get the new code's digest.

For every kind of run among the records, which is a combination of method, network, data set and options, the code of a
commit and the code that stands here train the first rounds, or all where they are cheap, on this machine. They must
agree in every byte of the records but times and the machine. What this cannot prove: that runs of one kind with other
numbers, later rounds, or a processor of another kind agree too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from fedlib.core.method import AnyMethod
from fedlib.data import sources
from fedlib.data.sources import home
from fedlib.engines.in_process import InProcess
from fedlib.errors import RunError, SpecError
from fedlib.runs import machine, record, rounds
from fedlib.runs.digest import PACKAGE, code_of
from fedlib.runs.progress import steady
from fedlib.runs.spec import Spec

CHEAP = 4.0  # seconds up to which all rounds are run
FIRST = 2  # rounds of other runs
CODE = "code has changed"
Replay = subprocess.Popen[str]


def replay(lines: IO[str], out: IO[str]) -> None:
    """Answer each line of JSON with one: a spec with the part of its record that every machine like this one gives; the
    file of a record, {"file": path}, with why the record does not count for its own spec, empty where it does."""
    for line in lines:
        asked = json.loads(line)
        answer = {"reason": _reason(Path(asked["file"]))} if "file" in asked else _made(Spec.from_dict(asked))
        print(json.dumps(answer), file=out, flush=True)


def _made(spec: Spec) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = record.stable(rounds.run(spec, InProcess(torch.device("cpu")), root=Path(folder)))
        except RunError as error:
            return {"error": str(error)}
    return {name: value for name, value in made.items() if name != "code"}


def _reason(file: Path) -> str:
    found = record.read(file)
    try:
        return record.stale(found, Spec.from_dict(found["spec"]))
    except SpecError as error:  # of a run that this code does not know
        return str(error)


def kind(spec: Spec) -> str:
    """All that chooses code: names and switches; of numbers whether they are 0, 1 or the default."""
    chosen = [spec.method, spec.model, spec.data, spec.partition["kind"], spec.sampling, spec.optimizer, spec.frozen]
    switches = [spec.persistent, spec.feedback, spec.momentum > 0, spec.held_out > 0]
    writer = [spec.writer.name, _options(spec.writer)] if spec.writer else None
    return json.dumps([*chosen, *switches, _options(spec.chosen), writer])


def _options(method: AnyMethod) -> dict[str, Any]:
    defaults = method.defaults()
    return {
        name: value if isinstance(value, str | bool) else [value == 0, value == 1, value == defaults[name]]
        for name, value in method.settings.items()
    }


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run that stands for all of its kind."""

    spec: Spec
    rounds: int
    seconds: float  # that its record says these rounds took
    given: dict[str, Any]  # the spec as the record has it, which older code can read

    @property
    def shortened(self) -> dict[str, Any]:
        return self.given | {"rounds": self.rounds}


def trials(records: Sequence[record.Record]) -> list[Trial]:
    """For each kind the run that was fastest, in the order of the records."""
    found: dict[str, Trial] = {}
    for entry in records:
        spec, seconds = Spec.from_dict(entry["spec"]), entry["made"]["seconds"]
        count = spec.rounds if seconds <= CHEAP else min(FIRST, spec.rounds)
        one = Trial(spec, count, seconds * count / spec.rounds, entry["spec"])
        best = found.setdefault(kind(spec), one)
        if one.seconds < best.seconds:
            found[kind(spec)] = one
    return list(found.values())


def prove(commit: str) -> Path | None:
    """Compare, then stamp; the file that tells what was run, or None where no record needs it.

    Stopped and started again, it goes on. RunError names the first run that differs; then nothing is stamped.
    """
    old = _git("rev-parse", "--verify", "-q", f"{commit}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "old"
        _git("worktree", "add", "--detach", str(tree), old)
        try:
            with _replaying(tree) as before, _replaying(PACKAGE.parent) as now:
                return _proved(old, before, now)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _proved(old: str, before: Replay, now: Replay) -> Path | None:
    files = sorted((home() / "records").glob("*/*/*.json"))
    stale = [file for file in files if _reason(file) == CODE]
    stamped = [file for file in stale if _answer(before, {"file": str(file)})["reason"] == ""]
    print(f"{len(files)} records, {len(stale)} stale for their code alone; of these {len(stamped)} count at {old[:12]}")
    if not stamped:
        return None
    loaded = [record.read(file) for file in stamped]
    todo = trials(loaded)
    for name in dict.fromkeys(trial.spec.data for trial in todo):
        sources.verify(name)  # now, not after minutes
    seconds = sum(trial.seconds for trial in todo)
    print(f"{len(todo)} kinds of run to compare, in about {seconds / 60:.0f} minutes on two quiet cores", flush=True)
    ran = _compared(todo, old, before, now)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    log = {
        "old": old,
        "time": when,
        "machine": machine.processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "records": len(stamped),
        "equal": ran,
    }
    folder = home() / "records" / "proofs"
    tried = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (folder / f"{when[:10]}-{old[:12]}{more}.json" for more in tried)
    target = next(name for name in names if not name.exists())  # no proof takes the place of another
    record.write(target, (json.dumps(log, indent=1) + "\n").encode())  # first: no stamp without its proof
    for file, entry in zip(stamped, loaded, strict=True):
        entry["code"] = code_of(Spec.from_dict(entry["spec"]))
        record.write(file, record.text(entry).encode())
    return target


def _compared(todo: Sequence[Trial], old: str, before: Replay, now: Replay) -> list[dict[str, Any]]:
    """What was run; RunError at the first difference. A file under .cache remembers what was equal."""
    cache = home() / ".cache" / "proofs" / f"{old}.jsonl"
    known = cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []
    ran = []
    for trial in steady(tqdm(todo, unit="run", disable=None)):
        key = json.dumps([trial.shortened, code_of(trial.spec)], sort_keys=True)
        if key not in known:
            _ask(before, trial.shortened)
            _ask(now, trial.shortened)
            first, second = map(_with_defaults, (_told(before), _told(now)))
            if first != second:
                raise RunError(f"{trial.spec.name} differs in {_difference(first, second)}; no record was stamped")
            known.append(key)
            record.write(cache, "".join(f"{line}\n" for line in known).encode())
        ran.append({"run": f"{trial.spec.paper}/{trial.spec.profile}/{trial.spec.name}", "rounds": trial.rounds})
    return ran


def _with_defaults(made: dict[str, Any]) -> dict[str, Any]:
    """A record with all fields of today's spec, of which the older code may lack some."""
    return made | {"spec": record.spec_of(made)} if "spec" in made else made


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Where two records part: "round 2: accuracy 0.5, 0.25"."""
    for one, other in zip(first.get("rounds", []), second.get("rounds", []), strict=False):
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                return f"round {one['round']}: {name} {one.get(name)}, {other.get(name)}"
    return ", ".join(name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name))


@contextlib.contextmanager
def _replaying(tree: Path) -> Iterator[Replay]:
    """The code of a tree, which answers as `replay` does; data and records are those of this project."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlib", "replay"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "FEDLIB_HOME": str(home().resolve())},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):  # of a question that nobody was there to read
            process.stdin.close()
        process.stdout.close()
        process.wait()


def _ask(process: Replay, question: dict[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # whoever has ended gives no answer either
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()


def _told(process: Replay) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RunError("the code of one side ended without an answer, for the reason above; no record was stamped")
    return dict(json.loads(line))


def _answer(process: Replay, question: dict[str, Any]) -> dict[str, Any]:
    _ask(process, question)
    return _told(process)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(home()), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"git {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout.strip()
