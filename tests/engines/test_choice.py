"""Which engine a name stands for, and the one that is kept where several are tried."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import CPU, MakeSpec, job_of, message_of, ran
from typing_extensions import override

from fedlib.core.client import Job, Memories, Upload
from fedlib.engines import automatic, select
from fedlib.engines.automatic import Auto, Fastest
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.select import ENGINES, open_engine
from fedlib.engines.vmapped import Stacked
from fedlib.errors import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

# Names


def test_the_engines_by_name() -> None:
    assert ENGINES == ("auto", "process", "pool", "stacked", "graphed", "ranks", "flower")
    kinds = {"process": InProcess, "stacked": Stacked, "graphed": Graphed}
    for name, kind in (kinds | {"auto": Auto if select.cores() > 1 else InProcess}).items():
        with open_engine(name, "cpu") as engine:
            assert type(engine) is kind


@pytest.mark.parametrize("name", ["cluster", "graph"])
def test_unknown_engines_and_devices_are_named(name: str) -> None:
    with pytest.raises(RunError, match=f"engine: '{name}' is unknown; allowed: auto, process, pool, stacked, graphed"):
        open_engine(name, "cpu")
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


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:-1", "gpu:0", "cpu:0"])
def test_a_device_that_is_no_name_of_one(name: str) -> None:
    with pytest.raises(RunError, match=f"device: '{name}' is unknown; allowed: auto, cpu, cuda, or one of several"):
        select.device(name)


def test_one_of_several_gpus_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select.device("cuda:1") == torch.device("cuda", 1) and select.device("cuda") == torch.device("cuda")
    with pytest.raises(RunError, match="device: cuda:2 is not there; torch finds 2, from cuda:0 to cuda:1"):
        select.check("process", "cuda:2")


# The fastest of several


def test_fastest_tries_each_twice_and_changes_no_number(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny(method="fedmrn", rounds=8)
    reference, graphed, again = InProcess(CPU), Graphed(CPU), InProcess(CPU)
    with Fastest([reference, graphed, again]) as fastest:
        found = ran(spec, tmp_path, fastest)
        (trials,) = fastest.trials.values()
        assert all(trial.rounds == 2 and trial.pace for trial in trials)
        assert fastest.name == f"Fastest: {type(fastest.last).__name__}"
    assert not graphed.steps  # closed with it
    assert json.dumps(found) == json.dumps(ran(spec, tmp_path, reference))


class Clock:
    """Seconds that nobody waits for."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Scripted(InProcess):
    """Its rounds take what the script says, the last of it for ever; in those marked it captures a step."""

    def __init__(self, clock: Clock, *seconds: float, captures: Sequence[int] = ()) -> None:
        super().__init__(CPU)
        self.clock, self.seconds, self.captures, self.rounds = clock, seconds, captures, 0

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        self.clock.now += self.seconds[min(self.rounds, len(self.seconds) - 1)]
        self.captured += self.rounds in self.captures
        self.rounds += 1
        yield from super().train(job, message, round, cohort, memories)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(automatic, "time", found)
    return found


def chosen(fastest: Fastest, job: Job, rounds: int) -> list[int]:
    """Which rival trained, by round."""
    found = []
    for round in range(1, rounds + 1):
        list(fastest.train(job, message_of(job, round), round, [0, 1]))
        found.append(fastest.rivals.index(fastest.last))
    return found


def test_fastest_judges_by_the_first_round_in_which_nothing_is_captured(tiny: MakeSpec, clock: Clock) -> None:
    # The first round misleads; the second captures two steps in three rounds, then replays.
    slow, graphed = Scripted(clock, 1, 5), Scripted(clock, 90, 80, 70, 2, captures=[0, 1, 2])
    fastest = Fastest([slow, graphed, Scripted(clock, 1, 3)])
    assert chosen(fastest, job_of(tiny()), 11) == [0, 1, 2, 0, 1, 2, 1, 1, 1, 1, 1]


def test_fastest_judges_one_that_captures_for_ever_all_the_same(tiny: MakeSpec, clock: Clock) -> None:
    graphed = Scripted(clock, 9, 9, 9, 9, 9, 1, captures=range(99))
    found = chosen(Fastest([Scripted(clock, 5), graphed]), job_of(tiny()), 10)
    assert found == [0, 1, 0, 1, 1, 1, 1, 1, 1, 1] and graphed.rounds == 8 > Fastest.MOST
    captures = Scripted(clock, 9, captures=range(99))
    assert chosen(Fastest([Scripted(clock, 5), captures]), job_of(tiny()), 10)[-2:] == [0, 0]


def test_what_fastest_found_holds_for_runs_of_one_kind(tiny: MakeSpec, clock: Clock) -> None:
    fastest = Fastest([Scripted(clock, 2), Scripted(clock, 1)])
    contest, settled = [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]
    assert chosen(fastest, job_of(tiny()), 5) == contest
    assert chosen(fastest, job_of(tiny(seed=1)), 5) == chosen(fastest, job_of(tiny(lr=0.1)), 5) == settled
    others: list[dict[str, Any]] = [
        {"batch": 16},
        {"epochs": 2},
        {"optimizer": "adam"},
        {"model": "cnn2"},
        {"cohort": 3},
        {"partition": {"kind": "dirichlet", "beta": 0.3, "seed": 7}},
        {"held_out": 0.1},
        {"method": "fedmrn"},
        {"method": "fedmrn", "hyper": {"mask": "signed"}},
    ]
    for other in others:
        assert chosen(fastest, job_of(tiny(**other)), 5) == contest, other


class Hungry(InProcess):
    """Takes more memory than there is: before its first upload, or after it."""

    def __init__(self, uploads: int, error: RuntimeError) -> None:
        super().__init__(CPU)
        self.uploads, self.error, self.closed = uploads, error, False

    @override
    def close(self) -> None:
        self.closed = True

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        yield from super().train(job, message, round, cohort[: self.uploads], memories)
        raise self.error


OUT = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
FULL = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory"), RuntimeError(OUT)]


@pytest.mark.parametrize("error", FULL, ids=["allocator", "driver", "library"])
def test_fastest_leaves_out_who_does_not_fit_into_memory(
    tiny: MakeSpec, caplog: pytest.LogCaptureFixture, error: RuntimeError
) -> None:
    job = job_of(tiny())
    message = message_of(job)
    expected = list(InProcess(CPU).train(job, message, 1, [0, 1]))
    hungry = Hungry(0, error)
    fastest = Fastest([hungry, Graphed(CPU)])
    with caplog.at_level(logging.WARNING, "fedlib"):
        for _ in range(4):
            assert list(fastest.train(job, message, 1, [0, 1])) == expected
    assert [line.getMessage() for line in caplog.records] == [
        "engine hungry does not fit into the GPU's memory: left out"
    ]
    assert hungry.closed  # its memory is wanted
    for rivals in ([Hungry(0, error), Hungry(0, error)], [Hungry(1, error)]):  # nobody left; uploads that were read
        with pytest.raises(type(error)), contextlib.closing(Fastest(rivals)) as full:
            list(full.train(job, message, 1, [0, 1]))


def test_another_error_is_nobody_s_lack_of_memory(tiny: MakeSpec) -> None:
    job = job_of(tiny())
    for error in (RuntimeError("CUDA error: misaligned address"), RunError("a worker died (out of memory?)")):
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            list(Fastest([Hungry(0, error), InProcess(CPU)]).train(job, message_of(job), 1, [0, 1]))
