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
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Method, Own, Settings
from fedlib.core.uploads import Buffer, NoUpdate, Update, Uploads
from fedlib.errors import PayloadError, SpecError, require_number
from fedlib.methods.fedpt import accounting, mechanisms
from fedlib.rng import Rng

ROUNDING = 1e-5  # by which a clipped norm may differ from the bound, as float32 is sent
log = logging.getLogger("fedlib")


class PrivateServer(Method[Own], Generic[Own]):
    """The server of a method whose settings name a mechanism, or "none"; the annotations are that method's fields."""

    mechanism: str
    clip_norm: float
    noise_multiplier: float
    delta: float
    weighting: str
    optimizer: str

    @property
    def private(self) -> bool:
        return self.mechanism != "none"

    @override
    def takes_mean(self) -> bool:
        return not self.private

    @override
    def __post_init__(self) -> None:
        """SpecError: a setting out of range, missing, or not for private training."""
        super().__post_init__()
        if not self.private:
            for field in ("clip_norm", "noise_multiplier", "delta"):
                if value := self.settings[field]:
                    raise SpecError(
                        f"hyper.{field}: {value!r} needs a mechanism; take dp_fedavg or dp_ftrl, or leave it out"
                    )
            return
        require_number("hyper.clip_norm", self.clip_norm, 1e-9, 1e9)
        require_number("hyper.noise_multiplier", self.noise_multiplier, 0, 1e6)
        accounting.require_delta("hyper.delta", self.delta)
        if self.weighting != "clients":
            raise SpecError(f"hyper.weighting: {self.weighting!r} lets a client weigh more than others; take clients")
        if self.mechanism == "dp_ftrl" and self.optimizer != "sgd":
            raise SpecError(f"hyper.optimizer: dp_ftrl is an optimizer itself, not {self.optimizer!r}; take sgd")

    @override
    def check(self, settings: Settings) -> None:
        """SpecError where the accounting does not hold for the way in which clients are drawn."""
        if not self.private:
            return
        accounting.require_sampler("sampling", self.mechanism, settings.sampling)
        if self.delta >= (most := 1 / settings.clients):
            raise SpecError(f"hyper.delta: {self.delta} must be below 1 / clients, which is {most:.3g}")

    @override
    def summary(self, settings: Settings) -> dict[str, Any]:
        """{"privacy": ...} of a private run; its epsilon, rounded up to six places, is null without noise.

        RunError: the package dp-accounting is missing.
        """
        if not self.private:
            return {}
        participations = weight = None
        if self.mechanism == "dp_ftrl" and settings.rounds * settings.cohort <= settings.clients:
            participations = 1
        elif self.mechanism == "dp_ftrl":
            weight = accounting.queue_weight(settings.clients, settings.cohort, settings.rounds)
        epsilon = accounting.epsilon(
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

    def gather(self, uploads: Uploads, read: Callable[[Buffer], Update], size: int) -> tuple[Tensor, float]:
        """The sum of a round's updates, flat and in float64 [size], and the share of them that was clipped; a longer
        one than agreed is refused.

        Where nobody comes both are zero.
        """
        total, norms, bound = torch.zeros(size, dtype=torch.float64), list[float](), self.clip_norm

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
        clipped = sum(norm > bound * (1 - ROUNDING) for norm in norms)
        return total, clipped / max(len(norms), 1)

    def noise_seed(self, rng: Rng) -> int:
        """The seed of a run's noise. RunError: noise without the package that tells its epsilon.

        Two runs must not share their noise, or their difference would show the updates. Here they do not where they
        differ in seed, method, network, plan, cohort, samples or partition; they do where only the way to draw cohorts
        differs.
        """
        if self.noise_multiplier:
            accounting.package()
        task = self.task
        labels = hashlib.blake2b(task.train[1].cpu().numpy().tobytes()).hexdigest()
        names = (repr(task.plan), task.cohort, labels, task.partition.hash, repr(task.held_out))
        return rng.child(self.fingerprint("noise").hex(), *names, "noise").seed()
