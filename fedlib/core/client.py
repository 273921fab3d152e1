"""What happens at a client: begin from the broadcast, train on the shard, answer with an upload. Written once.

Engines decide how the middle is computed: they hand a `fit` to `walk`, of which `train` here is the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fedlib.core import optimizers
from fedlib.core.method import AnyMethod, Local, Phase
from fedlib.core.plan import Samples, Tensors
from fedlib.core.task import Task
from fedlib.core.uploads import shorten
from fedlib.errors import PayloadError
from fedlib.rng import Rng
from fedlib.wire import container

log = logging.getLogger("fedlib")
CHUNK = 500  # test images evaluated at once; sums are formed chunk by chunk
EVERYONE = 0  # the client that a broadcast is addressed to


@dataclass(frozen=True)
class Job:
    """What a client's work hangs on beside the broadcast: the same for all clients and rounds of a run."""

    method: AnyMethod  # bound to its task
    seed: int
    rounds: int
    key: str  # text from which another process makes the same job
    rebuild: Callable[[str, torch.device], Job]  # how; a module's own function
    attackers: int = 0  # clients, the first ones, that lie
    attack: float = 1.0  # how: they send so many times the change that they have trained

    @property
    def task(self) -> Task:
        return self.method.task


class Reply(NamedTuple):
    """An upload, and what the client keeps for its next round, which the server never sees."""

    upload: bytes
    memory: bytes


Upload = bytes | bytearray | PayloadError | Reply
Memories = Mapping[int, bytes] | None  # by client, of those that have one; None where clients keep nothing


@dataclass
class Member:
    """A client during a round."""

    client: int
    rng: Rng
    shard: Samples
    local: Local
    memory: bytes | None  # b"" before its first round
    moments: Tensors = field(default_factory=dict)  # of its optimizer
    draws: Rng = field(init=False)  # where those of the present phase come from
    start: Tensors = field(default_factory=dict)  # of an attacker: what it trains, as it was before

    def __post_init__(self) -> None:
        self.draws = self.rng


Fit = Callable[[AnyMethod, Phase, Sequence[Member]], None]


def walk(
    job: Job, message: bytes, round: int, clients: Sequence[int], memories: Memories, fit: Fit
) -> Iterator[tuple[int, Upload]]:
    """The clients' part in a round, in their order; randomness is named after round and client.

    What a client cannot read or send comes back as its PayloadError, and is nobody else's.
    """
    method, members = job.method, list[Member]()
    failed: dict[int, PayloadError] = {}
    for client in clients:
        try:
            members.append(begin(job, message, round, client, memories))
        except PayloadError as error:
            failed[client] = error
    for number, phase in enumerate(method.phases()):
        for member in members:
            try:
                enter(member, number, phase)
            except PayloadError as error:
                failed[member.client] = error
            if member.client < job.attackers:
                member.start = {name: t.detach().clone() for name, t in member.local.trainable.items()} | member.start
        members = [member for member in members if member.client not in failed]
        if members:
            fit(method, phase, members)
    for member in members:
        for name, before in member.start.items():
            after = member.local.trainable[name].detach()
            member.local.trainable[name] = before + job.attack * (after - before)
    waiting = {member.client: member for member in members}
    for client in clients:
        try:
            reply: Upload = failed[client] if client in failed else finish(method, waiting.pop(client), round)
        except PayloadError as error:
            reply = error
        yield client, reply


def begin(job: Job, message: bytes, round: int, client: int, memories: Memories) -> Member:
    rng, shard = Rng(job.seed).child("client", round, client), job.task.shard(client)
    memory = None if memories is None else memories.get(client, b"")
    return Member(client, rng, shard, read(job.method, message, round, shard, rng), memory)


def read(method: AnyMethod, message: bytes, round: int, shard: Samples, rng: Rng) -> Local:
    """What a client trains, by the broadcast. PayloadError, whatever the broadcast holds that cannot be read."""
    try:
        container.check_address(message, round, EVERYONE)
        return method.begin(message, shard, rng)
    except PayloadError:
        raise
    except Exception as error:
        log.debug("round %d", round, exc_info=True)
        raise PayloadError(shorten(f"broadcast cannot be read: {type(error).__name__}: {error}")) from error


def enter(member: Member, number: int, phase: Phase) -> None:
    """Before a phase: in the first one the optimizer goes on from what the client kept, if it did; later anew."""
    if phase.prepare:
        phase.prepare(member.local, member.rng)
    kept = member.memory or b"" if phase.plan.persistent and not number else b""
    member.moments = optimizers.moments(phase.plan, member.local.trainable, kept) if phase.plan.keeps else {}
    member.draws = member.rng.child("stage", number) if number else member.rng


def train(method: AnyMethod, phase: Phase, members: Sequence[Member]) -> None:
    """The reference `fit`: S steps on the method's loss, one client after the other, in place.

    `frozen` has no gradient; BatchNorm's statistics do change. What the network draws by itself, as dropout does, comes
    from torch's own generator, which is seeded here and given back as it was.
    """
    task, plan = method.task, phase.plan
    task.network.train()
    for member in members:
        (x, y), trainable = member.shard, member.local.trainable
        order, draws = member.draws.child("order").stream(), member.draws.child("draws").stream(task.device)
        parameters, step, steps = list(trainable.values()), 0, plan.steps(len(x))
        with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
            torch.manual_seed(member.draws.child("network").seed() >> 1)
            for _ in range(plan.epochs):
                for index in order.permutation(len(x)).to(task.device).split(plan.batch):
                    step += 1
                    drawn = method.draw(step / steps, draws)
                    loss = method.loss(trainable, member.local.frozen, (x[index], y[index]), drawn)
                    # The gradients get no name: they would live on while those of the next step are formed.
                    optimizers.step(plan, trainable, torch.autograd.grad(loss, parameters), member.moments)


def finish(method: AnyMethod, member: Member, round: int) -> bytes | Reply:
    """The upload, addressed; with a memory also what the client keeps: moments of its optimizer, or the error to feed.

    Error feedback: what compression lost of the last update is added to this one. Seide, Fu, Droppo, Li, Yu, "1-Bit
    Stochastic Gradient Descent", Interspeech 2014; here for a round's whole update.
    """
    local, held = member.local, method.task.held(member.client)
    if member.memory is None or method.task.plan.persistent:
        upload = container.address(method.upload(local, held, member.rng), round, member.client)
        return upload if member.memory is None else Reply(upload, optimizers.packed(member.moments))
    u = local.trainable["u"].detach()
    if member.memory:
        u = u + torch.frombuffer(bytearray(member.memory), dtype=torch.float32).to(method.task.device)
    local.trainable["u"] = u
    upload = container.address(method.upload(local, held, member.rng), round, member.client)
    return Reply(upload, (u.cpu() - method.sent(upload, local)).numpy().tobytes())


@torch.no_grad()
def evaluate(task: Task, model: Tensors, chunk: int) -> tuple[list[float], int]:
    """What the objective judges of a chunk of the test set, summed, and over how many; BatchNorm in evaluation mode.

    model: on the task's device.
    """
    task.network.eval()
    x, y = (part[chunk * CHUNK : (chunk + 1) * CHUNK] for part in task.test)
    return task.objective.judge(task.logits(model, x), y)


def chunks(task: Task) -> range:
    return range(-(-len(task.test[1]) // CHUNK))
