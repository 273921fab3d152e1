"""Engines: the same record wherever the clients run, and a clear end when a process dies."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedlib.engines import in_process, select
from fedlib.engines.automatic import Auto
from fedlib.engines.in_process import InProcess, Memories
from fedlib.engines.pool import Pool
from fedlib.engines.select import open_engine
from fedlib.errors import RunError
from fedlib.methods import registry
from fedlib.runs import record, rounds
from fedlib.runs.spec import Spec

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]
METHODS: list[dict[str, Any]] = [
    {"method": "fedavg"},
    {"method": "fedmrn", "hyper": {"mask": "binary", "magnitude": 0.05}},
    {"method": "fedmrn", "hyper": {"mask": "signed", "noise": "gauss", "magnitude": 0.05}},
]


def ran(spec: Spec, engine: Any, root: Path) -> str:
    """The repeatable part of a run's record, as text."""
    return json.dumps(record.stable(rounds.run(spec, engine, root=root)))


def first_message(spec: Spec) -> bytes:
    task = in_process.task_of(spec.key(), CPU)
    made: bytes = registry.METHODS[spec.method].broadcast(task.initial(), registry.hyper(spec.method, spec.hyper), task)
    return made


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[int], Pool]]:
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As `rounds.run` sets it; for tests that call an engine by themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The same record everywhere


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS, ids=["fedavg", "binary", "signed"])
def test_a_pool_gives_the_record_of_one_process(
    tiny: MakeSpec, pools: Callable[[int], Pool], tmp_path: Path, method: dict[str, Any], processes: int
) -> None:
    # Unequal shards, so that clients of a round do not end in the order in which they began.
    spec = tiny(**method, partition={"kind": "dirichlet", "beta": 0.3, "seed": 7}, cohort=5, rounds=4)
    expected = ran(spec, InProcess(CPU), tmp_path)
    assert ran(spec, pools(processes), tmp_path) == expected
    assert ran(tiny(**method, seed=1), pools(processes), tmp_path) != expected  # the comparison can fail


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["stays in process", "takes the pool"])
def test_auto_gives_the_record_of_one_process(tiny: MakeSpec, tmp_path: Path, early: bool) -> None:
    spec = tiny(**METHODS[1])
    with Auto(2) as auto:
        if early:
            auto.START = 0.0
        found = ran(spec, auto, tmp_path)
        assert (auto.pool is not None) == early
    assert found == ran(spec, InProcess(CPU), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[:2], ids=["fedavg", "binary"])
def test_a_pool_gives_the_record_of_one_process_for_convolutions_with_batchnorm(
    tiny: MakeSpec, pools: Callable[[int], Pool], tmp_path: Path, method: dict[str, Any]
) -> None:
    if not (ROOT / "data" / "FashionMNIST").exists():
        pytest.skip("Fashion-MNIST is not here")
    partition = {"kind": "resampled", "size": 100, "seed": 1}
    spec = tiny(**method, data="fashion-mnist", model="cnn4", partition=partition, cohort=3, rounds=1)
    assert ran(spec, pools(2), tmp_path) == ran(spec, InProcess(CPU), tmp_path)


@pytest.mark.slow
def test_a_cohort_smaller_than_the_pool(tiny: MakeSpec, pools: Callable[[int], Pool], tmp_path: Path) -> None:
    spec = tiny(cohort=1)
    assert ran(spec, pools(3), tmp_path) == ran(spec, InProcess(CPU), tmp_path)


def test_the_number_of_threads_changes_no_number_and_is_put_back(tiny: MakeSpec, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(ran(tiny(), InProcess(CPU), tmp_path))
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
def test_a_round_left_half_way_does_not_answer_the_next_one(
    tiny: MakeSpec, mortal: Pool, one_thread: None, held: bool
) -> None:
    spec, cohort = tiny(), [0, 1, 2, 3, 4, 5]
    message, kept = first_message(spec), []
    try:
        for read in (1, 2, 5):
            begun = iter(mortal.train(spec, message, 1, cohort))
            for _ in range(read):
                next(begun)
            if held:
                kept.append(begun)  # as the traceback of a failed round does
            del begun
            found = list(mortal.train(spec, message, 2, [9, 8, 7]))
            assert found == list(InProcess(CPU).train(spec, message, 2, [9, 8, 7]))
    finally:
        mortal.close()  # first, so that clearing cannot wait for answers
        kept.clear()


@pytest.mark.slow
def test_a_client_that_raises_raises_here_and_the_pool_goes_on(
    tiny: MakeSpec, pools: Callable[[int], Pool], one_thread: None
) -> None:
    spec = tiny()
    message = first_message(spec)
    for engine in (InProcess(CPU), pools(2)):
        with pytest.raises(IndexError):
            list(engine.train(spec, message, 1, [0, 1, 999, 2, 3]))  # there are ten clients
    assert list(pools(2).train(spec, message, 1, [4, 5])) == list(InProcess(CPU).train(spec, message, 1, [4, 5]))


# Death


class Murderer:
    """The real engine; before round `number` it kills one worker."""

    device = CPU

    def __init__(self, pool: Pool, number: int) -> None:
        self.pool, self.number = pool, number

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Any]]:
        for index, pair in enumerate(self.pool.train(spec, message, round, cohort, memories)):
            yield pair
            if round == self.number and index == 0:
                kill_one(self.pool)

    def evaluate(self, spec: Spec, state: Any) -> tuple[float, float]:
        return self.pool.evaluate(spec, state)


def kill_one(pool: Pool) -> None:
    process = pool.processes[0]
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_worker_killed_in_mid_run_ends_it_with_advice(tiny: MakeSpec, mortal: Pool, tmp_path: Path) -> None:
    processes = list(mortal.processes)
    with pytest.raises(RunError, match=r"worker process died.*--engine process"):
        rounds.run(tiny(cohort=10), Murderer(mortal, 2), root=tmp_path)  # type: ignore[arg-type]
    assert not any(process.is_alive() for process in processes)


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_worker_killed_between_rounds_is_noticed_and_the_ruined_pool_refuses_more(
    tiny: MakeSpec, mortal: Pool, one_thread: None
) -> None:
    spec = tiny()
    message = first_message(spec)
    assert len(list(mortal.train(spec, message, 1, [0, 1, 2]))) == 3
    kill_one(mortal)
    with pytest.raises(RunError, match="worker process died"):
        list(mortal.train(spec, message, 2, [0, 1, 2]))
    with pytest.raises(RunError):  # not a wait for answers that nobody will give
        list(mortal.train(spec, message, 2, [0, 1, 2]))


def session(leader: int) -> list[int]:
    """Living processes of a session (field 6 of /proc/PID/stat; field 3 is the state, Z when dead)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def long_run(tiny: MakeSpec, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m fedlib run` with a pool, in a session of its own, past its first checkpoint."""
    spec = tiny(rounds=100_000)
    fields = ("data", "model", "clients", "cohort", "rounds", "epochs", "batch", "evaluate_every")
    content = {
        "settings": {name: {"unit": "", "source": "test", "smoke": getattr(spec, name)} for name in fields},
        "methods": {"fedavg": {"method": "fedavg", "lr": 0.1, "hyper": {}, "source": "test"}},
        "partitions": {"iid": {"kind": "iid", "seed": 1}},
        "profiles": {"smoke": {"main": {"methods": ["fedavg"], "partitions": ["iid"], "seeds": [0]}}},
    }
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "tiny.yaml").write_text(yaml.safe_dump(content))
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


# Names


def test_unknown_engines_and_devices_are_named() -> None:
    with pytest.raises(RunError, match="engine: 'cluster' is unknown; allowed: auto, process, pool"):
        open_engine("cluster", "cpu")
    with pytest.raises(RunError, match="device: 'tpu' is unknown; allowed: auto, cpu, cuda"):
        open_engine("process", "tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("name", ["auto", "process", "pool"])
def test_cuda_asked_for_and_absent_is_an_error_at_the_start(name: str) -> None:
    with pytest.raises(RunError, match=r"device: cuda was asked for.*--device cpu"):
        open_engine(name, "cuda")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("processes", [-1, 0])
def test_a_pool_without_processes_is_refused_and_does_not_hang(processes: int) -> None:
    with pytest.raises(RunError, match="processes"), open_engine("pool", "cpu", processes):
        pass


def test_the_engines_have_the_names_of_the_command_line() -> None:
    with open_engine("process", "cpu") as engine:
        assert type(engine) is InProcess
    with open_engine("auto", "cpu") as engine:
        assert type(engine) is (Auto if select.cores() > 1 else InProcess)
