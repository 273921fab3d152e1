"""Top-k on updates: Aji, Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017, applied to a
whole local update. What is left out is dropped, unless the run has error feedback (`Spec.feedback`).

    the k entries with the largest |u| of all layers together -> `kept`
    budget of one bit a weight                                -> `entries`

An index takes ceil(log2 d) bits. Here the positions travel as a mask of d bits, entropy-coded, which is cheaper: about
log2(d / k) + 1.44 bits for each kept value, 7 where d / k = 51, instead of 19 for an index at d = 400,000.
Deterministic and biased; of entries with equal |u| those that come first are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlib.core.plan import count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer
from fedlib.errors import PayloadError, require_name
from fedlib.methods import update_codec
from fedlib.rng import Rng
from fedlib.wire import entropy, floats

SECTIONS = ("positions", "values", "full precision")


@dataclass(frozen=True)
class Hyper:
    budget: str = "values and indices"  # what the paper's bit a weight pays for; "values": indices cost nothing

    def __post_init__(self) -> None:
        require_name("hyper.budget", self.budget, ("values", "values and indices"))


def entry_bits(hyper: Hyper, task: Task) -> int:
    """Bits of one kept entry as the paper counts them: a float32 and, if counted, an index of ceil(log2 d) bits."""
    return 32 if hyper.budget == "values" else 32 + (count(task.weights) - 1).bit_length()


def entries(hyper: Hyper, task: Task) -> int:
    """k: how many entries a budget of one bit a weight buys, at least one."""
    return max(1, count(task.weights) // entry_bits(hyper, task))


def kept(u: np.ndarray, k: int) -> np.ndarray:
    """Mask [d] of the k largest |u|."""
    magnitudes = np.abs(u)
    least = np.partition(magnitudes, len(u) - k)[len(u) - k]
    mask: np.ndarray = magnitudes > least
    mask[np.flatnonzero(magnitudes == least)[: k - np.count_nonzero(mask)]] = True
    return mask


def encode(u: Tensor, hyper: Hyper, task: Task, rng: Rng) -> list[update_codec.Section]:
    values = u.cpu().numpy()
    mask = kept(values, entries(hyper, task))
    return [entropy.encode(mask, 2), floats.encode([values[mask]], ["values"])]


def decode(sections: Sequence[memoryview], hyper: Hyper, task: Task) -> Tensor:
    positions, values = sections
    k = entries(hyper, task)
    mask = torch.from_numpy(entropy.decode(positions, count(task.weights), 2)).bool()
    if (found := int(mask.sum())) != k:
        raise PayloadError(f"positions: {found}, expected {k}")
    (largest,) = floats.decode(values, [(k,)], ["values"])
    return torch.zeros(len(mask)).masked_scatter_(mask, torch.tensor(largest))


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    return 1.0 * entries(hyper, task) * entry_bits(hyper, task)


broadcast, start, draws, objective, finish, server, sent = update_codec.method("topk", 2, encode, decode)
