"""FedPM on small networks, and what its test files share."""

import functools
from typing import Any

import small_task as tasks
import torch
from torch import Tensor, nn

from fedlib.core.method import Local, ServerState
from fedlib.core.plan import Plan
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.methods.fedsparse.masks import pack_mask
from fedlib.methods.fedsparse.method import FedPM, Own
from fedlib.rng import Rng
from fedlib.wire import container

State = ServerState[Own]
# Places of the small network's tensors in a vector.
SMALL = {"0.weight": slice(0, 72), "0.bias": slice(72, 76), "3.weight": slice(76, 268), "3.bias": slice(268, 271)}


def make_task(network: nn.Module) -> Task:
    return tasks.make_task(network, Plan(epochs=2, batch=4, lr=0.1, optimizer="adam"))


@functools.cache
def small_task() -> Task:
    return make_task(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))


@functools.cache
def flat_task(*sizes: int) -> Task:
    return make_task(nn.ModuleList(nn.Linear(size, 1, bias=False) for size in sizes))


def small(**settings: Any) -> FedPM:
    """n = 72 + 4 + 192 + 3 = 271 parameters: a convolution with fan-in 18 and a linear layer with fan-in 64."""
    return FedPM(**settings).bind(small_task())


def flat(*sizes: int, **settings: Any) -> FedPM:
    """Matrices of the given lengths and nothing else."""
    return FedPM(**settings).bind(flat_task(*sizes))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def masks(count: int, n: int, density: float = 0.4, seed: int = 0) -> list[Tensor]:
    return [row < density for row in uniform(count, n, seed=seed)]


def state_of(theta: Tensor, seed: int = 7) -> State:
    return ServerState({"theta": theta}, Own(seed))


def upload_of(method: FedPM, mask: Tensor, samples: int = 1, theta: Tensor | None = None, seed: int = 7) -> bytes:
    """theta: what the coder knows, where its contexts need it."""
    sections = pack_mask(mask.numpy(), None if theta is None else method.contexts(theta))
    return container.pack("fedpm.up", method.fingerprint(f"fedpm {seed}"), samples, sections)


def server(method: FedPM, state: State, *uploads: Buffer) -> State:
    return method.aggregate(state, Uploads(enumerate(uploads)))


def mask_in(method: FedPM, upload: Buffer, seed: int = 7) -> Tensor:
    """The mask of an upload, as the server reads it from a cohort of one."""
    return server(method, state_of(torch.full((method.n,), 0.5), seed), upload).model["theta"] > 0.5


def begin(method: FedPM, scores: Tensor | None = None) -> Local:
    """A client before its first step, at the given scores."""
    local = method.begin(method.broadcast(method.initial(Rng(3))), tasks.images(10), Rng(0))
    if scores is not None:
        local.trainable["s"].detach().copy_(scores)
    return local


def send(method: FedPM, scores: Tensor, place: Rng) -> bytes:
    """What a client sends that has trained to the given scores."""
    local = Local({"s": scores}, {"theta": torch.full_like(scores, 0.5)}, samples=1, seed=7)
    return method.upload(local, tasks.NONE, place)
