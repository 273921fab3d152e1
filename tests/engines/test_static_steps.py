"""What the engines for a GPU do in a step, seen without one: on device "meta", and by a stub of torch's captures."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from engine_tasks import COHORT, SETTINGS, UNEQUAL, fits, trained
from jobs import CPU, MakeSpec, job_of, message_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fedlib.core import client
from fedlib.core.client import Job, Member
from fedlib.core.method import AnyMethod
from fedlib.core.plan import Tensors
from fedlib.engines import vmapped
from fedlib.engines.cuda_graph import Graphed, StaticStep
from fedlib.engines.gpu_steps import descend

pytestmark = pytest.mark.usefixtures("one_thread", "small_world")
META = torch.device("meta")
Setting = dict[str, Any]
each_method = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
TWO_STAGES: Setting = {"method": "fedcompress", "model": "slice"}
TWO_STAGES["hyper"] = {"least": 8, "most": 8, "clustered_epochs": 1, "self_compression": False}
PAPER = TWO_STAGES | {"hyper": TWO_STAGES["hyper"] | {"variant": "paper"}}


# A step asks the device for nothing: on "meta" each .item(), bool() and nonzero raises


def elsewhere(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to(META) for name, tensor in tensors.items()}


def at_stages(job: Job) -> list[tuple[AnyMethod, Member, Any]]:
    """The first client as it enters each stage of its training, and the method, all on "meta"; and the stage's plan."""
    found = []
    for number, phase in enumerate(job.method.phases()):
        member = client.begin(job, message_of(job), 1, 0, None)
        for earlier, before in enumerate(job.method.phases()[: number + 1]):
            client.enter(member, earlier, before)
        member.local.trainable = {n: t.requires_grad_() for n, t in elsewhere(member.local.trainable).items()}
        member.local.frozen, member.moments = elsewhere(member.local.frozen), elsewhere(member.moments)
        task = job.task
        x, y = task.train
        there = dataclasses.replace(
            task, device=META, train=(x.to(META), y.to(META)), network=copy.deepcopy(task.network).to(META)
        )
        there.network.train()
        found.append((job.method.bind(there), member, phase.plan))
    return found


STEPS = SETTINGS | {"fedcompress code": TWO_STAGES, "fedcompress paper": PAPER}
each_step = pytest.mark.parametrize("setting", STEPS.values(), ids=STEPS)


@each_step
def test_a_step_as_it_is_captured_reads_nothing_of_the_device(tiny: MakeSpec, setting: Setting) -> None:
    for method, member, plan in at_stages(job_of(tiny(**{"model": fits(setting)} | setting))):
        step = StaticStep.__new__(StaticStep)
        step.method, step.task, step.plan = method, method.task, plan
        step.trainable, step.frozen, step.moments = member.local.trainable, member.local.frozen, member.moments
        step.index = torch.zeros(plan.batch, dtype=torch.int64, device=META)
        step.draws = tree_map(step.place, method.draw(0.5, member.draws.stream(META)))
        step.run(plan.batch)


@each_step
def test_a_step_of_several_clients_reads_nothing_of_the_device(tiny: MakeSpec, setting: Setting) -> None:
    for method, member, plan in at_stages(job_of(tiny(**{"model": fits(setting)} | setting))):
        local, stream = member.local, member.draws.stream(META)
        own, held, kept = (
            {name: torch.stack([t.detach()] * 3) for name, t in state.items()}
            for state in (local.trainable, local.frozen, member.moments)
        )
        own = {name: tensor.requires_grad_() for name, tensor in own.items()}
        drawn = [method.draw(0.5, stream) for _ in range(3)]
        draws = tree_map(lambda *leaves: vmapped.together(leaves, META), *drawn)
        index = torch.zeros(3, plan.batch, dtype=torch.int64, device=META)
        x, y = method.task.train
        vmapped.step(method, plan, own, held, kept, (x[index], y[index]), draws)


def test_a_step_that_reads_the_device_would_be_seen() -> None:
    for read in (Tensor.item, bool, Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(torch.ones((), device=META))


# Gradients


class Pairs(TorchDispatchMode):
    """The tensors that an optimizer's launch for all takes, and what it adds to them."""

    def __init__(self) -> None:
        super().__init__()
        self.met = list[tuple[Tensor, Tensor]]()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function._schema.name in ("aten::_foreach_add_", "aten::_fused_adam_"):
            self.met += zip(*arguments[:2], strict=True)
        return function(*arguments, **(options or {}))


@each_method
def test_gradients_lie_in_memory_as_their_parameters_do(tiny: MakeSpec, setting: Setting) -> None:
    job = job_of(tiny(**setting, model=fits(setting)))
    member = client.begin(job, message_of(job), 1, 0, None)
    (phase, *_) = job.method.phases()
    client.enter(member, 0, phase)
    x, y = member.shard
    drawn = job.method.draw(1.0, member.draws.stream())
    loss = job.method.loss(member.local.trainable, member.local.frozen, (x[:8], y[:8]), drawn)
    with Pairs() as pairs:
        descend(loss, member.local.trainable, member.moments, phase.plan)
    assert pairs.met and all(own.stride() == added.stride() for own, added in pairs.met)


# Static steps


@pytest.mark.parametrize("setting", [TWO_STAGES, PAPER], ids=["code", "paper"])
def test_two_rounds_make_a_static_step_a_stage(tiny: MakeSpec, setting: Setting) -> None:
    job = job_of(tiny(**setting))
    assert len(job.method.phases()) == 2
    graphed, made = Graphed(CPU), list[StaticStep]()
    for round in (1, 2):
        for number in COHORT:
            trained(job, graphed, round, [number])
            made += [step for step in graphed.steps.values() if not any(step is other for other in made)]
    assert len(made) == 2
    assert {step.plan for step in made} == {phase.plan for phase in job.method.phases()}


# Captures


class Cuda:
    """What torch.cuda does with streams and graphs, on a CPU: a captured step is kept, and done when it is replayed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log, self.on = list[str](), "default"
        self.step: StaticStep | None = None
        outer = self

        class Stream:
            def __init__(self, name: str = "own") -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                outer.log.append(f"{self.name} waits for {other.name}")

        class On:
            def __init__(self, stream: Any) -> None:
                self.stream, self.before = stream, outer.on

            def __enter__(self) -> None:
                outer.on = self.stream.name

            def __exit__(self, *error: object) -> None:
                outer.on = self.before

        class Graph:
            length = 0

            def replay(self) -> None:
                outer.log.append(f"replay {self.length}")
                outer.compute(self.length)

        class Capture:
            def __init__(self, graph: Any, pool: Any) -> None:
                assert pool == "pool"
                self.graph = graph

            def __enter__(self) -> None:
                outer.on, outer.captured = "capture", 0

            def __exit__(self, *error: object) -> None:
                outer.on, self.graph.length = "default", outer.captured
                outer.log.append(f"captured {outer.captured}")

        self.captured = 0
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", lambda: Stream(outer.on))
        patch.setattr(torch.cuda, "stream", On)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", Capture)

    def run(self, length: int) -> None:
        """In place of the step's own: nothing is computed while it is captured."""
        if self.on == "capture":
            self.captured = length
            return
        self.log.append(f"run {length} on {self.on}")
        self.compute(length)

    def compute(self, length: int) -> None:
        assert self.step
        StaticStep.run(self.step, length)


@pytest.mark.parametrize("setting", [SETTINGS["fedavg"], SETTINGS["fedmrn"]], ids=["fedavg", "fedmrn"])
def test_a_step_is_warmed_up_then_captured_and_then_replayed(
    tiny: MakeSpec, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tiny(**UNEQUAL, **setting, model="mlp"))
    plan, cuda = job.task.plan, Cuda(monkeypatch)
    first, second = (client.begin(job, message_of(job), 1, 2, None) for _ in range(2))
    step = StaticStep(job.method, plan, first)
    step.load(first)
    reference = StaticStep(job.method, plan, second)
    reference.load(second)
    step.place = reference.place  # type: ignore[method-assign]  # on the CPU, whatever the task says from now on
    step.task = dataclasses.replace(job.task, device=torch.device("cuda"))
    step.pool, step.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    step.run, cuda.step = cuda.run, step  # type: ignore[method-assign]
    ordered, stream = torch.arange(len(first.shard[1])), first.draws.stream()
    for length in (8, 8, 8, 3, 8, 8, 3):
        drawn = job.method.draw(0.5, stream)
        index = ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(length))[:length]]
        for each in (step, reference):
            each(index, drawn)
    warm = ["own waits for default", "run 8 on own", "default waits for own"]
    rare = ["own waits for default", "run 3 on own", "default waits for own"]
    assert cuda.log == [*warm * 3, *rare, "captured 8", "replay 8", "replay 8", *rare]
    assert [*step.graphs] == [8] and step.met == {8: 5, 3: 2}
    for own, other in zip(step.own, reference.own, strict=True):
        assert all(torch.equal(own[name], tensor) for name, tensor in other.items())
