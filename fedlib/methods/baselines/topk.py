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
from typing_extensions import override

from fedlib.core.method import Local, Sizes
from fedlib.core.plan import count
from fedlib.core.settings import choice
from fedlib.core.uploads import Buffer
from fedlib.errors import PayloadError
from fedlib.methods.update_codec import Section, UpdateCodec
from fedlib.rng import Rng
from fedlib.wire import entropy, floats


@dataclass(frozen=True, kw_only=True)
class TopK(UpdateCodec[None]):
    name = "topk"
    sections = ("positions", "values", "full precision")

    # what the paper's bit a weight pays for; "values": indices cost nothing
    budget: str = choice("values and indices", "values")

    @property
    def entry_bits(self) -> int:
        """Bits of one kept entry as the paper counts them: a float32 and, if counted, an index of ceil(log2 d) bits."""
        return 32 if self.budget == "values" else 32 + (count(self.task.weights) - 1).bit_length()

    @property
    def entries(self) -> int:
        """k: how many entries a budget of one bit a weight buys, at least one."""
        return max(1, count(self.task.weights) // self.entry_bits)

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        values = u.cpu().numpy()
        mask = kept(values, self.entries)
        return [entropy.encode(mask, 2), floats.encode([values[mask]], ["values"])]

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        (positions, values), k = sections, self.entries
        mask = torch.from_numpy(entropy.decode(positions, count(self.task.weights), 2)).bool()
        if (ones := int(mask.sum())) != k:
            raise PayloadError(f"positions: {ones}, expected {k}")
        (largest,) = floats.decode(values, [(k,)], ["values"])
        return torch.zeros(len(mask)).masked_scatter_(mask, torch.tensor(largest))

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return Sizes(1.0 * self.entries * self.entry_bits)


def kept(u: np.ndarray, k: int) -> np.ndarray:
    """Mask [d] of the k largest |u|."""
    magnitudes = np.abs(u)
    least = np.partition(magnitudes, len(u) - k)[len(u) - k]
    mask: np.ndarray = magnitudes > least
    mask[np.flatnonzero(magnitudes == least)[: k - np.count_nonzero(mask)]] = True
    return mask
