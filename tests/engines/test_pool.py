"""The pool: the same record wherever the clients run, calls in its workers, and a clear end when a process dies."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import projects
import pytest
import torch
from common import ROOT, session
from jobs import CPU, MakeSpec, job_of, message_of, ran
from typing_extensions import override

from fedlib.core.client import Job, Memories, Upload
from fedlib.engines.automatic import Auto
from fedlib.engines.in_process import InProcess
from fedlib.engines.pool import Pool
from fedlib.errors import PayloadError, RunError
from fedlib.runs import rounds

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"method": "fedavg"},
    "binary": {"method": "fedmrn", "hyper": {"mask": "binary", "magnitude": 0.05}},
    "signed": {"method": "fedmrn", "hyper": {"mask": "signed", "noise": "gauss", "magnitude": 0.05}},
}
Pools = Callable[[int], Pool]


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    """Pools by number of processes, started when first asked for."""
    started: dict[int, Pool] = {}

    def pool(processes: int) -> Pool:
        if processes not in started:
            started[processes] = Pool(processes)
        return started[processes]

    yield pool
    for each in started.values():
        each.close()


@pytest.fixture
def mortal() -> Iterator[Pool]:
    """A pool of two processes that the test may ruin."""
    with Pool(2) as pool:
        yield pool


# The same record everywhere


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_pool_gives_the_record_of_one_process(
    tiny: MakeSpec, pools: Pools, tmp_path: Path, method: str, processes: int
) -> None:
    # Unequal shards, so that clients of a round do not end in the order in which they began.
    spec = tiny(**METHODS[method], partition={"kind": "dirichlet", "beta": 0.3, "seed": 7}, cohort=5, rounds=4)
    expected = json.dumps(ran(spec, tmp_path))
    assert json.dumps(ran(spec, tmp_path, pools(processes))) == expected
    other = tiny(**METHODS[method], seed=1)
    assert json.dumps(ran(other, tmp_path, pools(processes))) != expected  # the comparison can fail


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["stays in process", "takes the pool"])
def test_auto_gives_the_record_of_one_process(tiny: MakeSpec, tmp_path: Path, early: bool) -> None:
    spec = tiny(**METHODS["binary"])
    with Auto(2) as auto:
        if early:
            auto.START = 0.0
        found = ran(spec, tmp_path, auto)
        assert (auto.pool is not None) == early
    assert json.dumps(found) == json.dumps(ran(spec, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "binary"])
def test_a_pool_gives_the_record_of_one_process_for_convolutions_with_batchnorm(
    tiny: MakeSpec, pools: Pools, tmp_path: Path, method: str
) -> None:
    if not (ROOT / "data" / "FashionMNIST").exists():
        pytest.skip("Fashion-MNIST is not here")
    partition = {"kind": "resampled", "size": 100, "seed": 1}
    spec = tiny(**METHODS[method], data="fashion-mnist", model="cnn4", partition=partition, cohort=3, rounds=1)
    assert json.dumps(ran(spec, tmp_path, pools(2))) == json.dumps(ran(spec, tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_uploads_and_memories_longer_than_a_pipe_holds_leave_nobody_waiting(
    tiny: MakeSpec, pools: Pools, tmp_path: Path
) -> None:
    """Adam's memory of a client goes down while uploads come up, 0.7 and 0.3 MB each."""
    large = tiny(model="mlp256", optimizer="adam", persistent=True, cohort=6, rounds=2)
    assert json.dumps(ran(large, tmp_path, pools(1))) == json.dumps(ran(large, tmp_path))


@pytest.mark.slow
def test_a_cohort_smaller_than_the_pool(tiny: MakeSpec, pools: Pools, tmp_path: Path) -> None:
    spec = tiny(cohort=1)
    assert json.dumps(ran(spec, tmp_path, pools(3))) == json.dumps(ran(spec, tmp_path))


def test_the_number_of_threads_changes_no_number_and_is_put_back(tiny: MakeSpec, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(json.dumps(ran(tiny(), tmp_path)))
            assert torch.get_num_threads() == threads
        assert len(found) == 1
    finally:
        torch.set_num_threads(before)


# Half-read rounds


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of the iterators that are cleared below
@pytest.mark.parametrize("held", [False, True], ids=["dropped", "still referred to"])
def test_a_round_left_half_way_does_not_answer_the_next_one(tiny: MakeSpec, mortal: Pool, held: bool) -> None:
    job, cohort = job_of(tiny()), [0, 1, 2, 3, 4, 5]
    message, kept = message_of(job), []
    try:
        for read in (1, 2, 5):
            begun = mortal.train(job, message, 1, cohort)
            for _ in range(read):
                next(begun)
            if held:
                kept.append(begun)  # as the traceback of a failed round does
            del begun
            found = list(mortal.train(job, message_of(job, 2), 2, [9, 8, 7]))
            assert found == list(InProcess(CPU).train(job, message_of(job, 2), 2, [9, 8, 7]))
    finally:
        mortal.close()  # first, so that clearing cannot wait for answers
        kept.clear()


@pytest.mark.slow
def test_a_client_that_raises_raises_here_and_the_pool_goes_on(tiny: MakeSpec, pools: Pools) -> None:
    job = job_of(tiny())
    message = message_of(job)
    for engine in (InProcess(CPU), pools(2)):
        with pytest.raises(KeyError, match="u"):  # a memory of what is fed back, under a method that feeds nothing back
            list(engine.train(job, message, 1, [0, 1, 2, 3], {1: b"1234"}))
    assert list(pools(2).train(job, message, 1, [4, 5])) == list(InProcess(CPU).train(job, message, 1, [4, 5]))


# Functions called in the workers; they must be a module's own, since workers import them


def later(engine: InProcess, number: int, seconds: float) -> tuple[int, str, bool]:
    time.sleep(seconds)
    return number, engine.name, multiprocessing.parent_process() is not None


def repeat(engine: InProcess, number: int, size: int) -> bytes:
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


@pytest.mark.timeout(60)
def test_results_come_in_order_whoever_is_done_first(pools: Pools) -> None:
    found = list(pools(2).call(later, [(k, 0.1 if k in (0, 3) else 0.0) for k in range(7)]))
    assert found == [(k, "InProcess", True) for k in range(7)]
    assert list(pools(2).call(later, [])) == []
    assert list(pools(2).call(later, [(5, 0.0)])) == [(5, "InProcess", True)]


@pytest.mark.timeout(60)
def test_messages_pass_between_processes(pools: Pools) -> None:
    """Growing and shrinking, two on their way at once in each worker, and again with the same shelves."""
    sizes = [1, 5, 3, 70_000, 200_000, 2, 199_999, 300_000, 300_001, 7]
    for _ in range(2):
        found = list(pools(2).call(repeat, list(enumerate(sizes))))
        assert found == [bytes([number]) * size for number, size in enumerate(sizes)]


@pytest.mark.timeout(60)
def test_a_message_without_bytes_ends_no_worker(mortal: Pool) -> None:
    assert list(mortal.call(repeat, [(1, 0), (2, 3), (3, 0)])) == [b"", b"\2\2\2", b""]


@pytest.mark.timeout(60)
def test_an_error_is_raised_in_its_turn_and_the_pool_goes_on(pools: Pools) -> None:
    begun = pools(2).call(odd_only, [(1,), (3,), (4,), (5,), (6,)])
    assert [next(begun), next(begun)] == [1, 3]
    with pytest.raises(LookupError, match="4 is even"):
        next(begun)
    assert list(pools(2).call(odd_only, [(7,), (9,), (11,)])) == [7, 9, 11]


@pytest.mark.timeout(60)
def test_an_update_that_cannot_be_sent_is_no_result_of_a_call(pools: Pools) -> None:
    """In a round it stands for the client's upload; whoever called a function would take it for its result."""
    with pytest.raises(PayloadError, match="not a record"):
        list(pools(2).call(refuse, [()]))


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


# Death


class Murdered(Pool):
    """In round 2 it loses a worker after the first upload."""

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        for pair in super().train(job, message, round, cohort, memories):
            yield pair
            if round == 2 and self.processes[0].is_alive():
                kill_one(self)


def kill_one(pool: Pool) -> None:
    process = pool.processes[0]
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_worker_killed_in_mid_run_ends_it_with_advice(tiny: MakeSpec, tmp_path: Path) -> None:
    with Murdered(2) as pool, pytest.raises(RunError, match=r"worker process died.*--engine process"):
        processes = list(pool.processes)
        rounds.run(tiny(cohort=10), pool, root=tmp_path)
    assert not any(process.is_alive() for process in processes)


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_worker_killed_between_rounds_is_noticed_and_the_ruined_pool_refuses_more(
    tiny: MakeSpec, mortal: Pool
) -> None:
    job = job_of(tiny())
    message = message_of(job)
    assert len(list(mortal.train(job, message, 1, [0, 1, 2]))) == 3
    kill_one(mortal)
    with pytest.raises(RunError, match="worker process died"):
        list(mortal.train(job, message_of(job, 2), 2, [0, 1, 2]))
    with pytest.raises(RunError):  # not a wait for answers that nobody will give
        list(mortal.train(job, message_of(job, 2), 2, [0, 1, 2]))


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m fedlib run` with a pool, in a session of its own, past its first checkpoint."""
    projects.write(tmp_path, settings={"rounds": 100_000})
    command = [sys.executable, "-m", "fedlib", "run", "tiny", "--profile", "smoke", "--device", "cpu"]
    run = subprocess.Popen(
        [*command, "--engine", "pool", "--processes", "2"],
        cwd=ROOT,
        env=os.environ | {"FEDLIB_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell, Ctrl-C is ignored, and children would inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(tmp_path.glob(".cache/checkpoints/tiny/smoke/*.safetensors")):
            assert run.poll() is None, run.communicate()
            time.sleep(0.1)
        yield run
    finally:
        for process in session(run.pid):
            os.kill(process, signal.SIGKILL)
        run.communicate()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_when_their_parent_is_killed(long_run: subprocess.Popen[str]) -> None:
    assert len(session(long_run.pid)) >= 3  # parent, two workers
    long_run.kill()
    long_run.wait()
    for _ in range(300):
        if not session(long_run.pid):
            return
        time.sleep(0.1)
    pytest.fail(f"left behind: {session(long_run.pid)}")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_control_c_stops_a_pool_with_one_line(long_run: subprocess.Popen[str]) -> None:
    os.killpg(long_run.pid, signal.SIGINT)  # as a terminal does
    _, errors = long_run.communicate(timeout=60)
    assert long_run.returncode == 130, errors
    assert "stopped" in errors
    assert "Traceback" not in errors
