"""The description of a run; all is checked before anything is computed."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, Field, create_model
from pydantic.dataclasses import dataclass

from fedlib.core import averaging, optimizers
from fedlib.core.task import PRECISIONS
from fedlib.data import partition, sets
from fedlib.errors import SpecError, require_mapping
from fedlib.methods import registry
from fedlib.models.registry import MODELS
from fedlib.runs.derived import Derived
from fedlib.runs.validation import Like, Name, OneOf, Range, Table, raising_spec_errors

PROFILES = ("smoke", "lab", "night", "paper")
TUNING = "tune-"  # how the names of groups begin that search for settings
SAMPLING = ("fixed", "poisson", "spaced")

Count = Annotated[int, Range(1, 10**9)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def partitions(seed: tuple[Any, Any]) -> Any:
    """Any partition: its kind, a seed as pydantic takes a field, and that kind's own parameters."""
    models = []
    for kind, parameters in partition.PARAMETERS.items():
        own = {name: (Annotated[type_, Range(low, high)], ...) for name, (type_, low, high) in parameters.items()}
        fields: dict[str, Any] = {"kind": (Literal[kind], ...), "seed": seed} | own
        models.append(create_model(kind, __base__=Table, **fields))
    return Annotated[Union[tuple(models)], Field(discriminator="kind")]  # noqa: UP007


@raising_spec_errors
@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True))
class Spec(Derived):
    """One run, completely: two equal specs give, on a CPU, equal records. Units stand beside the fields."""

    paper: Name
    profile: Annotated[str, OneOf(PROFILES)]
    name: Name  # file name of the record, made from the labels below
    group: Name  # label of the experiment within the paper, e.g. "main"
    label: Name  # label of the method with its settings, e.g. "fedmrn-binary"
    split: Name  # label of the partition, e.g. "dirichlet-0.3"
    method: Annotated[str, OneOf(registry.METHODS)]  # key of methods.registry.METHODS
    hyper: dict[str, Any]  # the method's settings
    data: Annotated[str, OneOf(sets.ENTRIES)]  # key of data.sets.ENTRIES
    model: Annotated[str, OneOf(MODELS)]  # key of models.registry.MODELS
    partition: Annotated[dict[str, Any], Like(partitions((Seed, ...)))]  # kind, seed and the kind's own parameters
    clients: Count  # in total
    cohort: Count  # clients a round, drawn by `sampling`
    rounds: Count
    epochs: Count  # local epochs per round
    batch: Count  # samples per local step
    lr: Annotated[float, Range(1e-12, 1e12)]  # local learning rate
    evaluate_every: Count  # rounds; the last round is always evaluated
    seed: Seed
    sampling: Annotated[str, OneOf(SAMPLING)] = (
        "fixed"  # or "poisson": each client by itself with probability cohort / clients; or "spaced": by turns
    )
    held_out: Annotated[float, Range(0, 0.9)] = 0.0  # share of each client's samples that it does not train on
    # Share of the training samples that no client gets, and on which the model is evaluated in place of the test set.
    validation: Annotated[float, Range(0, 0.9)] = 0.0
    optimizer: Annotated[str, OneOf(optimizers.OPTIMIZERS)] = "sgd"  # local; or "adam"
    momentum: Annotated[float, Range(0, 0.999999)] = 0.0  # of sgd
    persistent: bool = False  # a client's optimizer goes on from its state of the client's last round
    feedback: bool = False  # error feedback: a client adds to its update what compression lost of its last one
    # Of the products in the network; weights, sums and messages are float32 always.
    precision: Annotated[str, OneOf(PRECISIONS)] = PRECISIONS[0]
    frozen: str = "none"  # policy of models.freezing: parameters that keep their initial values, and are never sent
    # A round whose change of the model is longer than so many times the model itself is not taken; 0: any is.
    most_change: Annotated[float, Range(0, 1e12)] = 0.0
    # What stands in place of the mean over clients, where some may lie: a rule of core.averaging.
    robust: Annotated[str, OneOf(("none", *averaging.RULES))] = "none"
    attackers: Annotated[int, Range(0, 10**9)] = 0  # clients that lie, the first ones
    attack: Annotated[float, Range(-1e6, 1e6)] = 1.0  # how: they send so many times the change that they have trained
    downlink: dict[str, Any] | None = None  # method and hyper of another that writes the broadcast model

    def __post_init__(self) -> None:
        if self.momentum and self.optimizer != "sgd":
            raise SpecError(f"momentum: {self.momentum} goes with optimizer sgd only; {self.optimizer} has its own")
        if (self.attackers == 0) != (self.attack == 1):
            raise SpecError(f"attackers: {self.attackers} with attack: {self.attack}; give both, or 0 and 1 for none")
        if self.attackers > self.clients:
            raise SpecError(f"attackers: {self.attackers} exceeds clients: {self.clients}; take fewer")
        if self.persistent and (self.feedback or (self.optimizer == "sgd" and not self.momentum)):
            raise SpecError("persistent: True needs optimizer adam or momentum, and no feedback; use false")
        if self.cohort > self.clients:
            raise SpecError(f"cohort: {self.cohort} exceeds clients: {self.clients}; draw fewer, or have more clients")
        partition.require_samples(self.partition["kind"], self.clients, self.data, sets.ENTRIES[self.data].samples)
        self.chosen.check(self.settings)
        if self.feedback and not self.chosen.feeds_back:
            raise SpecError(
                f"feedback: True cannot go with {self.method}, for which error feedback is not written; use false"
            )
        if self.robust != "none" and not self.chosen.takes_mean():
            raise SpecError(f"robust: {self.robust} cannot go with {self.method}, whose server takes no mean; use none")
        _ = self.writer  # checked too

    @property
    def tuning(self) -> bool:
        """Whether the run is one of a search for settings."""
        return self.group.startswith(TUNING)

    @property
    def may_diverge(self) -> bool:
        """Whether it is a finding where it does: in a search, or where clients lie."""
        return self.tuning or self.attackers > 0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def key(self) -> str:
        """Canonical text, equal for equal specs."""
        return json.dumps(self.as_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spec:
        require_mapping("run", values, [field.name for field in dataclasses.fields(cls)])
        return cls(**values)
