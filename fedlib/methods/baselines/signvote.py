"""SignSGD with majority vote: Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: Compressed Optimisation for
Non-Convex Problems", ICML 2018, applied to a whole local update, as the code of KLMS does
(`FrancescoPase/Federated-KLMS`, 5084d83).

    clients send sign(u), one bit a weight, and no scale         -> `finish`
    server: w + step * sign(sum of signs), or their mean         -> `server`

Biases and BatchNorm travel in full precision and are averaged, as in the other methods on updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import require_name, require_number
from fedlib.methods import update_codec
from fedlib.rng import Rng
from fedlib.wire import bits

SECTIONS = ("signs", "full precision")


@dataclass(frozen=True)
class Hyper:
    vote: str = "majority"  # or "mean" of the signs
    step: float = 1e-3  # the server's, in units of a weight; 2e-4 in KLMS's code

    def __post_init__(self) -> None:
        require_name("hyper.vote", self.vote, ("majority", "mean"))
        require_number("hyper.step", self.step, 1e-9, 1e3)


def encode(u: Tensor, hyper: Hyper, task: Task, rng: Rng) -> list[update_codec.Section]:
    return [bits.pack((u >= 0).cpu().numpy())]


def decode(sections: Sequence[memoryview], hyper: Hyper, task: Task) -> Tensor:
    (signs,) = sections
    return torch.from_numpy(bits.unpack(signs, count(task.weights))).float().mul_(2).sub_(1)


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    """Votes count alike, whatever the samples behind them; a tie leaves the weight where it is."""
    others = task.vectors | task.statistics
    votes, mean = torch.zeros(count(task.weights), dtype=torch.float64), RunningMean(others)
    for tensors, samples in uploads.read(
        lambda upload: update_codec.read_update(upload, "signvote", 1, decode, hyper, task)
    ):
        votes += tensors["u"]
        mean.add(tensors, samples)
    moved = votes.sign() if hyper.vote == "majority" else votes / len(uploads.accepted)
    steps = update_codec.layers(hyper.step * moved.float(), task)
    return {name: state[name] + step for name, step in steps.items()} | mean.value()


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    return 1.0 * count(task.weights)


broadcast, start, draws, objective, finish, _, _ = update_codec.method("signvote", 1, encode, decode)
