"""Runs of FedPT on digits, whose messages and rounds its tests make by hand."""

from dataclasses import dataclass
from typing import Any

import torch
from known_answers import TINY
from torch import Tensor

from fedlib.core.client import Job
from fedlib.core.method import Local, ServerState
from fedlib.core.plan import Tensors
from fedlib.core.task import Task
from fedlib.core.uploads import Uploads
from fedlib.engines.in_process import InProcess
from fedlib.methods.fedpt.mechanisms import flatten
from fedlib.methods.fedpt.method import FedPT, Own
from fedlib.methods.messages import pack_tensors
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

CPU = torch.device("cpu")
ENGINE = InProcess(CPU)
TRAINED = 208 + 3216 + 1290  # of emnist-narrow on 8 x 8 and 10 kinds, under emnist/dense1: all but 8320
State = ServerState[Own]
Settings = dict[str, Any]
# Optimizers of clients, fields of a spec; and of the server, settings of FedPT.
LOCAL: dict[str, Settings] = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "lr": 0.01},
    "adam": {"optimizer": "adam", "lr": 0.01},
}
YOGI: Settings = {"optimizer": "yogi", "beta1": 0.9, "server_lr": 0.02}
HEAVY: Settings = {"momentum": 0.9, "server_lr": 0.3}
SERVER: dict[str, Settings] = {"sgd": {}, "momentum": HEAVY, "adam": YOGI | {"optimizer": "adam"}, "yogi": YOGI}
UNEQUAL: Settings = {"partition": {"kind": "dirichlet", "beta": 0.3, "seed": 7}}


@dataclass
class Run:
    spec: Spec
    job: Job
    method: FedPT
    state: State
    message: bytes  # the first broadcast

    @classmethod
    def of(cls, policy: str = "emnist/dense1", hyper: dict[str, Any] | None = None, **fields: Any) -> "Run":
        settings = FedPT(policy=policy, **(hyper or {})).settings
        spec = Spec.from_dict(TINY | {"method": "fedpt", "model": "emnist-narrow", "hyper": settings} | fields)
        job = build.job(spec, CPU)
        state, method = rounds.initial(job), job.method
        assert isinstance(method, FedPT)
        return cls(spec, job, method, state, rounds.broadcast(method, state, 1))

    @property
    def task(self) -> Task:
        return self.method.task

    @property
    def mark(self) -> bytes:
        """The fingerprint of the frozen part."""
        return bytes.fromhex(self.state.own.fingerprint)

    def packed(self, way: str, samples: int, *parts: Any) -> bytes:
        return container.pack(f"fedpt.{way}", self.method.fingerprint(), samples, parts)

    def upload(self, change: Tensors, samples: int = 1) -> bytes:
        return self.packed("up", samples, self.mark, pack_tensors(change, self.method.trained))

    def begin(self, message: bytes | None = None) -> Local:
        return self.method.begin(self.message if message is None else message, self.task.shard(0), Rng(0))

    def read(self, upload: Any) -> tuple[Tensors, int]:
        return self.method.read(upload, self.state.own)

    def serve(self, *uploads: Any) -> tuple[State, Uploads]:
        """The state after these uploads of clients 0, 1, ..., and what became of them."""
        arrived = Uploads(enumerate(uploads))
        return self.method.aggregate(self.state, arrived), arrived

    def one_round(self, state: State, number: int) -> State:
        return rounds.one_round(self.spec, self.job, ENGINE, state, number, {})[0]

    def states(self, number: int) -> list[State]:
        """The state before the first of so many rounds, and after each of them."""
        states = [self.state]
        for n in range(1, number + 1):
            states.append(self.one_round(states[-1], n))
        return states

    def models(self, state: State) -> Tensors:
        (model,) = self.method.models(state, Rng(0))
        return model


def point(state: State) -> Tensor:
    """The trained part in a row."""
    return flatten(state.model).double()


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same(one: State, other: State) -> bool:
    """The trained part, and the moments of the server's optimizer."""
    parts = ((state.model, state.own.first, state.own.second) for state in (one, other))
    return all(equal(*pair) for pair in zip(*parts, strict=True))
