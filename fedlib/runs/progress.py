"""How long it takes: before the first run, from what the records say of runs like these, or from steps timed here;
during a run, a bar on a terminal, and a line a minute where standard error is none.

Runs side by side (fedlib.runs.grid) show no bar: their parent tells when each is done.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fedlib.runs import pace
from fedlib.runs.record import Record
from fedlib.runs.spec import Spec

EVERY = 60.0  # seconds between two lines
LONGEST = 1e8  # seconds that a record may say its run took: three years


Times = dict[tuple[str, ...], list[float]]  # seconds that runs took, by what tells how long one takes


def known(planned: Iterable[tuple[Spec, Record | None]]) -> Times:
    """What the records say, old ones too."""
    found: Times = {}
    for spec, record in planned:
        seconds = ((record or {}).get("made") or {}).get("seconds")
        if isinstance(seconds, int | float) and 0 <= seconds < LONGEST:  # an edited record may say anything
            for key in _keys(spec):
                found.setdefault(key, []).append(seconds)
    return found


def guess(spec: Spec, times: Times) -> float | None:
    """Seconds of a run: by its own old record, or else by those of its method and group, or of its group."""
    found = next((times[key] for key in _keys(spec) if key in times), None)
    return statistics.mean(found) if found else None


def expect(todo: Sequence[Spec], planned: Iterable[tuple[Spec, Record | None]], processes: int, on_cpu: bool) -> str:
    """How long runs will take: by what records say of runs like these, or, on a CPU, by local steps timed here."""
    times = known(planned)
    told = [seconds for spec in todo if (seconds := guess(spec, times)) is not None]
    others = [spec for spec in todo if guess(spec, times) is None]
    ways, left = ["the records' own times"] * bool(told), ""
    if others and on_cpu:
        timed = pace.measure(others)
        told += map(timed, others)
        ways += ["local steps timed here"]
    elif others:
        left = f"; of {len(others)} more no record says"
    if not told:
        return "no record says how long that takes"
    return f"about {tell(sum(told) / min(processes, len(todo)))} by {' and '.join(ways)}{left}"


def _keys(spec: Spec) -> tuple[tuple[str, ...], ...]:
    """What tells how long a run takes, the nearest first."""
    return (spec.group, spec.label, spec.name), (spec.group, spec.label), (spec.group,)


def tell(seconds: float) -> str:
    """In the unit in which it is easily read."""
    if seconds < 90:
        return "a second" if seconds < 1.5 else f"{round(seconds)} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def steady(bar: tqdm[Any]) -> tqdm[Any]:
    """A bar by a clock that nobody sets: when the machine's own jumps back, tqdm tells times below zero."""
    bar._time = time.monotonic  # type: ignore[attr-defined]
    bar.start_t = bar.last_print_t = time.monotonic()
    return bar


class Bar:
    def __init__(self, spec: Spec, done: list[dict[str, Any]]) -> None:
        self.name, self.rounds, self.first = spec.name, spec.rounds, len(done)
        self.begin = self.said = time.monotonic()
        self.line: tqdm[Any] | None = None
        if multiprocessing.parent_process() is None:
            self.line = steady(
                tqdm(total=spec.rounds, initial=len(done), desc=spec.name, unit="round", disable=None, leave=False)
            )
        self.bytes = sum(entry["uplink_bytes"] for entry in done)

    def show(self, entry: dict[str, Any]) -> None:
        self.bytes += entry["uplink_bytes"]
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self.said >= EVERY:
            number = entry["round"]
            left = (now - self.begin) / (number - self.first) * (self.rounds - number)
            print(f"{self.name}: round {number} of {self.rounds}, {tell(left)} left", file=sys.stderr, flush=True)
            self.said = now
        if self.line is None:
            return
        if entry["accuracy"] is not None:
            self.line.set_postfix_str(f"accuracy {entry['accuracy']:.1%}, uplink {self.bytes / 1e6:.1f} MB")
        self.line.update()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.line is not None:
            self.line.close()
