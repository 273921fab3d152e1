"""Private training as a part of a method: its settings checked, clipped updates summed, noise, what the run has spent.

A client counts for a whole, whatever its samples. The server is trusted with the updates, each no longer than the
agreed bound, and adds the noise. The mechanisms are those of `fedlib.methods.fedpt.mechanisms`.

Epsilon is that of a server whose noise and cohorts are secret, and of the models that it sends. Here both follow from
the run's seed, so that a run can be repeated, and a record also tells who took part and how many updates were clipped.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlib.core.method import Settings
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, NoUpdate, Update, Uploads
from fedlib.errors import PayloadError, SpecError, require_number
from fedlib.methods.fedpt import accounting, mechanisms
from fedlib.methods.fedpt.tree_sensitivity import queue_weight
from fedlib.rng import Rng

ROUNDING = 1e-5  # by which a clipped norm may differ from the bound, as float32 is sent
log = logging.getLogger("fedlib")


@dataclass(frozen=True)
class Privacy:
    """The settings of private training."""

    mechanism: str
    clip_norm: float
    noise_multiplier: float
    delta: float

    @property
    def wanted(self) -> bool:
        return self.mechanism != "none"

    def validate(self, weighting: str, optimizer: str) -> None:
        """SpecError: a setting out of range, missing, or not for private training."""
        if not self.wanted:
            for field, value in vars(self).items():
                if value and field != "mechanism":
                    raise SpecError(
                        f"hyper.{field}: {value!r} needs a mechanism; take dp_fedavg or dp_ftrl, or leave it out"
                    )
            return
        require_number("hyper.clip_norm", self.clip_norm, 1e-9, 1e9)
        require_number("hyper.noise_multiplier", self.noise_multiplier, 0, 1e6)
        if not self.delta:
            raise SpecError("hyper.delta: not given, and an epsilon means nothing without it; take say clients ** -1.1")
        require_number("hyper.delta", self.delta, 1e-300, 1)
        if weighting != "clients":
            raise SpecError(f"hyper.weighting: {weighting!r} lets a client weigh more than others; take clients")
        if self.mechanism == "dp_ftrl" and optimizer != "sgd":
            raise SpecError(f"hyper.optimizer: dp_ftrl is an optimizer itself, not {optimizer!r}; take sgd")

    def check(self, settings: Settings) -> None:
        """SpecError where the accounting does not hold for the way in which clients are drawn."""
        if not self.wanted:
            return
        fitting = [sampler for mechanism, sampler in accounting.NEIGHBOURS if mechanism == self.mechanism]
        if settings.sampling not in fitting:
            raise SpecError(
                f"sampling: {settings.sampling!r} is not what the accounting of {self.mechanism} assumes; "
                f"allowed: {' '.join(fitting)}"
            )
        if self.delta >= (most := 1 / settings.clients):
            raise SpecError(f"hyper.delta: {self.delta} must be below 1 / clients, which is {most:.3g}")

    def epsilon(self, settings: Settings) -> float:
        """That of the whole run, infinite without noise. RunError: the package dp-accounting is missing."""
        participations = weight = None
        if self.mechanism == "dp_ftrl" and settings.rounds * settings.cohort <= settings.clients:
            participations = 1
        elif self.mechanism == "dp_ftrl":
            weight = queue_weight(settings.clients, settings.cohort, settings.rounds)
        return accounting.epsilon(
            self.mechanism,
            settings.sampling,
            noise_multiplier=self.noise_multiplier,
            delta=self.delta,
            clients=settings.clients,
            cohort=settings.cohort,
            rounds=settings.rounds,
            participations=participations,
            weight=weight,
        )

    def summary(self, settings: Settings) -> dict[str, Any]:
        """{"privacy": ...} of a private run; its epsilon, rounded up to six places, is null without noise."""
        if not self.wanted:
            return {}
        epsilon = self.epsilon(settings)
        privacy = {
            "mechanism": self.mechanism,
            "sampling": settings.sampling,
            "neighbours": accounting.NEIGHBOURS[self.mechanism, settings.sampling],
            "clip_norm": self.clip_norm,
            "noise_multiplier": self.noise_multiplier,
            "epsilon": math.ceil(1e6 * epsilon) / 1e6 if math.isfinite(epsilon) else None,
            "delta": self.delta,
        }
        return {"privacy": privacy}


def gather(uploads: Uploads, read: Callable[[Buffer], Update], bound: float, size: int) -> tuple[Tensor, list[float]]:
    """The sum of a round's updates, flat and in float64 [size], and their norms; a longer one than agreed is refused.

    Where nobody comes the sum is zero.
    """
    total, norms = torch.zeros(size, dtype=torch.float64), list[float]()

    def bounded(upload: Buffer) -> Update:
        change, samples = read(upload)
        change, norm = mechanisms.clip(change, bound)
        if norm > bound * (1 + ROUNDING):
            raise PayloadError(f"update is longer than the agreed bound {bound}")
        norms.append(norm)
        return change, samples

    try:
        for change, _ in uploads.read(bounded):
            total += mechanisms.flatten(change)
    except NoUpdate:
        log.info("a round without any update: it consists of noise")
    return total, norms


def noise_seed(task: Task, fingerprint: bytes, rng: Rng) -> int:
    """The seed of a run's noise. `fingerprint`: of the method's settings.

    Two runs must not share their noise, or their difference would show the updates. Here they do not where they differ
    in seed, method, network, plan, cohort, samples or partition; they do where only the way to draw cohorts differs.
    """
    labels = hashlib.blake2b(task.train[1].cpu().numpy().tobytes()).hexdigest()
    samples = (labels, task.partition.hash, repr(task.held_out))
    return rng.child(fingerprint.hex(), repr(task.plan), task.cohort, *samples, "noise").seed()
