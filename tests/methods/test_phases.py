"""Local training in phases, and samples held out: a method made for the test, in all engines."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from jobs import CPU, MakeSpec, message_of
from typing_extensions import override

from fedlib.core import client
from fedlib.core.client import Job, Member
from fedlib.core.method import Local, Phase
from fedlib.core.plan import Plan, Samples
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.vmapped import Stacked
from fedlib.methods.fedavg import FedAvg
from fedlib.rng import Rng
from fedlib.runs import build
from fedlib.runs.spec import Spec
from fedlib.wire import container


@torch.no_grad()
def halve(local: Local, rng: Rng) -> None:
    for tensor in local.trainable.values():
        tensor.mul_(0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phased(FedAvg):
    """FedAvg in two phases: as planned; then two epochs of Adam at a tenth, after all tensors were halved; and with the
    number of samples held out as that of samples."""

    @override
    def phases(self) -> Sequence[Phase]:
        plan = self.task.plan
        return Phase(plan), Phase(dataclasses.replace(plan, epochs=2, optimizer="adam", lr=plan.lr / 10), halve)

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        return super().upload(dataclasses.replace(local, samples=len(held_out[1])), held_out, rng)


def job_of(spec: Spec) -> Job:
    job = build.job(spec, CPU)
    return dataclasses.replace(job, method=Phased().bind(job.task))


def test_phases_by_hand(tiny: MakeSpec) -> None:
    spec = tiny(epochs=1, held_out=0.2)
    job = job_of(spec)
    task, plain = job.task, FedAvg().bind(job.task)
    message = message_of(job)
    upload = InProcess(CPU).client(job, message, 1, 0)
    assert isinstance(upload, bytes)
    whole = len(task.partition.indices(0))
    held = plain.read(upload)[1]
    assert held == int(0.2 * whole) == whole - len(task.indices(0))
    rng, shard = Rng(spec.seed).child("client", 1, 0), task.shard(0)
    member = Member(0, rng, shard, plain.begin(message, shard, rng), None)
    client.train(plain, Phase(task.plan), [member])
    half = {name: (tensor.detach() * 0.5).requires_grad_() for name, tensor in member.local.trainable.items()}
    later = Member(0, rng.child("stage", 1), shard, dataclasses.replace(member.local, trainable=half), None)
    adam = Phase(Plan(2, spec.batch, spec.lr / 10, "adam"))
    client.enter(later, 0, adam)
    client.train(plain, adam, [later])
    assert upload == container.address(
        plain.upload(dataclasses.replace(later.local, samples=held), task.held(0), rng), 1, 0
    )


def test_another_plan_has_phases_of_its_own(tiny: MakeSpec) -> None:
    """Also in an engine that has captured the steps of the first."""
    job = job_of(tiny())
    faster = dataclasses.replace(job.task, plan=dataclasses.replace(job.task.plan, lr=0.9))
    other = dataclasses.replace(job, method=job.method.bind(faster))
    assert [phase.plan.lr for phase in other.method.phases()] == [0.9, 0.09]
    message, engine = message_of(job), Graphed(CPU)
    for each in (job, other, job):
        assert engine.client(each, message, 1, 0) == InProcess(CPU).client(each, message, 1, 0)


@pytest.mark.parametrize("kind", [Graphed, Stacked])
def test_phases_in_other_engines(tiny: MakeSpec, kind: type[Any]) -> None:
    job = job_of(tiny(held_out=0.1))
    message = message_of(job)
    expected, found = (dict(engine(CPU).train(job, message, 1, [2, 0, 1])) for engine in (InProcess, kind))
    for number, upload in expected.items():
        if kind is Graphed:
            assert found[number] == upload
            continue
        (a, held), (b, other) = (Phased().bind(job.task).read(u) for u in (upload, found[number]))
        assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a) and held == other
