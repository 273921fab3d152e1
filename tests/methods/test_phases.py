"""Local training in phases, and samples held out: a method made for the test, in all engines."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from jobs import CPU, MakeSpec
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
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec


@torch.no_grad()
def halve(local: Local, rng: Rng) -> None:
    for tensor in local.trainable.values():
        tensor.mul_(0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phased(FedAvg):
    """FedAvg in two phases: as planned; then two epochs of Adam at a tenth, after all tensors were halved; and with the
    number of samples held out at the end of the upload."""

    @override
    def phases(self) -> Sequence[Phase]:
        plan = self.task.plan
        return Phase(plan), Phase(dataclasses.replace(plan, epochs=2, optimizer="adam", lr=plan.lr / 10), halve)

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        return super().upload(local, held_out, rng) + len(held_out[1]).to_bytes(4, "little")


def job_of(spec: Spec) -> Job:
    job = build.job(spec, CPU)
    return dataclasses.replace(job, method=Phased().bind(job.task))


def test_phases_by_hand(tiny: MakeSpec) -> None:
    spec = tiny(epochs=1, held_out=0.2)
    job = job_of(spec)
    task, plain = job.task, FedAvg().bind(job.task)
    message = plain.broadcast(rounds.initial(job))
    upload = InProcess(CPU).client(job, message, 1, 0)
    assert isinstance(upload, bytes)
    whole = len(task.partition.indices(0))
    assert int.from_bytes(upload[-4:], "little") == int(0.2 * whole) == whole - len(task.indices(0))
    rng, shard = Rng(spec.seed).child("client", 1, 0), task.shard(0)
    member = Member(0, rng, shard, plain.begin(message, shard, rng), None)
    client.train(plain, Phase(task.plan), [member])
    half = {name: (tensor.detach() * 0.5).requires_grad_() for name, tensor in member.local.trainable.items()}
    later = Member(0, rng.child("stage", 1), shard, dataclasses.replace(member.local, trainable=half), None)
    adam = Phase(Plan(2, spec.batch, spec.lr / 10, "adam"))
    client.enter(later, 0, adam)
    client.train(plain, adam, [later])
    assert upload[:-4] == plain.upload(later.local, task.held(0), rng)


def test_another_plan_has_phases_of_its_own(tiny: MakeSpec) -> None:
    """Also in an engine that has captured the steps of the first."""
    job = job_of(tiny())
    faster = dataclasses.replace(job.task, plan=dataclasses.replace(job.task.plan, lr=0.9))
    other = dataclasses.replace(job, method=job.method.bind(faster))
    assert [phase.plan.lr for phase in other.method.phases()] == [0.9, 0.09]
    message, engine = job.method.broadcast(rounds.initial(job)), Graphed(CPU)
    for each in (job, other, job):
        assert engine.client(each, message, 1, 0) == InProcess(CPU).client(each, message, 1, 0)


@pytest.mark.parametrize("kind", [Graphed, Stacked])
def test_phases_in_other_engines(tiny: MakeSpec, kind: type[Any]) -> None:
    job = job_of(tiny(held_out=0.1))
    message = job.method.broadcast(rounds.initial(job))
    expected, found = (dict(engine(CPU).train(job, message, 1, [2, 0, 1])) for engine in (InProcess, kind))
    for number, upload in expected.items():
        if kind is Graphed:
            assert found[number] == upload
            continue
        a, b = (Phased().bind(job.task).read(u[:-4])[0] for u in (upload, found[number]))
        assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
        assert upload[-4:] == found[number][-4:]
