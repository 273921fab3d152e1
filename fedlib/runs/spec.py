"""The description of a run; all is checked before anything is computed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from fedlib.core import optimizers
from fedlib.data import partition, sets
from fedlib.errors import SpecError, require_mapping, require_name, require_number
from fedlib.methods import registry
from fedlib.models.registry import MODELS

PROFILES = ("smoke", "lab", "paper")
SAMPLING = ("fixed", "poisson", "spaced")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run, completely: two equal specs give, on a CPU, equal records. Units stand beside the fields."""

    paper: str
    profile: str
    name: str  # file name of the record, made from the labels below
    group: str  # label of the experiment within the paper, e.g. "main"
    label: str  # label of the method with its settings, e.g. "fedmrn-binary"
    split: str  # label of the partition, e.g. "dirichlet-0.3"
    method: str  # key of methods.registry.METHODS
    hyper: dict[str, Any]  # fields of the method's Hyper
    data: str  # key of data.sets.ENTRIES
    model: str  # key of models.registry.MODELS
    partition: dict[str, Any]  # kind, seed and the kind's own parameters
    clients: int  # in total
    cohort: int  # clients a round, drawn by `sampling`
    rounds: int
    epochs: int  # local epochs per round
    batch: int  # samples per local step
    lr: float  # local learning rate
    evaluate_every: int  # rounds; the last round is always evaluated
    seed: int
    sampling: str = (
        "fixed"  # or "poisson": each client by itself with probability cohort / clients; or "spaced": by turns
    )
    held_out: float = 0.0  # share of each client's samples that it does not train on
    optimizer: str = "sgd"  # local; or "adam"
    momentum: float = 0.0  # of sgd
    persistent: bool = False  # a client's optimizer goes on from its state of the client's last round
    feedback: bool = False  # error feedback: a client adds to its update what compression lost of its last one
    frozen: str = "none"  # policy of models.freezing: parameters that keep their initial values, and are never sent
    downlink: dict[str, Any] | None = None  # method and hyper of another that writes the broadcast model

    def __post_init__(self) -> None:
        for field, allowed in (
            ("profile", PROFILES),
            ("method", registry.METHODS),
            ("data", sets.ENTRIES),
            ("model", MODELS),
            ("optimizer", optimizers.OPTIMIZERS),
            ("sampling", SAMPLING),
        ):
            require_name(field, getattr(self, field), allowed)
        for field in ("clients", "cohort", "rounds", "epochs", "batch", "evaluate_every"):
            require_number(field, getattr(self, field), 1, 10**9, integer=True)
        require_number("seed", self.seed, 0, 2**32 - 1, integer=True)
        require_number("lr", self.lr, 1e-12, 1e12)
        require_number("held_out", self.held_out, 0, 0.9)
        require_number("momentum", self.momentum, 0, 0.999999)
        if self.momentum and self.optimizer != "sgd":
            raise SpecError(f"momentum: {self.momentum} goes with optimizer sgd only; {self.optimizer} has its own")
        for field in ("feedback", "persistent"):
            if not isinstance(getattr(self, field), bool):
                raise SpecError(f"{field}: {getattr(self, field)!r} must be true or false")
        if self.persistent and (self.feedback or (self.optimizer == "sgd" and not self.momentum)):
            raise SpecError("persistent: True needs optimizer adam or momentum, and no feedback; use false")
        if self.feedback and not hasattr(registry.METHODS[self.method], "sent"):
            raise SpecError(
                f"feedback: True cannot go with {self.method}, for which error feedback is not written; use false"
            )
        if self.cohort > self.clients:
            raise SpecError(f"cohort: {self.cohort} exceeds clients: {self.clients}; draw fewer, or have more clients")
        partition.check(self.partition)
        registry.check(self)
        registry.downlink(self)

    @property
    def tuning(self) -> bool:
        """Whether the run is one of a search for settings, among which may be some with which it diverges."""
        return self.group.startswith("tune-")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def key(self) -> str:
        """Canonical text, equal for equal specs."""
        return json.dumps(self.as_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spec:
        known = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}
        require_mapping("run", values, known)
        missing = sorted(name for name, required in known.items() if required and name not in values)
        if missing:
            raise SpecError(f"run: {', '.join(missing)} not given")
        return cls(**values)
