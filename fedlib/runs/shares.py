"""One grid on several machines: every run in exactly one share, of about equal time.

    python -m fedlib run fedmrn --profile night --share 3/16

Shares are dealt once, by the first process that asks, and kept in `.cache/shares`: another that starts later would see
other records, and deal otherwise. Machines that share no disk deal alike where they begin with the same commit, the
same records and no kept shares.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

from fedlib.errors import DataError, SpecError
from fedlib.runs import progress
from fedlib.runs.digest import code_of
from fedlib.runs.record import UNFINISHED, Record, write
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
    """The part of the planned runs that is this share's. folder: where it is kept how they were dealt.

    DataError: a kept file that does not say it.
    """
    number, count = parse(share)
    runs = sorted([spec.paper, spec.profile, spec.name, code_of(spec)] for spec, _, _ in planned)
    kept = folder / f"{hashlib.sha256(json.dumps([count, runs]).encode()).hexdigest()[:16]}-{count}.json"
    if not kept.exists():
        _keep_first(kept, json.dumps(deal(planned, count), indent=1).encode())
    try:
        dealt = json.loads(kept.read_text(encoding="utf-8"))
        return [each for each in planned if dealt[each[0].name] == number]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{kept}: does not say how runs were dealt ({type(error).__name__}); remove it") from error


def deal(planned: Planned, count: int) -> dict[str, int]:
    """By name of a run the number of its share, from 1: the longest first, each to the share with least to do.

    How long a run takes is told by records. Those that have a fresh one are dealt by themselves, as they are trained
    only if asked for again.
    """
    known = progress.known((spec, found) for spec, found, _ in planned)
    guesses = {spec.name: progress.guess(spec, known) for spec, _, _ in planned}
    told = [seconds for seconds in guesses.values() if seconds is not None]
    usual = sum(told) / len(told) if told else 1.0
    times = {name: usual if seconds is None else seconds for name, seconds in guesses.items()}
    dealt = dict[str, int]()
    for fresh in (False, True):
        own = [spec.name for spec, _, reason in planned if fresh != bool(reason)]
        loads = [0.0] * count
        for name in sorted(own, key=lambda name: (-times[name], name)):
            least = loads.index(min(loads))
            loads[least] += times[name]
            dealt[name] = least + 1
    return dealt


def _keep_first(target: Path, content: bytes) -> None:
    """Write a file, unless another process, on whichever machine, has been first."""
    own = target.with_name(f".{target.name}.{uuid.uuid4().hex}{UNFINISHED}")
    write(own, content)
    try:
        os.link(own, target)
    except FileExistsError:
        pass
    except OSError as error:
        raise DataError(f"{target}: this disk has no hard links ({error.strerror}); deal shares on another") from error
    finally:
        own.unlink(missing_ok=True)
