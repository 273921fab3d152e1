"""How long runs are expected to take, and what a run says where nobody watches a bar."""

import io
import itertools
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tqdm.std
from jobs import CPU, MakeSpec

from fedlib.engines.in_process import InProcess
from fedlib.runs import pace, progress, rounds
from fedlib.runs.progress import expect, tell


def timed(seconds: Any) -> dict[str, Any]:
    return {"made": {"seconds": seconds}}


def test_the_nearest_records_tell_how_long_it_takes(tiny: MakeSpec) -> None:
    own, like, far = (tiny(name=name, label=label) for name, label in (("a", "x"), ("b", "x"), ("c", "y")))
    known = [(own, timed(600)), (like, timed(1200)), (far, None)]
    assert expect([own], known, 2, on_cpu=False) == "about 10 minutes by the records' own times"
    assert expect([tiny(name="d", label="x")], known, 2, on_cpu=False) == "about 15 minutes by the records' own times"
    assert expect([far, own], known, 2, on_cpu=False) == "about 12 minutes by the records' own times", (
        "900 and 600 s on two"
    )
    other = tiny(name="e", group="other")
    assert (
        expect([own, other], known, 4, on_cpu=False)
        == "about 5 minutes by the records' own times; of 1 more no record says"
    )
    edited = [timed(seconds) for seconds in ("long", -5, -math.inf, math.inf, math.nan, 10**400)]
    records: list[dict[str, Any] | None] = [None, {}, {"made": None}, *edited]
    for nothing in records:
        assert expect([own], [(own, nothing)], 2, on_cpu=False) == "no record says how long that takes"


def test_what_no_record_tells_is_timed_here(tiny: MakeSpec) -> None:
    """Twice the rounds take twice as long, whatever the machine; what records tell is believed."""
    one, few = tiny(rounds=2, cohort=2, epochs=1, evaluate_every=1), {"evaluate_every": 1}
    others = [tiny(rounds=4, cohort=2, epochs=1, **few), tiny(rounds=2, cohort=2, epochs=1, evaluate_every=2)]
    seconds = pace.measure([one, *others])
    assert 0 < seconds(one) < 60
    assert seconds(others[0]) == pytest.approx(2 * seconds(one)), "rounds"
    assert seconds(others[1]) < seconds(one), "evaluated once only"
    learning = [
        pace.measure([one])(tiny(rounds=2, cohort=cohort, epochs=epochs, evaluate_every=2))
        for cohort, epochs in ((1, 1), (2, 2))
    ]
    assert learning[1] > learning[0]
    slow = tiny(name="a", label="x")
    said = expect([slow, tiny(name="e", group="other")], [(slow, timed(6000))], 2, on_cpu=True)
    assert said == "about 50 minutes by the records' own times and local steps timed here"
    assert re.fullmatch(r"about .+ by local steps timed here", expect([slow], [(slow, None)], 2, on_cpu=True))


@pytest.mark.parametrize(
    "seconds, words",
    [(0.2, "a second"), (89, "89 seconds"), (100, "2 minutes"), (5399, "90 minutes"), (5400, "1.5 hours")],
)
def test_units(seconds: float, words: str) -> None:
    assert tell(seconds) == words


def test_a_line_now_and_then_without_a_terminal(
    tiny: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    rounds.run(tiny(rounds=3), InProcess(CPU), root=tmp_path)
    assert "round" not in said.getvalue(), "a run of seconds says nothing"
    monkeypatch.setattr(progress, "EVERY", 0.0)
    rounds.run(tiny(rounds=3), InProcess(CPU), root=tmp_path)
    lines = [line for line in said.getvalue().splitlines() if ": round " in line]
    assert [line.split(",")[0].split(": ")[1] for line in lines] == [f"round {n} of 3" for n in (1, 2, 3)]
    assert lines[-1].endswith("left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("jumps", [(-1e6, 0.0), (1e6, 0.0), (0.0, -1e6, 1e6, 0.0, -1e9)], ids=["back", "ahead", "both"])
def test_a_clock_that_jumps_moves_no_time(
    tiny: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jumps: tuple[float, ...]
) -> None:
    """In a record, on the bar of a terminal, in the lines of a log."""
    wall, jump = time.time, itertools.cycle(jumps)
    for owner in (time, tqdm.std):  # which holds the function itself
        monkeypatch.setattr(owner, "time", lambda: wall() + next(jump))
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        found = rounds.run(tiny(rounds=12, evaluate_every=1), InProcess(CPU), root=tmp_path)
        seconds = [found["made"]["seconds"], *(entry["seconds"] for entry in found["rounds"])]
        assert all(0 <= each < 3600 for each in seconds)
        said = stream.getvalue()
        assert said.count("round 12 of 12, a second left") == (not stream.isatty())
        assert not stream.isatty() or "/12 [00:0" in said
        assert re.findall(r"-\d.*|\d{3}:\d\d", said) == [], "below zero, or days"
