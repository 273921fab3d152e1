"""What happens at a client: start from the broadcast, train on the shard, finish with an upload. Written once."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fedlib.core import optimizers
from fedlib.core.loss import cross_entropy
from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.data.text import NO_LABEL
from fedlib.errors import PayloadError
from fedlib.methods import registry
from fedlib.rng import Rng

if TYPE_CHECKING:
    from fedlib.runs.spec import Spec

CHUNK = 500  # test images evaluated at once; sums are formed chunk by chunk


class Reply(NamedTuple):
    """An upload, and what the client keeps for its next round, which the server never sees."""

    upload: bytes
    memory: bytes


def run_client(
    spec: Spec, task: Task, message: bytes, round: int, client_id: int, memory: bytes | None = None
) -> bytes | Reply | PayloadError:
    """One client's part in a round; its randomness is named after both. What cannot be sent comes back as its error.

    memory: what it kept (b"" before its first round), in a run whose clients keep something; None in all others.
    """
    method, hyper = registry.METHODS[spec.method], registry.hyper(spec.method, spec.hyper)
    rng, shard = Rng(spec.seed).child("client", round, client_id), task.shard(client_id)
    try:
        trainable, frozen = start(method, message, shard, hyper, task, rng)
        for number, stage in enumerate(registry.stages(method, hyper, task)):
            registry.enter(method, number, trainable, frozen, hyper, stage, rng)
            moments = recalled(stage, trainable, memory if not number else None)
            train(method, trainable, frozen, shard, hyper, stage, staged(rng, number), moments)
        upload = finish(method, trainable, frozen, moments, len(shard[0]), hyper, task, rng, memory)
        return assessed(method, upload, client_id, hyper, task)
    except PayloadError as error:
        return error


def client(method: ModuleType, message: bytes, shard: tuple[Tensor, Tensor], hyper: Any, task: Task, rng: Rng) -> bytes:
    """The function from bytes to bytes that a client is. PayloadError: unreadable message, or an update not finite."""
    trainable, frozen = start(method, message, shard, hyper, task, rng)
    for number, stage in enumerate(registry.stages(method, hyper, task)):
        registry.enter(method, number, trainable, frozen, hyper, stage, rng)
        train(method, trainable, frozen, shard, hyper, stage, staged(rng, number))
    return method.finish(trainable, frozen, len(shard[0]), hyper, task, rng)


def start(
    method: ModuleType, message: bytes, shard: tuple[Tensor, Tensor], hyper: Any, task: Task, rng: Rng
) -> tuple[State, State]:
    """What a client trains and what stays; a method that asks for it has looked at the client's data before."""
    trainable, frozen = method.start(message, hyper, task, rng)
    return trainable, frozen | registry.survey(method, trainable, frozen, shard, hyper, task)


def staged(rng: Rng, stage: int) -> Rng:
    """Where a stage's draws come from."""
    return rng.child("stage", stage) if stage else rng


def assessed(method: ModuleType, upload: bytes | Reply, client: int, hyper: Any, task: Task) -> bytes | Reply:
    """The upload, with what the method says of it on the client's samples held out, if it does."""
    if not hasattr(method, "assess"):
        return upload
    if isinstance(upload, Reply):
        return Reply(registry.assess(method, upload.upload, task.held(client), hyper, task), upload.memory)
    return registry.assess(method, upload, task.held(client), hyper, task)


def recalled(task: Task, trainable: State, memory: bytes | None) -> State:
    """The optimizer's moments at the start of a client's round."""
    return optimizers.moments(task.plan, trainable, memory if memory and task.plan.persistent else b"")


def finish(
    method: ModuleType,
    trainable: State,
    frozen: State,
    moments: State,
    samples: int,
    hyper: Any,
    task: Task,
    rng: Rng,
    memory: bytes | None,
) -> bytes | Reply:
    """The upload; with a memory, also what the client keeps now: its optimizer's moments, or the error to feed back.

    Error feedback: what compression lost of the last update is added to this one. Seide, Fu, Droppo, Li, Yu, "1-Bit
    Stochastic Gradient Descent", Interspeech 2014; here for a round's whole update.
    """
    if memory is None or task.plan.persistent:
        upload: bytes = method.finish(trainable, frozen, samples, hyper, task, rng)
        return upload if memory is None else Reply(upload, optimizers.packed(moments))
    u = trainable["u"].detach()
    if memory:
        u = u + torch.frombuffer(bytearray(memory), dtype=torch.float32).to(task.device)
    upload = method.finish(trainable | {"u": u}, frozen, samples, hyper, task, rng)
    return Reply(upload, (u.cpu() - method.sent(upload, frozen, hyper, task)).numpy().tobytes())


def train(
    method: ModuleType,
    trainable: State,
    frozen: State,
    shard: tuple[Tensor, Tensor],
    hyper: Any,
    task: Task,
    rng: Rng,
    moments: State | None = None,
) -> None:
    """S steps on `method.objective`, in place. `frozen` has no gradient; BatchNorm statistics do change."""
    x, y = shard
    parameters = list(trainable.values())
    moments = recalled(task, trainable, None) if moments is None else moments
    order, local = rng.child("order").torch(), rng.child("draws").torch(task.device)
    step, steps = 0, task.plan.steps(len(x))
    task.network.train()
    for _ in range(task.plan.epochs):
        permutation = torch.randperm(len(x), generator=order).to(task.device)
        for index in permutation.split(task.plan.batch):
            step += 1
            draws = method.draws(step / steps, hyper, task, local)
            loss = method.objective(trainable, frozen, (x[index], y[index]), draws, hyper, task)
            # The gradients get no name: they would live on while those of the next step are formed.
            optimizers.step(task.plan, trainable, torch.autograd.grad(loss, parameters), moments)


@torch.no_grad()
def evaluate(task: Task, state: State, chunk: int) -> tuple[int, float, int]:
    """Correct answers, summed cross-entropy and labels of a chunk of the test set; BatchNorm in evaluation mode."""
    task.network.eval()
    x, y = (part[chunk * CHUNK : (chunk + 1) * CHUNK] for part in task.test)
    logits = task.logits({name: tensor.to(task.device) for name, tensor in state.items()}, x)
    correct = int((logits.argmax(-1) == y).sum())
    return correct, float(cross_entropy(logits, y, "sum")), int((y != NO_LABEL).sum())


def chunks(task: Task) -> range:
    return range(-(-len(task.test[1]) // CHUNK))
