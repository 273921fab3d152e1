"""The shelf by which a worker's uploads pass: messages of any size, in turn, as they were."""

import multiprocessing
import threading
from collections import deque
from multiprocessing import reduction
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedlib.engines.shared_memory import Laid, Shelf


def sides(places: int) -> tuple[Shelf, Shelf]:
    """The worker's and the parent's, at the ends of a real pipe."""
    ours, theirs = multiprocessing.Pipe()
    return Shelf(theirs, places), Shelf(ours, places)


def take(parent: Shelf) -> bytes:
    laid = parent.connection.recv()
    assert isinstance(laid, Laid)
    return bytes(parent.take(laid))


@pytest.mark.parametrize("places", [1, 2, 3])
def test_messages_of_any_size_arrive_as_they_were(places: int) -> None:
    worker, parent = sides(places)
    for number, size in enumerate((5, 5, 1, 0, 6, 100_000, 3, 0, 99_999, 100_001, 1)):
        message = bytes([number]) * size
        worker.put(message)
        laid = parent.connection.recv()
        assert laid == (size, size if size in (6, 100_000, 100_001) or number == 0 else 0), "a new shelf when it grows"
        assert bytes(parent.take(laid)) == message


def test_places_are_used_in_turns_and_a_larger_shelf_begins_anew() -> None:
    worker, parent = sides(3)
    for message in (b"aaaa", b"bb", b"cccc", b"dd"):
        worker.put(message)
        assert take(parent) == message
    assert worker.memory is not None and parent.memory is not None
    assert worker.memory[:] == parent.memory[:] == b"ddaabb\0\0cccc", "the very same memory"
    worker.put(b"eeeee")
    assert take(parent) == b"eeeee"
    assert parent.memory[:] == b"eeeee" + bytes(10)


def test_what_was_taken_stays_as_it_is() -> None:
    worker, parent = sides(2)
    kept = []
    for number in range(8):
        worker.put(bytes([number]) * 10)
        kept.append(parent.take(parent.connection.recv()))
    assert kept == [bytes([number]) * 10 for number in range(8)]
    kept[7][:] = b"0123456789"  # it is the parent's own
    assert worker.memory is not None and worker.memory[10:] == bytes([7]) * 10


@given(st.integers(1, 3), st.lists(st.binary(max_size=40) | st.none(), max_size=40))
@example(1, [b"", b"", b"then more", b""])
@example(2, [b"small", b"much larger" * 1000, b"x" * 20_000, b"y", b"1", b"2" * 30_000])
def test_a_shelf_is_a_queue(places: int, steps: list[bytes | None]) -> None:
    """None takes the oldest message; so does a message for which there is no place left."""
    worker, parent = sides(places)
    waiting: deque[bytes] = deque()
    for step in steps:
        if waiting and (step is None or len(waiting) == places):
            assert take(parent) == waiting.popleft()
        if step is not None:
            worker.put(step)
            waiting.append(step)
    while waiting:
        assert take(parent) == waiting.popleft()
    worker.connection.close()
    parent.connection.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_growing_leaves_no_open_files_behind() -> None:
    worker, parent = sides(2)
    counts = []
    for size in range(1, 60):
        worker.put(bytes(size))
        take(parent)
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert max(counts) == counts[0]


def test_a_job_that_waits_in_the_pipe_is_no_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS Python has the receipt of a descriptor acknowledged by a byte that comes back through the same pipe. A
    worker's next job lies there already, whenever it holds two."""
    monkeypatch.setattr(reduction, "ACKNOWLEDGE", True)
    worker, parent = sides(2)
    parent.connection.send(("client", 1, 7))
    failed: list[Exception] = []

    def put() -> None:
        try:
            worker.put(b"message")
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    try:
        assert take(parent) == b"message"
        thread.join(10)
        assert not thread.is_alive() and failed == []
        assert worker.connection.recv() == ("client", 1, 7)
    finally:
        parent.connection.close()
        thread.join(10)
