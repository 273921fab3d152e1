"""SignSGD with majority vote: Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: Compressed Optimisation for
Non-Convex Problems", ICML 2018, applied to a whole local update, as the code of KLMS does
(`FrancescoPase/Federated-KLMS`, 5084d83).

    clients send sign(u), one bit a weight, and no scale         -> `encode`
    server: w + step * sign(sum of signs), or their mean         -> `aggregate`

Biases and BatchNorm travel in full precision and are averaged, as in the other methods on updates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.averaging import RunningMean
from fedlib.core.method import Local, ServerState, Sizes
from fedlib.core.plan import count
from fedlib.core.settings import choice, number
from fedlib.core.uploads import Buffer, Uploads
from fedlib.methods.update_codec import Section, UpdateCodec, layers, others
from fedlib.rng import Rng
from fedlib.wire import bits


@dataclass(frozen=True, kw_only=True)
class SignVote(UpdateCodec[None]):
    name = "signvote"
    sections = ("signs", "full precision")
    feeds_back = False

    vote: str = choice("majority", "mean")  # or "mean" of the signs
    step: float = number(1e-3, 1e-9, 1e3)  # the server's, in units of a weight; 2e-4 in KLMS's code

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        return [bits.pack((u >= 0).cpu().numpy())]

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        (signs,) = sections
        return torch.from_numpy(bits.unpack(signs, count(self.task.weights))).float().mul_(2).sub_(1)

    @override
    def aggregate(self, state: ServerState[None], uploads: Uploads) -> ServerState[None]:
        """Votes count alike, whatever the samples behind them; a tie leaves the weight where it is."""
        votes, mean = torch.zeros(count(self.task.weights), dtype=torch.float64), RunningMean(others(self.task))
        for tensors, samples in uploads.read(lambda upload: self.read(upload, None)):
            votes += tensors["u"]
            mean.add(tensors, samples)
        moved = votes.sign() if self.vote == "majority" else votes / len(uploads.accepted)
        steps = layers(self.step * moved.float(), self.task)
        return dataclasses.replace(
            state, model={name: state.model[name] + step for name, step in steps.items()} | mean.value()
        )

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return Sizes(1.0 * count(self.task.weights))
