"""A grid dealt to several processes: every run in one share, whatever happens between their starts."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import projects
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import MakeSpec

from fedlib.__main__ import main
from fedlib.errors import DataError, SpecError
from fedlib.runs import shares
from fedlib.runs.record import Record
from fedlib.runs.spec import Spec

Row = tuple[Spec, Record | None, str]


def row(tiny: MakeSpec, name: str, seconds: float | None = None, fresh: bool = False) -> Row:
    found: dict[str, Any] | None = None if seconds is None else {"made": {"seconds": seconds}}
    return tiny(name=name, group=name, label=name), found, "" if fresh else "code has changed"


def test_the_longest_first_each_to_the_one_with_least_to_do(tiny: MakeSpec) -> None:
    planned = [row(tiny, name, seconds) for name, seconds in zip("abcdef", (7, 6, 5, 4, 3, 2), strict=True)]
    # 7; 6; then 5 to the 6, 4 to the 7; 3 to the 11 that stands first, 2 to the other
    assert shares.deal(planned, 2) == {"a": 1, "b": 2, "c": 2, "d": 1, "e": 1, "f": 2}


def test_unknown_runs_take_the_mean_and_fresh_ones_are_dealt_by_themselves(tiny: MakeSpec) -> None:
    planned = [row(tiny, "long", 9), row(tiny, "short", 1), row(tiny, "new")]
    dealt = shares.deal(planned, 2)
    assert dealt["long"] == 1 and dealt["new"] == dealt["short"] == 2  # 9 against 5 + 1
    done = [row(tiny, f"done{number}", 100, fresh=True) for number in range(8)]
    with_fresh = shares.deal([*planned, *done], 2)
    assert {name: with_fresh[name] for name in dealt} == {"new": 1, "long": 2, "short": 2}  # the mean is longer now
    assert sorted(with_fresh[spec.name] for spec, _, _ in done) == [1] * 4 + [2] * 4


@given(count=st.integers(1, 9), runs=st.integers(0, 30), data=st.data())
def test_every_run_is_in_one_share(count: int, runs: int, data: Any, tmp_path_factory: Any) -> None:
    from known_answers import TINY

    def one(number: int) -> Row:
        seconds = data.draw(st.none() | st.floats(0, 1e4))
        spec = Spec.from_dict(TINY | {"name": f"run{number}", "label": f"run{number}"})
        return (
            spec,
            None if seconds is None else {"made": {"seconds": seconds}},
            data.draw(st.sampled_from(["", "old"])),
        )

    folder = tmp_path_factory.mktemp("shares")
    planned = [one(number) for number in range(runs)]
    taken = [
        spec.name for number in range(count) for spec, _, _ in shares.take(planned, f"{number + 1}/{count}", folder)
    ]
    assert sorted(taken) == sorted(spec.name for spec, _, _ in planned)


def test_a_process_that_starts_later_deals_alike(tiny: MakeSpec, tmp_path: Path) -> None:
    before = [row(tiny, name, 1) for name in "abcdef"]
    first = shares.take(before, "1/2", tmp_path)
    after = [row(tiny, name, 50, fresh=name in "abc") for name in "abcdef"]
    second = shares.take(after, "2/2", tmp_path)
    assert sorted(spec.name for spec, _, _ in [*first, *second]) == list("abcdef")
    assert len(list(tmp_path.iterdir())) == 1


def keep(folder: Path, text: bytes) -> None:
    os.getpid = lambda: 7  # in containers of their own all may have the same
    shares._keep_first(folder / "dealt.json", text)


def test_of_many_at_once_the_first_is_kept_whole(tmp_path: Path) -> None:
    texts = [bytes([65 + number]) * 100_000 for number in range(8)]
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=keep, args=(tmp_path, text)) for text in texts]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 8
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() in texts


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", '{"a": '])
def test_a_damaged_file_is_named(tiny: MakeSpec, tmp_path: Path, text: str) -> None:
    planned = [row(tiny, "a", 1)]
    shares.take(planned, "1/1", tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(text)
    with pytest.raises(DataError, match=r"-1\.json: does not say how runs were dealt .*; remove it"):
        shares.take(planned, "1/1", tmp_path)


def test_two_commands_make_the_grid_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projects.small(tmp_path)
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    records = tmp_path / "records" / "fedmrn" / "smoke"
    for number in (1, 2):
        assert main([*projects.RUN, "--share", f"{number}/2"]) == 0
        assert len(list(records.glob("*.json"))) == number
    assert main([*projects.RUN, "--share", ""]) == 2  # a variable that is not set


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1.0/4", " 1/4", "1/9999999"])
def test_what_is_no_share_is_named(text: str) -> None:
    with pytest.raises(SpecError, match=r"share: .* must be a number from 1 to N and N, such as 3/16"):
        shares.parse(text)
