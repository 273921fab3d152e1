"""Functions called in the workers of a pool; they must be a module's own, since workers import them."""

import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fedlib.engines.in_process import InProcess
from fedlib.engines.pool import Pool
from fedlib.errors import PayloadError, RunError


def later(engine: InProcess, number: int, seconds: float) -> tuple[int, str, bool]:
    time.sleep(seconds)
    return number, engine.name, multiprocessing.parent_process() is not None


def message_of(engine: InProcess, number: int, size: int) -> bytes:
    return bytes([number]) * size


def odd_only(engine: InProcess, number: int) -> int:
    if number % 2 == 0:
        raise LookupError(f"{number} is even")
    return number


def refuse(engine: InProcess) -> None:
    raise PayloadError("not a record")


class TwoPartError(Exception):
    """Pickles, but its class cannot be called again with what was pickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)
        self.two = two


def fail_in_two_parts(engine: InProcess) -> None:
    raise TwoPartError("one", "two")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as opened:
        yield opened


@pytest.fixture
def mortal() -> Iterator[Pool]:
    """A pool of one process that the test may ruin."""
    with Pool(1) as opened:
        yield opened


@pytest.mark.timeout(60)
def test_results_come_in_order_whoever_is_done_first(pool: Pool) -> None:
    found = list(pool.call(later, [(k, 0.1 if k in (0, 3) else 0.0) for k in range(7)]))
    assert found == [(k, "InProcess", True) for k in range(7)]
    assert list(pool.call(later, [])) == []
    assert list(pool.call(later, [(5, 0.0)])) == [(5, "InProcess", True)]


@pytest.mark.timeout(60)
def test_messages_pass_between_processes(pool: Pool) -> None:
    """Growing and shrinking, two on their way at once in each worker, and again with the same shelves."""
    sizes = [1, 5, 3, 70_000, 200_000, 2, 199_999, 300_000, 300_001, 7]
    for _ in range(2):
        found = list(pool.call(message_of, list(enumerate(sizes))))
        assert found == [bytes([number]) * size for number, size in enumerate(sizes)]


@pytest.mark.timeout(60)
def test_a_message_without_bytes_ends_no_worker(mortal: Pool) -> None:
    assert list(mortal.call(message_of, [(1, 0), (2, 3), (3, 0)])) == [b"", b"\2\2\2", b""]


@pytest.mark.timeout(60)
def test_an_error_is_raised_in_its_turn_and_the_pool_goes_on(pool: Pool) -> None:
    begun = pool.call(odd_only, [(1,), (3,), (4,), (5,), (6,)])
    assert [next(begun), next(begun)] == [1, 3]
    with pytest.raises(LookupError, match="4 is even"):
        next(begun)
    assert list(pool.call(odd_only, [(7,), (9,), (11,)])) == [7, 9, 11]


@pytest.mark.timeout(60)
def test_an_update_that_cannot_be_sent_is_no_result_of_a_call(pool: Pool) -> None:
    """In a round it stands for the client's upload; whoever called a function would take it for its result."""
    with pytest.raises(PayloadError, match="not a record"):
        list(pool.call(refuse, [()]))


@pytest.mark.timeout(25)
@pytest.mark.parametrize("function", [fail_in_two_parts, lambda engine: None], ids=["error", "function"])
def test_what_cannot_be_passed_is_an_error_and_leaves_nobody_waiting(mortal: Pool, function: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017 - pickle's own, of whatever type
        list(mortal.call(function, [()]))
    if mortal.workers:
        assert list(mortal.call(odd_only, [(1,), (3,)])) == [1, 3]
    else:
        with pytest.raises(RunError):
            list(mortal.call(odd_only, [(1,), (3,)]))
