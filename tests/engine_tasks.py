"""Settings, small networks and comparisons with which the engines for a GPU are held against the reference.

Without pytest, which a machine that is lent for its GPU may lack: `bench/first_card.py` uses them too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jobs import message_of
from torch import Tensor, nn

from fedlib.core import client
from fedlib.core.client import Job, Member
from fedlib.data import images, partition, sets
from fedlib.engines.in_process import InProcess
from fedlib.methods import registry
from fedlib.models import cnn, initializers
from fedlib.models.registry import MODELS
from fedlib.rng import Rng

# How far rounding may take trained tensors, relative to how far they moved. What decides against a threshold (a ReLU,
# a mask's draw) falls on its other side once in millions, which one client in thirty shows: 1e-3 was seen, 1e-6 else.
ROUNDING, TOLERANCE = 1e-5, 5e-3
# Of clients 0 to 9 these have, in batches of 76: client 0 and 8 one batch; 1 a last batch of one image; 2 four batches.
SIZES = [57, 153, 235, 151, 137, 157, 148, 147, 75, 177]
UNEQUAL: dict[str, Any] = dict(partition={"kind": "dirichlet", "beta": 0.3, "seed": 7}, epochs=2, batch=76)
COHORT = [3, 1, 8, 0, 2]
# FedCompress without clusters: what engines do with those has a test of its own.
OWN: dict[str, dict[str, Any]] = {"fedcompress": {"hyper": {"variant": "none", "augment": "random"}}}
SETTINGS: dict[str, dict[str, Any]] = {name: {"method": name, **OWN.get(name, {})} for name in registry.METHODS} | {
    "fedmrn signed": {"method": "fedmrn", "hyper": {"mask": "signed", "noise": "gauss", "magnitude": 0.05}},
    "fedpm adam": {"method": "fedpm", "hyper": {"ste": "prob", "weight_scale": "fedpm"}, "optimizer": "adam"},
    "fedpm threshold": {
        "method": "fedpm",
        "hyper": {"masking": "threshold", "aggregation": "bayes"},
        "optimizer": "adam",
    },
    "fedpm top": {"method": "fedpm", "hyper": {"masking": "top", "penalty": "mean_entropy"}, "optimizer": "adam"},
    "feddq ascending": {
        "method": "feddq",
        "hyper": {"schedule": "ascending", "quantizer": "norm", "most": 15},
        "momentum": 0.5,
    },
    "fedpt random": {"method": "fedpt", "hyper": {"policy": "random/0.5"}},
}
SPOILT = 5  # the client whose images are huge in data set "spoilt"


def fits(setting: dict[str, Any], model: str = "slice") -> str:
    """That model; for methods that refuse BatchNorm, one without; for FedPM one where pooling and ReLU break no ties.

    Weights -c and +c on the 17 greys of digits give many sums that are equal but for their rounding.
    """
    if setting["method"] == "fedpt" and model == "slice":
        return "biased"
    return "smooth" if setting["method"] == "fedpm" and model != "mlp" else model


def smooth(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """`biased` with tanh and the mean of four."""
    layers = [nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    linear = nn.Linear(4 * ((side - 2) // 2) ** 2, classes)
    return initializers.normal_weights(nn.Sequential(*layers, linear), deviation=0.2, root=root)


NETWORKS = {
    # Two of CNN4's blocks, then the classifier.
    "slice": cnn.normed("slice", (4, 6), 1, deviation=0.3),
    # CNN2 made narrow: convolution and linear layer with biases.
    "biased": cnn.plain("biased", (4,), (), deviation=0.2, pool_every=1, padding=0),
    "smooth": smooth,
}


def spoilt_digits(folder: Path) -> images.Arrays:
    x, y, test_x, test_y = images.read_digits(folder)
    x = x.astype(np.float32)
    x[partition.iid(y, 10, 1)[SPOILT]] *= 1e30
    return x, y, test_x, test_y


@contextlib.contextmanager
def small_world() -> Iterator[None]:
    """These networks and this data set, by name."""
    spoilt = dataclasses.replace(sets.ENTRIES["digits"], name="spoilt", read=spoilt_digits)
    with patch.dict(MODELS, NETWORKS), patch.dict(sets.ENTRIES, spoilt=spoilt):
        yield


def trained(job: Job, engine: InProcess, round: int, cohort: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """All floating tensors of each client before training, and after it, each client's as one vector."""
    message = message_of(job, round)
    members = [client.begin(job, message, round, number, None) for number in cohort]
    before, after = [snapshot(member) for member in members], list[Tensor]()
    for some in [members] if engine.side_by_side else [[member] for member in members]:
        for number, phase in enumerate(job.method.phases()):
            for member in some:
                client.enter(member, number, phase)
            engine.fit(job.method, phase, some)
        after += [snapshot(member) for member in some]
    return before, after


def snapshot(member: Member) -> Tensor:
    tensors = [*member.local.trainable.values(), *member.local.frozen.values()]
    return torch.cat([t.detach().cpu().flatten().double() for t in tensors if t.is_floating_point()])


def distance(found: Tensor, expected: Tensor, before: Tensor) -> float:
    """How far two results are apart, relative to how far training moved."""
    moved = float((expected - before).norm())
    assert moved > 0
    return float((found - expected).norm()) / moved


def sizes(uploads: Sequence[object]) -> list[int]:
    """Bytes of uploads, none of which is an error."""
    assert all(isinstance(upload, bytes) for upload in uploads)
    return [len(upload) for upload in uploads if isinstance(upload, bytes)]
