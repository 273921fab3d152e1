"""FedPM: Isik, Pase, Gunduz, Weissman, Zorzi, "Sparse Random Networks for Communication-Efficient Federated Learning",
ICLR 2023 (code: `BerivanIsik/sparse-random-networks`, cf6b549); and its regularized form: Mestoukirdi, Esrafilian,
Gesbert, Li, Gresset, "Communication-Efficient Federated Learning via Regularized Sparse Random Networks", IEEE
Communications Letters 2024, of which the abstract alone could be read: its penalty here is the one that agrees with it.

    fixed random weights, scores s, theta = sigma(s)  -> `fedlib.methods.fedsparse.masks.fixed_weights`, `start`
    mask m ~ Bern(theta), straight-through            -> `objective`
    penalty on the keep-probabilities theta           -> `penalty`
    upload of one mask                                -> `finish`
    mean of masks, or mode of a Beta posterior        -> `server`

lam = 0 is FedPM. `threshold` is FedMask, `top` keeps the largest scores; all else is FedPM's. Biases are masked too.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import PayloadError, require_name, require_number
from fedlib.methods.fedsparse.masks import (
    SCALES,
    binary_entropy,
    bits_a_parameter,
    coded_theta,
    fixed_weights,
    layers,
    ones_in,
    packed_mask,
    read_seed,
    read_theta,
    shapes_of,
    unpacked_mask,
)
from fedlib.methods.messages import positive
from fedlib.rng import Rng, normal
from fedlib.wire import container
from fedlib.wire.contexts import BUCKETS, buckets

SECTIONS = ("ones", "mask")
FEW = 10  # kept weights below which a layer counts as collapsed
log = logging.getLogger("fedlib")


@dataclass(frozen=True)
class Hyper:
    lam: float = 1.0  # weight of the penalty; 0 is FedPM
    penalty: str = "mean_prob"  # or the entropy of the mean, "pooled_entropy", or the mean of entropies, "mean_entropy"
    masking: str = "bernoulli"  # "threshold": theta > 1/2; "top": the share `keep` of each layer with the largest theta
    keep: float = 0.5
    ste: str = "identity"  # gradient of the mask by theta: 1, or "prob": theta, as in the code
    weight_scale: str = "kaiming"  # of the fixed weights; "fedpm" as in the code; "critical": neutral at theta = 1/2
    aggregation: str = "mean"  # or "bayes"
    weighting: str = "samples"  # of the mean; or "clients"
    prior: float = 1.0  # alpha = beta of the Beta prior
    reset_period: int = 1  # rounds after which the posterior starts afresh; 1 in the code
    delta: float = 1e-3  # theta is kept this far from 0 and 1 where a score is made of it; 0.01 in the code
    coding: str = "pooled"  # contexts of the mask's coder: none; "layers"; "global": the theta that both sides know
    downlink: str = "full"  # theta as float32; or "levels": the values that occur, and which one each entry has
    evaluated: str = "sampled"  # mean over five masks; "mean": weights times theta; "threshold": theta > 1/2

    def __post_init__(self) -> None:
        require_number("hyper.lam", self.lam, 0, 1e6)
        require_name("hyper.penalty", self.penalty, ("mean_prob", "pooled_entropy", "mean_entropy"))
        require_name("hyper.masking", self.masking, ("bernoulli", "threshold", "top"))
        require_number("hyper.keep", self.keep, 1e-6, 1)
        require_name("hyper.ste", self.ste, ("identity", "prob"))
        require_name("hyper.weight_scale", self.weight_scale, SCALES)
        require_name("hyper.aggregation", self.aggregation, ("mean", "bayes"))
        require_name("hyper.weighting", self.weighting, ("samples", "clients"))
        require_number("hyper.prior", self.prior, 1, 1e6)
        require_number("hyper.reset_period", self.reset_period, 1, 10**9, integer=True)
        require_number("hyper.delta", self.delta, 1e-9, 0.49)
        require_name("hyper.coding", self.coding, ("pooled", "layers", "global"))
        require_name("hyper.downlink", self.downlink, ("full", "levels"))
        require_name("hyper.evaluated", self.evaluated, ("sampled", "mean", "threshold"))


MASKS = 5  # of an evaluation by sampling


# The network: fixed weights, and which of them are kept


def drawn(theta: Tensor, hyper: Hyper, task: Task, generator: torch.Generator) -> Tensor:
    """A mask [n], ones and zeros; m ~ Bern(theta) unless `masking` has its own rule."""
    return chosen(theta, torch.rand(theta.shape, generator=generator, device=theta.device), hyper, task)


def chosen(theta: Tensor, chance: Tensor, hyper: Hyper, task: Task) -> Tensor:
    """The mask of a forward pass [n], ones and zeros; `chance` [n] is uniform on [0, 1)."""
    if hyper.masking == "bernoulli":
        return positive(theta - chance)
    if hyper.masking == "threshold":
        return positive(theta - 0.5)
    parts = []
    for layer in layers(theta, task).values():
        flat = layer.reshape(-1)
        share = max(1, int(hyper.keep * len(flat)))
        least = torch.kthvalue(flat, len(flat) - share + 1).values
        above, tied = positive(flat - least), (flat == least).to(flat.dtype)
        first = tied.cumsum(0, dtype=torch.int64) <= share - above.sum().long()  # of equal ones the first
        parts.append(above + tied * first)
    return torch.cat(parts)


# The method


def initial(hyper: Hyper, task: Task, rng: Rng) -> State:
    """theta [n], of standard normal scores; the seed of the fixed weights; the posterior, and its rounds."""
    n = sum(shape.numel() for shape in shapes_of(task).values())
    theta = torch.sigmoid(torch.from_numpy(normal(rng.child("scores").seed(), 0, n)))
    seed = torch.from_numpy(np.array([rng.child("fixed weights").seed()], dtype=np.uint64).view(np.int64))
    state = {"theta": theta, "seed": seed}
    if hyper.aggregation == "bayes":
        state |= {"kept": torch.zeros(n), "dropped": torch.zeros(n), "rounds": torch.zeros(1)}
    return state


def seed_of(state: State) -> int:
    return int(state["seed"].cpu().numpy().view(np.uint64)[0])


def fingerprint(state: State, hyper: Hyper, task: Task) -> bytes:
    """Of an upload: a mask means nothing over the weights of another seed."""
    return task.fingerprint(f"fedpm {seed_of(state)}", hyper)


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    seed = state["seed"].numpy().astype("<i8").tobytes()
    sections = [seed, *coded_theta(state["theta"], levels=hyper.downlink == "levels")]
    return container.pack("fedpm.down", task.fingerprint("fedpm", hyper), 0, sections)


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    n = sum(shape.numel() for shape in shapes_of(task).values())
    seed, theta = read_broadcast(message, n, hyper, task)
    clamped = theta.to(task.device).double().clamp(hyper.delta, 1 - hyper.delta)  # float32 has no 1 - 1e-9
    w = fixed_weights(seed, hyper.weight_scale, task).to(task.device)
    known = {"theta": theta, "seed": torch.from_numpy(np.array([seed], dtype=np.uint64).view(np.int64))}
    frozen = {"w": w} | {name: tensor.to(task.device) for name, tensor in known.items()}
    return {"s": torch.logit(clamped).float().requires_grad_()}, frozen


def read_broadcast(message: bytes, n: int, hyper: Hyper, task: Task) -> tuple[int, Tensor]:
    """Seed and theta [n]. PayloadError for any other message."""
    limits = [8, 4 * n, 4 * n]
    by_levels = hyper.downlink == "levels" and len(container.section_sizes(message)) == 3
    read = container.unpack(
        message, "fedpm.down", task.fingerprint("fedpm", hyper), limits if by_levels else limits[:2]
    )
    return read_seed(read.sections[0]), read_theta(read.sections[1:], n)


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> Tensor:
    n = sum(shape.numel() for shape in task.tensors.values())
    return torch.rand(n if hyper.masking == "bernoulli" else 1, generator=generator, device=task.device)


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], chance: Tensor, hyper: Hyper, task: Task
) -> Tensor:
    s = trainable["s"]
    theta = torch.sigmoid(s)
    mask = chosen(theta.detach(), chance, hyper, task)
    through = theta if hyper.ste == "identity" else theta * theta / 2
    loss = task.loss(layers(Through.apply(through, frozen["w"], mask), task), batch)
    return loss + hyper.lam * penalty(theta, hyper) if hyper.lam else loss


class Through(torch.autograd.Function):
    """Forward the kept weights; backward as if the mask had been `through`, so that theta gets the mask's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(through: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        return w * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return gradient * w, None, None


def penalty(theta: Tensor, hyper: Hyper) -> Tensor:
    """What lam weighs, between 0 and 1: a stand-in for the bits a parameter of the mask."""
    if hyper.penalty == "mean_prob":
        return theta.mean()
    if hyper.penalty == "pooled_entropy":
        return binary_entropy(theta.mean())
    return binary_entropy(theta).mean()


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    s = trainable["s"].detach()
    if not bool(torch.isfinite(s).all()):
        raise PayloadError("scores are not finite: local training diverged; lower the learning rate")
    mask = drawn(torch.sigmoid(s), hyper, task, rng.child("upload").torch(task.device)).bool().cpu().numpy()
    sections = packed_mask(mask, contexts(frozen["theta"].cpu(), hyper, task))
    return container.pack("fedpm.up", fingerprint(frozen, hyper, task), samples, sections)


def contexts(theta: Tensor, hyper: Hyper, task: Task) -> np.ndarray | None:
    """Which entries share a model of the coder [n]: all, those of a tensor, or those of about the same theta."""
    if hyper.coding == "pooled":
        return None
    if hyper.coding == "layers":
        sizes = [shape.numel() for shape in shapes_of(task).values()]
        return np.repeat(np.arange(len(sizes)), sizes)
    side = (theta > 0.5).numpy()
    return BUCKETS * side.astype(np.int64) + buckets(torch.minimum(theta, 1 - theta).numpy(), 2 / 3)


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    n = len(state["theta"])
    known = contexts(state["theta"], hyper, task)
    expected = fingerprint(state, hyper, task)

    def read(upload: Buffer) -> tuple[State, int]:
        found = container.unpack(upload, "fedpm.up", expected, [4, 64 + n // 8])
        return {"mask": torch.from_numpy(unpacked_mask(found.sections, n, known)).float()}, found.samples

    mean, masks = RunningMean({"mask": torch.Size([n])}), 0
    for tensors, samples in uploads.read(read):
        mean.add(tensors, samples if hyper.weighting == "samples" and hyper.aggregation == "mean" else 1)
        masks += 1
    theta = mean.value()["mask"]
    if hyper.aggregation == "mean":
        return state | {"theta": theta}
    since = float(state["rounds"]) % hyper.reset_period
    ones = (theta * masks).round()  # whole again: equal counts give equal theta
    kept, dropped = ones + (since > 0) * state["kept"], masks - ones + (since > 0) * state["dropped"]
    mode = (kept + hyper.prior - 1) / (kept + dropped + 2 * hyper.prior - 2)
    return state | {"theta": mode, "kept": kept, "dropped": dropped, "rounds": state["rounds"] + 1}


# What is evaluated, stored, and said of a round


def models(state: State, hyper: Hyper, task: Task, rng: Rng) -> list[State]:
    """The networks whose mean accuracy counts; theta is not clamped here."""
    theta, w = state["theta"], fixed_weights(seed_of(state), hyper.weight_scale, task)
    if hyper.evaluated == "mean":
        return [layers(w * theta, task)]
    if hyper.evaluated == "threshold":
        return [layers(w * positive(theta - 0.5), task)]
    count = MASKS if hyper.masking == "bernoulli" else 1
    return [layers(w * drawn(theta, hyper, task, rng.child(i).torch()), task) for i in range(count)]


def save_model(state: State, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    """The final model as a file: the seed of its weights, and one mask drawn from theta, coded."""
    mask = drawn(state["theta"], hyper, task, rng.torch()).bool().numpy()
    seed = seed_of(state).to_bytes(8, "little")
    return container.pack("fedpm.model", task.fingerprint("fedpm", hyper), 0, [seed, *packed_mask(mask, None)])


def load_model(file: bytes, hyper: Hyper, task: Task) -> State:
    """The network's tensors, from the file alone. PayloadError for any other file."""
    n = sum(shape.numel() for shape in shapes_of(task).values())
    read = container.unpack(file, "fedpm.model", task.fingerprint("fedpm", hyper), [8, 4, 64 + n // 8])
    w = fixed_weights(read_seed(read.sections[0]), hyper.weight_scale, task)
    return layers(w * torch.from_numpy(unpacked_mask(read.sections[1:], n, None)), task)


def notes(state: State, hyper: Hyper, task: Task) -> dict[str, Any]:
    """Mean theta of each tensor of weights, bytes of the model's file, tensors that keep fewer than ten weights."""
    named = {name: part for name, part in layers(state["theta"], task).items() if name in task.weights}
    collapsed = [name for name, part in named.items() if float(part.sum()) < FEW]
    if collapsed:
        log.warning("fewer than %d weights are kept in %s: the network may have collapsed", FEW, ", ".join(collapsed))
    density = {name: round(float(part.mean()), 6) for name, part in named.items()}
    size = len(save_model(state, hyper, task, Rng(seed_of(state))))
    return {"density": density, "model file": size} | ({"collapsed": collapsed} if collapsed else {})


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    """n H(k / n) of a mask with k ones."""
    n = sum(shape.numel() for shape in task.tensors.values())
    return n * bits_a_parameter(ones_in(upload) / n)


def other_bits(upload: Buffer, hyper: Hyper, task: Task) -> dict[str, float]:
    """The official code's formula, whose masks hold 0.01 and 0.99: it never falls below 0.0808 bits a parameter.

    To which it adds log2 n for an upload.
    """
    n = sum(shape.numel() for shape in task.tensors.values())
    return {"official code": n * bits_a_parameter(0.01 + 0.98 * ones_in(upload) / n) + math.log2(n)}
