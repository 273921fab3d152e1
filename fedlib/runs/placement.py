"""Where the runs of a command belong when nobody says: a GPU takes its time for launches, a core for sums.

A step of the perceptron on digits is 10^5 multiply-accumulates, one of CNN4 on images of 32 x 32 is 10^9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlib.models import macs
from fedlib.runs import build
from fedlib.runs.spec import Spec

LAUNCHES = 1e-3  # seconds that a GPU takes for a local step, however small: an estimate for about a hundred kernels
CORE = 2e10  # multiply-accumulates a second, an estimate for one core


def work(spec: Spec) -> int:
    """Multiply-accumulates of a local step."""
    task = build.task(spec, torch.device("cpu"))
    task.network.eval()  # which takes a single sample
    return spec.batch * macs.total(macs.count(task.network, task.train[0], task.frozen)).total


def groups(specs: Sequence[Spec], cores: int) -> dict[str, list[Spec]]:
    """The runs by device, where there is a GPU: on the CPU those with a step that so many cores, a client or a run on
    each, are sooner done with than a GPU is with its launches."""
    kinds = {(spec.model, spec.data, spec.batch, spec.frozen): spec for spec in specs}
    small = {kind for kind, spec in kinds.items() if work(spec) < LAUNCHES * CORE * cores}
    found: dict[str, list[Spec]] = {"cuda": [], "cpu": []}
    for spec in specs:
        kind = spec.model, spec.data, spec.batch, spec.frozen
        found["cpu" if kind in small else "cuda"].append(spec)
    return {device: group for device, group in found.items() if group}
