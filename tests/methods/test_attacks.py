"""Hostile inputs from a fuzzer, and those that once broke something, over everything that reads bytes from outside.

`bench/fuzz.py` finds them; `tests/attacks` keeps the few that reach all of the code that it reached.
"""

import pytest
import receivers
from common import range_coded
from hypothesis import given
from hypothesis import strategies as st
from receivers import END, Edit, edited, file_of, from_bytes, from_text, kept, receiver, to_bytes, to_text

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    range_coded,
    # As in a run: a warning that the tests make an error would end as the refusal of a broadcast, and hide a fault.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
LONGEST = 300_000  # bytes of all that is kept

# What once broke something: whom it was sent to, and the edits. All is refused.
BROKE = {
    "a count of 2,100 bytes": ("fedmrn coded up", "1@0-end+01 1@1+80*2100 1@2101+01"),
    "the same to the decoder alone": ("entropy bits", "0@0-end+01 0@1+80*2100 0@2101+01"),
    "levels of width 16 in steps of 1e38": ("feddq symmetric up", "0@0-end+10000000009976967e*2 1@0-end+ff*9472"),
    "noise of magnitude 3e38": ("fedmrn signed down", "0@18944-4+e6b1617f"),
    "noise of magnitude 0": ("fedmrn signed down", "0@18944-4+00000000"),
    "noise of magnitude -1": ("fedmrn signed down", "0@18944-4+000080bf"),
}


@pytest.mark.parametrize(("name", "line"), BROKE.values(), ids=BROKE)
def test_what_once_broke_something_is_refused(name: str, line: str) -> None:
    assert not receiver(name).reads(line)


@pytest.mark.parametrize("name", receivers.NAMES)
def test_kept_inputs_are_refused_or_read_rightly(name: str) -> None:
    target = receiver(name)
    assert target.reads(""), "what an honest sender writes is read"
    for line in kept(name):
        target.reads(line)


def test_what_is_kept_is_little_and_belongs_to_somebody() -> None:
    files = set(receivers.KEPT.iterdir())
    assert files <= {file_of(name) for name in receivers.NAMES}
    assert sum(file.stat().st_size for file in files) <= LONGEST


@given(st.binary(max_size=80))
def test_any_bytes_are_edits_that_can_be_written_down(data: bytes) -> None:
    edits = from_bytes(data)
    assert from_text(to_text(edits)) == edits and from_bytes(to_bytes(edits)) == edits


def test_edits_follow_one_another() -> None:
    edits = [Edit(0, 2, 1, b"xy", 2), Edit(0, 8, 3), Edit(5, 9, END, b"z"), Edit(1, 1, END)]
    assert to_text(edits) == "0@2-1+7879*2 0@8-3 5@9-end+7a 1@1-end" and from_text(to_text(edits)) == edits
    assert edited([b"abcdef", b"ghi"], edits) == [b"abxyxyde", b"g", b"z"]
    assert edited([b"a", b"b", b"c", b"d"], [Edit(4, 0, 0, b"e")]) == [b"a", b"b", b"c", b"d"]  # no message has five
