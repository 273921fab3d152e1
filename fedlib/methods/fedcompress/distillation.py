"""Self-compression: the server clusters the average model by distillation, on images that no client has.

The average is the teacher. Its copy with clustered kernels is the student, which learns to predict the same of images
made on the spot (`fedlib.data.synthetic`); no labels and no client's data are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlib.core import optimizers
from fedlib.core.plan import Plan, Tensors
from fedlib.core.settings import choice, integer, number
from fedlib.core.task import Task
from fedlib.data import synthetic
from fedlib.errors import Diverged, PayloadError, SpecError
from fedlib.methods.fedcompress import clustering
from fedlib.rng import Rng

CLIENTS = "clients"  # in place of foreign images the training images themselves: what no server has, for comparison


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the distillation, with the defaults of FedCompress's code but for the images, of which it has others."""

    images: int = integer(50_000, 1, 10**9)
    foreign: str = choice("leaves", *synthetic.KINDS, CLIENTS)  # a kind of `fedlib.data.synthetic`, or "clients"
    distil_epochs: int = integer(10, 1, 10**9)
    distil_lr: float = number(1e-4, 1e-12, 1e12)
    distil_batch: int = integer(256, 1, 10**9)  # the last, smaller batch is dropped
    temperature: float = number(2.0, 1e-3, 1e3)
    # BatchNorm: statistics of the batches; "frozen": of the teacher; "recalibrate": frozen, and at the end those of
    # the images
    norms: str = choice("train", "frozen", "recalibrate")


def distil(
    model: Tensors, names: Iterable[str], number: int, settings: Settings, task: Task, rng: Rng, turn: int = 0
) -> tuple[Tensors, list[float]]:
    """The model with `number` clusters in each of the named tensors, on the CPU, and the mean loss of each epoch.

    rng: of the centroids' beginning, the images and, with the turn, their order. Diverged where it does;
    PayloadError: a model that is not finite; SpecError: fewer images than a batch.
    """
    images, temperature = foreign_images(task, settings, rng), settings.temperature
    teacher = {name: model[name].to(task.device) for name in task.tensors}
    task.network.eval()
    with torch.no_grad():
        batches = images.split(settings.distil_batch)
        targets = torch.cat([(task.logits(teacher, x) / temperature).softmax(1) for x in batches])
    student = {name: tensor.clone() for name, tensor in teacher.items()}
    trainable = {name: student[name].requires_grad_() for name in task.weights | task.vectors}
    trainable |= clustering.first_centroids(trainable, names, number, rng)
    plan = Plan(settings.distil_epochs, settings.distil_batch, settings.distil_lr, "adam")
    moments, losses = optimizers.moments(plan, trainable), []
    order = rng.child("order", turn).stream()
    task.network.train(settings.norms == "train")
    for _ in range(plan.epochs):
        total = torch.zeros((), device=task.device)
        places = full_batches(order.permutation(len(images)).to(task.device), plan.batch)
        for index in places:
            whole = student | {
                name: clustering.straight_through(student[name], mu)
                for name, mu in clustering.centroids(trainable).items()
            }
            loss = divergence(targets[index], task.logits(whole, images[index]), temperature)
            optimizers.step(plan, trainable, torch.autograd.grad(loss, list(trainable.values())), moments)
            total += loss.detach()
        losses.append(float(total) / len(places))
    found = {name: tensor.detach() for name, tensor in student.items()}
    try:
        found |= {name: clustering.clustered(found[name], mu) for name, mu in clustering.centroids(trainable).items()}
    except PayloadError as error:
        raise Diverged("self-compression diverged: lower hyper.distil_lr") from error
    if settings.norms == "recalibrate":
        recalibrate(found, images, settings.distil_batch, task)
    return {name: tensor.cpu() for name, tensor in found.items()}, losses


def foreign_images(task: Task, settings: Settings, rng: Rng) -> Tensor:
    """[images, channels, side, side] on the task's device, as bright and as varied as its own; the same for one rng.

    Of the task's images the mean and deviation of the first thousand are used: public constants, as a rule. "clients":
    these images themselves, held out or not.
    """
    own = task.train[0]
    if settings.foreign == CLIENTS:
        if len(own) < settings.distil_batch:
            raise SpecError(f"hyper.distil_batch: {settings.distil_batch} exceeds the {len(own)} training images")
        return own[: settings.images]
    _, c, h, w = own.shape
    made = _made(settings.foreign, settings.images, (c, h, w), rng.child("foreign images").seed()).to(task.device)
    return made * own[:1000].std() + own[:1000].mean()


@functools.lru_cache(maxsize=2)
def _made(kind: str, number: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    return synthetic.images(kind, number, shape, seed).contiguous(memory_format=torch.channels_last)


def full_batches(parts: Tensor, batch: int) -> list[Tensor]:
    return [part for part in parts.split(batch) if len(part) == batch]


def divergence(p: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Mean over rows of KL(p || softmax(logits / temperature)), no factor temperature^2; chances of 1e-7 and more."""
    p, q = (chances.clamp(1e-7, 1) for chances in (p, (logits / temperature).softmax(1)))
    return (p * (p.log() - q.log())).sum(1).mean()


@torch.no_grad()
def recalibrate(model: Tensors, images: Tensor, batch: int, task: Task) -> None:
    """BatchNorm's statistics, in place, to their means over the batches of the images."""
    layers = [module for module in task.network.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [layer.momentum for layer in layers]
    task.network.train()
    try:
        for k, x in enumerate(full_batches(images, batch), 1):
            for layer in layers:
                layer.momentum = 1 / k
            task.logits(model, x)
    finally:
        for layer, momentum in zip(layers, usual, strict=True):
            layer.momentum = momentum
