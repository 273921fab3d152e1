"""One grid on several machines: every run in exactly one share, of about equal time.

    python -m fedlib run fedmrn --profile night --share 3/16

Shares are dealt once, by the first process that asks, and kept in `.cache/shares`: another that starts later would see
other records, and deal otherwise. Machines that share no disk deal alike where they have the same commit and the same
records when they begin.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fedlib.errors import SpecError
from fedlib.runs import progress
from fedlib.runs.record import Record, write
from fedlib.runs.spec import Spec

Planned = Sequence[tuple[Spec, Record | None, str]]  # as `record.fresh` gives them


def parse(text: str) -> tuple[int, int]:
    """`3/16`: the third of sixteen shares. SpecError: anything else."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise SpecError(f"share: {text!r} must be a number from 1 to N and N, such as 3/16 for the third of sixteen")
    return number, count


def take(planned: Planned, share: str, folder: Path) -> Planned:
    """The part of the planned runs that is this share's. folder: where it is kept how they were dealt."""
    number, count = parse(share)
    runs = sorted(f"{spec.paper}/{spec.profile}/{spec.name}" for spec, _, _ in planned)
    kept = folder / f"{hashlib.sha256(json.dumps([count, runs]).encode()).hexdigest()[:16]}-{count}.json"
    if not kept.exists():
        _keep_first(kept, json.dumps(deal(planned, count), indent=1).encode())
    dealt = json.loads(kept.read_text(encoding="utf-8"))
    return [each for each in planned if dealt[each[0].name] == number]


def deal(planned: Planned, count: int) -> dict[str, int]:
    """By name of a run the number of its share, from 1: the longest first, each to the share with least to do.

    How long a run takes is told by records; one that has a fresh record takes no time.
    """
    known = progress.known((spec, found) for spec, found, _ in planned)
    told = {spec.name: progress.guess(spec, known) if reason else 0.0 for spec, _, reason in planned}
    usual = [seconds for seconds in told.values() if seconds]
    unknown = sum(usual) / len(usual) if usual else 1.0
    times = {name: unknown if seconds is None else seconds for name, seconds in told.items()}
    loads, dealt = [0.0] * count, dict[str, int]()
    for name in sorted(times, key=lambda name: (-times[name], name)):
        least = loads.index(min(loads))
        loads[least] += times[name]
        dealt[name] = least + 1
    return dealt


def _keep_first(target: Path, content: bytes) -> None:
    """Write a file, unless another process has been first."""
    own = target.with_suffix(f".{os.getpid()}.json")
    write(own, content)
    with contextlib.suppress(FileExistsError):
        os.link(own, target)
    own.unlink()
