"""Signs of updates: Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: Compressed Optimisation for Non-Convex
Problems", ICML 2018, applied to a whole local update, with a scale per layer or by a vote.

    sign(u) of a layer times mean |u|, as federated papers use it -> `SignSGD.encode`, `SignSGD.decode`
    clients send sign(u), one bit a weight, and no scale          -> `SignVote.encode`
    server: w + step * sign(sum of signs), or their mean          -> `SignVote.aggregate`

Deterministic and biased: every entry of a layer moves by the same amount. The vote is as in the code of KLMS
(`FrancescoPase/Federated-KLMS`, 5084d83); biases and BatchNorm are averaged, as in the other methods on updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.averaging import RunningMean
from fedlib.core.method import Local, ServerState, Sizes
from fedlib.core.plan import count, layers
from fedlib.core.settings import choice, number
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import PayloadError
from fedlib.methods.messages import pack_signs, unpack_signs
from fedlib.methods.update_codec import Section, UpdateCodec
from fedlib.rng import Rng
from fedlib.wire import floats


@dataclass(frozen=True, kw_only=True)
class SignSGD(UpdateCodec[None]):
    """No settings beyond the training plan."""

    name = "signsgd"
    sections = ("signs", "scales", "full precision")

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        scales = torch.stack([layer.abs().mean() for layer in layers(u, self.task.weights).values()])
        return [pack_signs(u), floats.encode([scales.cpu().numpy()])]

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        signs, scales = sections
        return scale_layers(unpack_signs(signs, count(self.task.weights)), scales, self.task)

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return Sizes(count(self.task.weights) + 32.0 * len(self.task.weights))


def scale_layers(u: Tensor, section: memoryview, task: Task) -> Tensor:
    """u [d], in place, each layer times its scale. PayloadError: scales that cannot be read, or are below 0."""
    (scales,) = floats.decode(section, [(len(task.weights),)], ["scales"])
    if (scales < 0).any():
        raise PayloadError(f"scales: {scales.min()}, expected none below 0")
    for layer, scale in zip(layers(u, task.weights).values(), scales, strict=True):
        layer.mul_(float(scale))
    return u


@dataclass(frozen=True, kw_only=True)
class SignVote(UpdateCodec[None]):
    name = "signvote"
    sections = ("signs", "full precision")
    feeds_back = False
    averages = False

    vote: str = choice("majority", "mean")  # or "mean" of the signs
    step: float = number(1e-3, 1e-9, 1e3)  # the server's, in units of a weight; 2e-4 in KLMS's code

    @override
    def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
        return [pack_signs(u)]

    @override
    def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
        (signs,) = sections
        return unpack_signs(signs, count(self.task.weights))

    @override
    def aggregate(self, state: ServerState[None], uploads: Uploads) -> ServerState[None]:
        """Votes count alike, whatever the samples behind them; a tie leaves the weight where it is."""
        votes, mean = torch.zeros(count(self.task.weights), dtype=torch.float64), RunningMean(self.task.others)
        for tensors, samples in uploads.read(lambda upload: self.read(upload, None)):
            votes += tensors["u"]
            mean.add(tensors, samples)
        moved = votes.sign() if self.vote == "majority" else votes / len(uploads.accepted)
        return self.move(state, self.step * moved.float(), mean.value())

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        return Sizes(1.0 * count(self.task.weights))
