"""Who a message is from, and of which round: a replay and a swap are refused. And clients that lie."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from jobs import CPU, MakeSpec, job_of, message_of, ran
from typing_extensions import override

from fedlib.core import client
from fedlib.core.client import Job, Memories, Upload
from fedlib.engines.in_process import InProcess
from fedlib.engines.pool import Pool
from fedlib.errors import PayloadError, RunError
from fedlib.runs import rounds
from fedlib.wire import container

ENGINE = InProcess(CPU)


class Network(InProcess):
    """One that swaps the uploads of two clients, or sends each client's first upload again."""

    def __init__(self, fault: str) -> None:
        super().__init__(CPU)
        self.fault, self.first = fault, dict[int, Upload]()

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        replies = list(super().train(job, message, round, cohort, memories))
        if self.fault == "swapped":
            (a, one), (b, other), *rest = replies
            yield from ((a, other), (b, one), *rest)
        for number, upload in replies if self.fault == "replayed" else ():
            yield number, self.first.setdefault(number, upload)


def test_uploads_that_were_swapped_are_refused_and_the_round_goes_on(tiny: MakeSpec) -> None:
    spec = tiny(clients=4, cohort=4)
    job = job_of(spec)
    _, entry = rounds.one_round(spec, job, Network("swapped"), rounds.initial(job), 1, {})
    (a, one), (b, other) = entry["refused"]
    assert one == f"message of round 1 and client {b}, expected round 1 and client {a}"
    assert other == f"message of round 1 and client {a}, expected round 1 and client {b}"
    assert sorted([*entry["clients"], a, b]) == [0, 1, 2, 3]


def test_uploads_of_the_round_before_are_refused(tiny: MakeSpec) -> None:
    spec, engine = tiny(clients=4, cohort=4), Network("replayed")
    job = job_of(spec)
    state, entry = rounds.one_round(spec, job, engine, rounds.initial(job), 1, {})
    assert not entry["refused"]
    with pytest.raises(RunError, match=r"round 2 got no usable update in 3 attempts.*of round 1 and client"):
        rounds.one_round(spec, job, engine, state, 2, {})


def test_a_broadcast_of_another_round_is_refused_by_the_client(tiny: MakeSpec) -> None:
    job = job_of(tiny())
    answer = ENGINE.client(job, message_of(job, 1), 2, 3)
    assert isinstance(answer, PayloadError) and "of round 1 and client 0, expected round 2 and client 0" in str(answer)
    assert isinstance(ENGINE.client(job, message_of(job, 2), 2, 3), bytes)


def test_an_unknown_client_is_a_mistake_of_the_caller(tiny: MakeSpec) -> None:
    job = job_of(tiny())
    with pytest.raises(IndexError):
        ENGINE.client(job, message_of(job), 1, 10_000)


# Clients that lie


@pytest.mark.parametrize("method", ["fedavg", "fedmrn", "feddq", "fedpt"])
def test_an_attacker_sends_so_many_times_its_change(tiny: MakeSpec, method: str) -> None:
    """The others send what they send without it."""
    part = {"hyper": {"policy": "emnist/dense1"}, "model": "emnist-narrow"} if method == "fedpt" else {}
    job = job_of(tiny(method=method, **part))
    start, liar = (client.begin(job, message_of(job), 1, 0, None) for _ in range(2))
    client.train(job.method, job.method.phases()[0], [liar])
    sent = dict(ENGINE.train(job, message_of(job), 1, [0, 1]))
    found = dict(ENGINE.train(dataclasses.replace(job, attackers=1, attack=-3.0), message_of(job), 1, [0, 1]))
    assert found[1] == sent[1] and found[0] != sent[0]
    for name, after in liar.local.trainable.items():
        before = start.local.trainable[name].detach()
        liar.local.trainable[name] = before - 3.0 * (after.detach() - before)
    assert found[0] == container.address(job.method.upload(liar.local, job.task.held(0), liar.rng), 1, 0)


def test_a_record_is_the_same_in_the_pool_where_some_lie(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny(clients=4, cohort=4, attackers=1, attack=-10.0, robust="median")
    with Pool(2) as pool:
        assert ran(spec, tmp_path / "pool", pool) == ran(spec, tmp_path)
