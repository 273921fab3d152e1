"""FedCompress and FedZip on a small network and scikit-learn's digits: what their test files share."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from known_answers import TINY
from torch import Tensor, nn

from fedlib.core import client
from fedlib.core.client import Job, Member
from fedlib.core.method import Local, Phase, ServerState
from fedlib.core.task import Task
from fedlib.engines.in_process import Engine, InProcess
from fedlib.models.initializers import initialise
from fedlib.models.registry import MODELS
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec

CPU = torch.device("cpu")
ENGINE = InProcess(CPU)
QUICK: dict[str, Any] = dict(
    augment="none",
    clustered_epochs=1,
    clustered_lr=5e-3,
    images=64,
    distil_batch=32,
    distil_epochs=2,
    distil_lr=1e-3,
    least=4,
    most=6,
    patience=1,
    first=1,
    decay=0.0,
)
KERNELS = {"conv.weight": (6, 1, 3, 3), "mixed.weight": (8, 6, 1, 1)}


def small(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """A convolution, a depthwise one and a pointwise one with BatchNorm, the mean over places, and a head."""
    layers = OrderedDict[str, nn.Module](
        conv=nn.Conv2d(channels, 6, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(6),
        relu=nn.ReLU(),
        depth=nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        mixed=nn.Conv2d(6, 8, 1, bias=False),
        relu2=nn.ReLU(),
        mean=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(8, classes),
    )
    return initialise(nn.Sequential(layers), "he", root)


@dataclass
class Run:
    """A run before its first round."""

    spec: Spec
    job: Job
    method: Any
    state: ServerState[Any]
    message: bytes  # of the first round

    @property
    def task(self) -> Task:
        return self.job.task

    def begin(self) -> Member:
        """Client 0, with the whole shard of the task."""
        rng, shard = Rng(1), self.task.shard(0)
        return Member(0, rng, shard, self.method.begin(self.message, shard, rng), None)

    def trained(self, phases: Sequence[Phase] | None = None) -> Local:
        """What a client holds after the phases, its method's or others."""
        member = self.begin()
        for number, phase in enumerate(self.method.phases() if phases is None else phases):
            client.enter(member, number, phase)
            client.train(self.method, phase, [member])
        return member.local

    def upload(self, number: int = 0) -> bytes:
        made = ENGINE.client(self.job, self.message, 1, number)
        assert isinstance(made, bytes), made
        return made

    def round(
        self, state: ServerState[Any] | None = None, number: int = 1, engine: Engine = ENGINE
    ) -> tuple[ServerState[Any], dict[str, Any]]:
        return rounds.one_round(self.spec, self.job, engine, self.state if state is None else state, number, {})


def begun(settings: dict[str, Any] | None = None, method: str = "fedcompress", **changes: Any) -> Run:
    """With `small`, unless the changes of the spec name another network."""
    quick = QUICK if method == "fedcompress" else {} if method == "fedavg" else {"decay": 0.0, "augment": "none"}
    fields = {"method": method, "model": "small", "optimizer": "adam", "lr": 0.01, "held_out": 0.1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", small)
        spec = Spec.from_dict(TINY | fields | {"hyper": quick | (settings or {})} | changes)
        job = build.job(spec, CPU)
    state = rounds.initial(job)
    return Run(spec, job, job.method, state, rounds.broadcast(job.method, state, 1))


def distinct(tensor: Tensor) -> int:
    return len(np.unique(tensor.detach().numpy()))
