"""How long it takes: before the first run, from what the records say of runs like these; during a run, a bar on a
terminal, and a line a minute where standard error is none.

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

from fedlib.runs.record import Record
from fedlib.runs.spec import Spec

EVERY = 60.0  # seconds between two lines
LONGEST = 1e8  # seconds that a record may say its run took: three years


def expect(todo: Sequence[Spec], planned: Iterable[tuple[Spec, Record | None]], processes: int) -> str:
    """How long runs will take, by their own old records, or else by those of their method and group, or their group."""
    known: dict[tuple[str, ...], list[float]] = {}
    for spec, found in planned:
        seconds = ((found or {}).get("made") or {}).get("seconds")
        if isinstance(seconds, int | float) and 0 <= seconds < LONGEST:  # an edited record may say anything
            for key in _keys(spec):
                known.setdefault(key, []).append(seconds)
    total, unknown = 0.0, 0
    for spec in todo:
        times = next((known[key] for key in _keys(spec) if key in known), None)
        total, unknown = (total + statistics.mean(times), unknown) if times else (total, unknown + 1)
    if unknown == len(todo):
        return "no record says how long that takes"
    more = f"; of {unknown} more no record says" if unknown else ""
    return f"about {tell(total / min(processes, len(todo)))} by the records' own times{more}"


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
