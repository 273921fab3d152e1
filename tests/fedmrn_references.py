"""FedMRN written entry by entry, in loops of Python, from its specification; it shares the random draws alone."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from small_task import begun, digits_task, make_task, served
from torch import Tensor
from torch.nn import functional

from fedlib import rng
from fedlib.core.method import Local
from fedlib.core.plan import Plan, Samples, Tensors
from fedlib.core.task import Task
from fedlib.methods.fedmrn import FedMRN
from fedlib.models.registry import build
from fedlib.rng import Rng

MAGNITUDE = {"binary": 0.05, "signed": 0.025}
each_mask = pytest.mark.parametrize("mask", ["binary", "signed"])
LAYERS = {"1.weight": torch.Size([64, 64]), "3.weight": torch.Size([10, 64])}  # of the perceptron, d = 4,736


def of(mask: str = "binary", task: Task | None = None, **options: Any) -> FedMRN:
    settings: dict[str, Any] = {"mask": mask, "magnitude": MAGNITUDE[mask], **options}
    return FedMRN(**settings).bind(task or digits_task())


@functools.cache
def cnn4_task() -> Task:
    return make_task(build("cnn4", 1, 28, 10, Rng(0)), Plan(epochs=1, batch=4, lr=0.1))


def noise_images() -> Samples:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 28, 28, generator=generator), torch.randint(0, 10, (6,), generator=generator)


def flat(model: Tensors) -> Tensor:
    return torch.cat([model[name].flatten() for name in LAYERS])


def zeros(task: Task) -> Tensors:
    return {name: torch.zeros(shape) for name, shape in task.tensors.items()}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def entries(count: int = 2000) -> tuple[Tensor, Tensor]:
    """u and n with ratios from -1.5 to 1.5: inside and outside the interval of either mask, with both signs of n."""
    n = torch.randn(count, generator=torch.Generator().manual_seed(3)) * 0.05
    return torch.linspace(-1.5, 1.5, count) * n, n


def plain_mask(ratio: float, draw: float, mask: str, masking: str) -> float:
    """One entry of the mask. pm: the likelier value, 0 or -1 where both are equally likely."""
    chance = min(max((ratio + 1) / 2 if mask == "signed" else ratio, 0.0), 1.0)
    hit = chance > 0.5 if masking == "pm" else draw < chance
    return 1.0 if hit else -1.0 if mask == "signed" else 0.0


def plain_update(u: Tensor, n: Tensor, p: float, draw: Tensor, mask: str, masking: str = "psm") -> Tensor:
    """Sections 4.3 and 4.4: draw < p chooses an entry for masking, and then draw / p is uniform again."""
    result = []
    for ui, ni, di in zip(u.tolist(), n.tolist(), draw.tolist(), strict=True):
        if di < p:
            result.append(ni * plain_mask(ui / ni, di / p, mask, masking))
        else:
            result.append(ni * min(max(ui / ni, -1.0 if mask == "signed" else 0.0), 1.0))
    return torch.tensor(result)


def fresh(place: Rng) -> Tensor:
    """What the upload's mask is drawn by."""
    return place.child("upload").stream().uniform(4736)


def perceptron_loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """With all weights in one vector."""
    hidden = functional.linear(x.flatten(1), w[:4096].view(64, 64)).relu()
    return functional.cross_entropy(functional.linear(hidden, w[4096:].view(10, 64)), y)


def plain_training(method: FedMRN, number: int, place: Rng) -> Tensor:
    """Section 4.7: final u [d] of a client, with the network written out and every option an if."""
    task = method.task
    w, (x, y) = flat(task.initial()), task.shard(number)
    seed, u = place.child("noise").seed(), torch.zeros(4736)
    n = torch.from_numpy(np.concatenate([rng.uniform(seed, 0, 4096), rng.uniform(seed, 1, 640)])) * method.magnitude
    order, draws = place.child("order").stream(), place.child("draws").stream()
    steps, tau = task.plan.epochs * math.ceil(len(y) / task.plan.batch), 0
    for _ in range(task.plan.epochs):
        permutation = order.permutation(len(y)).tolist()
        for start in range(0, len(y), task.plan.batch):
            batch = permutation[start : start + task.plan.batch]
            tau += 1
            draw = draws.uniform(4736)
            if method.masking == "after":
                moved = u
            else:
                p = 1.0 if method.masking == "sm" else tau / steps
                moved = plain_update(u, n, p, draw, method.mask, method.masking)
            effective = (w + moved).requires_grad_()
            (gradient,) = torch.autograd.grad(perceptron_loss(effective, x[batch], y[batch]), effective)
            u = u - task.plan.lr * gradient
    return u


def begun_at(method: FedMRN, ratios: Tensor, place: Rng) -> Local:
    """A client whose u / n [d] are the given ones."""
    local = begun(method, method.task.shard(0), place)
    local.trainable["u"].detach().copy_(ratios * local.frozen["n"])
    return local


def received(method: FedMRN, upload: bytes) -> Tensor:
    """What the upload adds to a model of zeros, [d]."""
    return flat(served(method, upload, model=zeros(method.task)))
