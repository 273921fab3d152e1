"""Which engine a name stands for, and the one that is kept where several are tried."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from jobs import CPU, MakeSpec, job_of, message_of, ran
from typing_extensions import override

from fedlib.core.client import Job, Memories, Upload
from fedlib.engines import select
from fedlib.engines.automatic import Auto, Fastest
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.select import ENGINES, open_engine
from fedlib.engines.vmapped import Stacked
from fedlib.errors import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

# Names


def test_the_engines_by_name() -> None:
    assert ENGINES == ("auto", "process", "pool", "stacked", "graphed")
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


# The fastest of several


def test_fastest_tries_each_twice_and_changes_no_number(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny(method="fedmrn", rounds=8)
    reference, graphed, again = InProcess(CPU), Graphed(CPU), InProcess(CPU)
    with Fastest([reference, graphed, again]) as fastest:
        found = ran(spec, tmp_path, fastest)
        (paces,) = fastest.paces.values()
        assert all(len(pace) >= 2 for pace in paces)
        assert sum(len(pace) for pace in paces) == 8
        assert fastest.name == f"Fastest: {type(fastest.last).__name__}"
    assert not graphed.steps  # closed with it
    assert json.dumps(found) == json.dumps(ran(spec, tmp_path, reference))


def test_fastest_keeps_the_one_whose_second_round_was_the_fastest(tiny: MakeSpec) -> None:
    job, other = job_of(tiny()), job_of(tiny(batch=16))
    rivals = [InProcess(CPU), Graphed(CPU), Stacked(CPU)]
    fastest = Fastest(rivals)
    chosen = []
    for each in (job, other):
        for round in range(1, 7):
            list(fastest.train(each, message_of(each, round), round, [0, 1]))
            chosen.append(fastest.last)
    assert chosen == [*rivals] * 4  # a new batch size is a new question
    (first, _) = fastest.paces.values()
    for pace, seconds in zip(first, (3.0, 1.0, 2.0), strict=True):
        pace[:] = [0.0 if seconds == 3.0 else 9.0, seconds]  # the first round misleads
    for round in (7, 8):
        list(fastest.train(job, message_of(job, round), round, [0, 1]))
        assert fastest.last is rivals[1]


class Hungry(InProcess):
    """Takes more memory than there is: before its first upload, or after it."""

    def __init__(self, uploads: int) -> None:
        super().__init__(CPU)
        self.uploads = uploads

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        yield from super().train(job, message, round, cohort[: self.uploads], memories)
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_fastest_leaves_out_who_does_not_fit_into_memory(tiny: MakeSpec, caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(tiny())
    message = message_of(job)
    expected = list(InProcess(CPU).train(job, message, 1, [0, 1]))
    fastest = Fastest([Hungry(0), Graphed(CPU)])
    with caplog.at_level(logging.WARNING, "fedlib"):
        for _ in range(4):
            assert list(fastest.train(job, message, 1, [0, 1])) == expected
    assert [line.getMessage() for line in caplog.records] == [
        "engine hungry does not fit into the GPU's memory: left out"
    ]
    for rivals in ([Hungry(0), Hungry(0)], [Hungry(1)]):  # nobody left; uploads that the server has read already
        with pytest.raises(torch.OutOfMemoryError), contextlib.closing(Fastest(rivals)) as hungry:
            list(hungry.train(job, message, 1, [0, 1]))
