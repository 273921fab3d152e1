"""What follows from the fields of a spec: the method with its settings, local training, what a method is told of a run.

Apart from the spec itself, which a record holds: what stands here can change a number.
"""

from __future__ import annotations

import functools
from typing import Any

from fedlib.core.method import AnyMethod, AnyWriter, Settings
from fedlib.core.plan import Plan
from fedlib.methods import registry


class Derived:
    """The fields of Spec that these properties read."""

    method: str
    hyper: dict[str, Any]
    clients: int
    cohort: int
    rounds: int
    epochs: int
    batch: int
    lr: float
    sampling: str
    held_out: float
    optimizer: str
    momentum: float
    persistent: bool
    frozen: str
    downlink: dict[str, Any] | None

    @functools.cached_property
    def chosen(self) -> AnyMethod:
        """The method with its settings, not yet bound to a task."""
        return registry.make(self.method, self.hyper)

    @functools.cached_property
    def writer(self) -> AnyWriter | None:
        """The method that writes the broadcast model, if another one does."""
        return registry.make_writer(self.method, self.downlink) if self.downlink is not None else None

    @property
    def plan(self) -> Plan:
        return Plan(self.epochs, self.batch, self.lr, self.optimizer, self.persistent, self.momentum)

    @property
    def settings(self) -> Settings:
        """What a method may have a say in."""
        return Settings(self.clients, self.cohort, self.rounds, self.sampling, self.held_out, self.frozen, self.plan)
