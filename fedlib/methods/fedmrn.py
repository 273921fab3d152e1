"""FedMRN: Li et al., "Masked Random Noise for Communication-Efficient Federated Learning", ACM MM 2024.

The body of the paper could not be read; the algorithm follows the official code (`Leopold1423/fedmrn-mm24`, f0fb8a0).

    noise G(s)                          -> `noise`
    stochastic masking, SM              -> `masks`
    progressive stochastic masking, PSM -> `masked_update`
    local step, straight-through        -> `objective`
    upload of seed and mask             -> `finish`
    server: w + sum_k omega_k n_k m_k   -> `server`

Ours, and numbered on the page: one 64-bit seed per client and round with a stream per layer; weights omega_k by sample
counts unless `weighting` says otherwise; bits really packed and sent. The ablations of `masking` and the entropy coding
are ours too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedlib.core.plan import State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import PayloadError, require_name, require_number
from fedlib.methods import update_codec
from fedlib.methods.messages import pack_model, positive
from fedlib.rng import Rng, normal, signs, uniform
from fedlib.wire import bits, entropy
from fedlib.wire.contexts import BUCKETS, buckets

SECTIONS = ("seed", "mask", "full precision")
LAWS = {"uniform": uniform, "gauss": normal, "bernoulli": signs}
FLOOR = np.float32(1e-8)  # smaller noise is replaced, so that u / n is finite


@dataclass(frozen=True)
class Hyper:
    mask: str = "binary"  # {0, 1}, or "signed" for {-1, +1}
    noise: str = "uniform"  # on [-a, a); "gauss" with deviation a; "bernoulli" for -a or +a
    magnitude: float = 0.01  # a, in units of a weight [code: 0.01 binary, 0.005 signed]
    masking: str = "psm"  # "sm": all entries from the first step; "pm": likelier value, not drawn; "after": upload only
    weighting: str = "samples"  # omega_k; "batches" as the released code has it
    decay: float = 1.0  # factor of the magnitude from one round to the next, for convergence; 1 in the released code
    coding: str = "packed"  # one bit an entry; "entropy": by a range coder that knows |n|

    def __post_init__(self) -> None:
        require_name("hyper.mask", self.mask, ("binary", "signed"))
        require_name("hyper.noise", self.noise, LAWS)
        require_number("hyper.magnitude", self.magnitude, 1e-6, 1e6)
        require_name("hyper.masking", self.masking, ("psm", "sm", "pm", "after"))
        require_name("hyper.weighting", self.weighting, ("samples", "batches"))
        require_number("hyper.decay", self.decay, 1e-3, 1)
        require_name("hyper.coding", self.coding, ("packed", "entropy"))


def noise(seed: int, hyper: Hyper, shapes: Mapping[str, torch.Size]) -> Tensor:
    """n [d] on the CPU: the entries of all masked layers, one stream per layer under a 64-bit seed."""
    layers = [LAWS[hyper.noise](seed, layer, shape.numel()) for layer, shape in enumerate(shapes.values())]
    n = np.concatenate(layers) * np.float32(hyper.magnitude)
    return torch.from_numpy(np.where(np.abs(n) < FLOOR, FLOOR, n))


def clipped(u: Tensor, n: Tensor, hyper: Hyper) -> Tensor:
    """u / n limited to the interval that the mask's alphabet spans."""
    return (u / n).clamp(0.0 if hyper.mask == "binary" else -1.0, 1.0)


def masks(u: Tensor, n: Tensor, chance: Tensor, hyper: Hyper) -> Tensor:
    """SM: True where the mask is 1 (binary) or +1 (signed), False where 0 or -1. `chance` [d] is uniform on [0, 1)."""
    ratio = clipped(u, n, hyper)
    likely = ratio if hyper.mask == "binary" else ratio.add_(1).mul_(0.5)
    return likely > 0.5 if hyper.masking == "pm" else chance < likely


def masked_update(u: Tensor, n: Tensor, progress: float, chance: Tensor, hyper: Hyper) -> Tensor:
    """PSM: with probability `progress` an entry is n * mask, otherwise n * clip(u / n).

    One draw serves both choices: U < p selects masking, and given that, U < p q has probability q.
    """
    ratio = clipped(u, n, hyper)
    likely = ratio * progress if hyper.mask == "binary" else (ratio + 1).mul_(0.5 * progress)
    hard = positive(likely - (0.5 * progress if hyper.masking == "pm" else chance))
    if hyper.mask == "signed":
        hard.mul_(2).sub_(1)
    masked = positive(progress - chance)
    return (masked * hard + (1 - masked) * ratio) * n


def initial(hyper: Hyper, task: Task, rng: Rng) -> State:
    return task.initial() | {name: torch.tensor([hyper.magnitude]) for name in scale(hyper)}


def scale(hyper: Hyper) -> dict[str, torch.Size]:
    """What the server keeps and broadcasts beside the model: the magnitude of the round, where it changes."""
    return {"magnitude": torch.Size([1])} if hyper.decay < 1 else {}


def present(hyper: Hyper, state: State) -> Hyper:
    """The hyper-parameters with the magnitude of this round."""
    return replace(hyper, magnitude=float(state["magnitude"])) if hyper.decay < 1 else hyper


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    return pack_model("fedmrn.down", state, 0, hyper, task, scale(hyper))


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    trainable, frozen = update_codec.start(message, "fedmrn", hyper, task, scale(hyper))
    n = noise(rng.child("noise").seed(), present(hyper, frozen), task.weights)
    return trainable, frozen | {"n": n.to(task.device)}


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> tuple[float, Tensor]:
    share = 1.0 if hyper.masking == "sm" else progress
    return share, torch.rand(count(task.weights), generator=generator, device=task.device)


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], drawn: tuple[float, Tensor], hyper: Hyper, task: Task
) -> Tensor:
    u, effective = trainable["u"], frozen["w"]
    if hyper.masking == "after":
        return update_codec.loss_at(effective + u, trainable, frozen, batch, task)
    effective = effective + masked_update(u.detach(), frozen["n"], *drawn, hyper)
    effective = effective + (u - u.detach())  # adds zero: straight-through, u gets the gradient of the effective weight
    return update_codec.loss_at(effective, trainable, frozen, batch, task)


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    u, n = update_codec.finite(trainable["u"]), frozen["n"]
    generator = rng.child("upload").torch(task.device)
    mask = masks(u, n, torch.rand(len(u), generator=generator, device=task.device), hyper).cpu().numpy()
    coded = (
        bits.pack(mask)
        if hyper.coding == "packed"
        else entropy.encode(mask, 2, contexts(n.cpu(), present(hyper, frozen), task))
    )
    seed = rng.child("noise").seed().to_bytes(8, "little")
    return update_codec.pack_update("fedmrn", [seed, coded], trainable, frozen, samples, hyper, task)


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    new = update_codec.add_mean(
        state, uploads, lambda upload: read(upload, state, hyper, task), task, by_batches=hyper.weighting == "batches"
    )
    return new | {name: state[name] * hyper.decay for name in scale(hyper)}


def read(upload: Buffer, state: State, hyper: Hyper, task: Task) -> tuple[State, int]:
    """What an upload says, and its sample count; `state` has the magnitude of the round."""
    now = present(hyper, state)
    return update_codec.read_update(
        upload, "fedmrn", 2, lambda sections, _, task: decode(sections, now, task), hyper, task
    )


def sent(upload: Buffer, frozen: State, hyper: Hyper, task: Task) -> Tensor:
    return read(upload, frozen, hyper, task)[0]["u"]


def decode(sections: Sequence[memoryview], hyper: Hyper, task: Task) -> Tensor:
    """The update n * m [d] of a seed and a mask."""
    seed, coded = sections
    if len(seed) != 8:
        raise PayloadError(f"seed of {len(seed)} bytes where 8 were expected")
    d, n = count(task.weights), noise(int.from_bytes(seed, "little"), hyper, task.weights)
    if hyper.coding == "packed":
        mask = torch.from_numpy(bits.unpack(coded, d)).float()
    else:
        mask = torch.from_numpy(entropy.decode(coded, d, 2, contexts(n, hyper, task))).float()
    if hyper.mask == "signed":
        mask = mask.mul_(2).sub_(1)
    return n.mul_(mask)


def contexts(n: Tensor, hyper: Hyper, task: Task) -> np.ndarray:
    """Which entries share a model of the range coder [d]: those of one layer and of about the same |n|."""
    layer = np.repeat(np.arange(len(task.weights)), [shape.numel() for shape in task.weights.values()])
    return BUCKETS * layer + buckets(n.abs().numpy(), 4 * hyper.magnitude)


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    return 1.0 * count(task.weights)
