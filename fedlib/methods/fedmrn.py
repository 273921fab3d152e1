"""FedMRN: Li et al., "Masked Random Noise for Communication-Efficient Federated Learning", ACM MM 2024.

The body of the paper could not be read; the algorithm follows the official code (`Leopold1423/fedmrn-mm24`, f0fb8a0).

    noise G(s)                          -> `noise`
    stochastic masking, SM              -> `masks`
    progressive stochastic masking, PSM -> `masked_update`
    local step, straight-through        -> `objective`
    upload of seed and mask             -> `finish`
    server: w + sum_k omega_k n_k m_k   -> `server`

Ours, and numbered on the page: one 64-bit seed per client and round with a stream per layer; weights omega_k by sample
counts; bits really packed and sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlib.errors import PayloadError, require_name, require_number
from fedlib.methods.parts import RunningMean, pack_model, pack_tensors, unpack_model, unpack_tensors
from fedlib.rng import Rng, normal, signs, uniform
from fedlib.task import State, Task, count
from fedlib.uploads import Buffer, Uploads
from fedlib.wire import bits, container

SECTIONS = ("seed", "mask", "full precision")
LAWS = {"uniform": uniform, "gauss": normal, "bernoulli": signs}
FLOOR = np.float32(1e-8)  # smaller noise is replaced, so that u / n is finite


@dataclass(frozen=True)
class Hyper:
    mask: str = "binary"  # {0, 1}, or "signed" for {-1, +1}
    noise: str = "uniform"  # on [-a, a); "gauss" with deviation a; "bernoulli" for -a or +a
    magnitude: float = 0.01  # a, in units of a weight [code: 0.01 binary, 0.005 signed]

    def __post_init__(self) -> None:
        require_name("hyper.mask", self.mask, ("binary", "signed"))
        require_name("hyper.noise", self.noise, LAWS)
        require_number("hyper.magnitude", self.magnitude, 1e-6, 1e6)


def noise(seed: int, hyper: Hyper, shapes: Mapping[str, torch.Size]) -> Tensor:
    """n [d] on the CPU: the entries of all masked layers, one stream per layer under a 64-bit seed."""
    layers = [LAWS[hyper.noise](seed, layer, shape.numel()) for layer, shape in enumerate(shapes.values())]
    n = np.concatenate(layers) * np.float32(hyper.magnitude)
    return torch.from_numpy(np.where(np.abs(n) < FLOOR, FLOOR, n))


def clipped(u: Tensor, n: Tensor, hyper: Hyper) -> Tensor:
    """u / n limited to the interval that the mask's alphabet spans."""
    return (u / n).clamp_(0.0 if hyper.mask == "binary" else -1.0, 1.0)


def masks(u: Tensor, n: Tensor, chance: Tensor, hyper: Hyper) -> Tensor:
    """SM: True where the mask is 1 (binary) or +1 (signed), False where 0 or -1. `chance` [d] is uniform on [0, 1)."""
    ratio = clipped(u, n, hyper)
    return chance < (ratio if hyper.mask == "binary" else ratio.add_(1).mul_(0.5))


def masked_update(u: Tensor, n: Tensor, progress: float, chance: Tensor, hyper: Hyper) -> Tensor:
    """PSM: with probability `progress` an entry is n * mask, otherwise n * clip(u / n).

    One draw serves both choices: U < p selects masking, and given that, U < p q has probability q.
    """
    ratio = clipped(u, n, hyper)
    if hyper.mask == "binary":
        hard = (chance < ratio * progress).to(u.dtype)
    else:
        hard = (chance < (ratio + 1).mul_(0.5 * progress)).to(u.dtype).mul_(2).sub_(1)
    return torch.where(chance < progress, hard, ratio).mul_(n)


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    return pack_model("fedmrn.down", state, 0, hyper, task)


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    model, _ = unpack_model(message, "fedmrn.down", hyper, task)
    n = noise(rng.child("noise").seed(), hyper, task.weights).to(task.device)
    frozen = {name: model[name].to(task.device) for name in task.statistics}
    frozen |= {"w": torch.cat([model[name].flatten() for name in task.weights]).to(task.device), "n": n}
    trainable = {"u": torch.zeros_like(n)} | {name: model[name].to(task.device) for name in task.vectors}
    return {name: tensor.requires_grad_() for name, tensor in trainable.items()}, frozen


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> tuple[float, Tensor]:
    return progress, torch.rand(count(task.weights), generator=generator, device=task.device)


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], drawn: tuple[float, Tensor], hyper: Hyper, task: Task
) -> Tensor:
    u = trainable["u"]
    effective = frozen["w"] + masked_update(u.detach(), frozen["n"], *drawn, hyper)
    effective = effective + (u - u.detach())  # adds zero: straight-through, u gets the gradient of the effective weight
    others = {name: trainable[name] for name in task.vectors} | {name: frozen[name] for name in task.statistics}
    return task.loss(_layers(effective, task) | others, batch)


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    u, n = trainable["u"].detach(), frozen["n"]
    if not bool(torch.isfinite(u).all()):
        raise PayloadError("update u is not finite: local training diverged; lower the learning rate")
    generator = rng.child("upload").torch(task.device)
    mask = masks(u, n, torch.rand(len(u), generator=generator, device=task.device), hyper)
    full = pack_tensors(trainable | frozen, task.vectors | task.statistics)
    seed = rng.child("noise").seed().to_bytes(8, "little")
    packed = bits.pack(mask.cpu().numpy())
    return container.pack("fedmrn.up", task.fingerprint("fedmrn", hyper), samples, [seed, packed, full])


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    mean = RunningMean({"update": torch.Size([count(task.weights)])} | task.vectors | task.statistics)
    for tensors, samples in uploads.read(lambda upload: read_upload(upload, hyper, task)):
        mean.add(tensors, samples)
    average = mean.value()
    updates = _layers(average.pop("update"), task)
    return {name: state[name] + update for name, update in updates.items()} | average


def read_upload(upload: Buffer, hyper: Hyper, task: Task) -> tuple[State, int]:
    """The update n * m [d], the full-precision part, and the sample count. PayloadError for any other message."""
    d, others = count(task.weights), task.vectors | task.statistics
    limits = [8, -(-d // 8), 4 * count(others)]
    read = container.unpack(upload, "fedmrn.up", task.fingerprint("fedmrn", hyper), limits)
    seed, packed, full = read.sections
    if len(seed) != 8:
        raise PayloadError(f"seed of {len(seed)} bytes where 8 were expected")
    mask = torch.from_numpy(bits.unpack(packed, d)).float()
    if hyper.mask == "signed":
        mask = mask.mul_(2).sub_(1)
    update = noise(int.from_bytes(seed, "little"), hyper, task.weights).mul_(mask)
    return {"update": update} | unpack_tensors(full, others), read.samples


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    return 1.0 * count(task.weights)


def _layers(flat: Tensor, task: Task) -> State:
    parts = flat.split([shape.numel() for shape in task.weights.values()])
    return {name: part.view(shape) for (name, shape), part in zip(task.weights.items(), parts, strict=True)}
