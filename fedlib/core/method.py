"""What a method is: five functions that it must have, and a handful that it may replace.

    server   broadcast(state) -> bytes                   the message down
    client   begin(message, shard, rng) -> Local         what it trains, and what stays as it is
             loss(trainable, frozen, batch, drawn)       of a local step
             upload(local, held_out, rng) -> bytes       the message up
    server   aggregate(state, uploads) -> state          uses nothing but the uploads' bytes

A method is a frozen dataclass whose fields are its settings. It is made once to check them, and bound once a run to the
task that both sides have agreed on. `fedlib.core.client` walks a client through these functions; engines decide where.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar, cast

from torch import Tensor

from fedlib.core.plan import Plan, Samples, Tensors, count
from fedlib.core.settings import check_settings
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.rng import Rng, Stream

Own = TypeVar("Own")
Draws = Any  # tensors and floats, in tuples: engines stack them, and `loss` neither branches on them nor reads them out


@dataclass(frozen=True)
class ServerState(Generic[Own]):
    """What the server keeps between rounds: what is learnt, on the CPU, and what is the method's own."""

    model: Tensors
    own: Own


def split_tensors(value: Any, tensors: Tensors, path: str) -> Any:
    """As JSON has it, but for the tensors within dataclasses and dicts: these go to `tensors`, each under its place."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: vars(value)[field.name] for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: split_tensors(inner, tensors, f"{path}/{name}") for name, inner in value.items()}
    return value


@dataclass
class Local:
    """What a client holds during a round, on the task's device."""

    trainable: Tensors
    frozen: Tensors  # no gradient; BatchNorm's statistics, which stand here, do change
    samples: int
    seed: int = 0  # that the broadcast named, of methods that make tensors from one


def train_model(task: Task, model: Tensors, samples: int) -> Local:
    """Trained are the model's weights and vectors, in place; frozen are the statistics."""
    there = {name: tensor.to(task.device) for name, tensor in model.items()}
    trainable = {name: there[name].requires_grad_() for name in task.weights | task.vectors}
    return Local(trainable, {name: there[name] for name in task.statistics}, samples)


class Phase(NamedTuple):
    """A part of local training, with an optimizer that begins anew."""

    plan: Plan
    prepare: Callable[[Local, Rng], None] | None = None  # before its first step, in place


class Sizes(NamedTuple):
    """Bits of an upload as the paper's own definition counts them, and by other definitions, by name."""

    paper: float
    others: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Settings:
    """The fields of a run that a method may have a say in."""

    clients: int
    cohort: int
    rounds: int
    sampling: str
    held_out: float
    frozen: str
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Method(abc.ABC, Generic[Own]):
    """Subclasses are abstract, or final and in the registry."""

    name: ClassVar[str]
    sections: ClassVar[tuple[str, ...]]  # names of an upload's parts
    plain: ClassVar[bool] = False  # whether it broadcasts the model as it is, so that another method may write it
    own_type: ClassVar[type[Any] | None] = None  # dataclass of its own part of the server's state
    averages: ClassVar[bool] = False  # whether its server takes a mean, unless `takes_mean` knows better
    feeds_back: ClassVar[bool] = False  # whether clients may add to an update `u` what the last one lost: `sent`

    bound: Task | None = dataclasses.field(default=None, repr=False, compare=False)
    writer: AnyWriter | None = dataclasses.field(default=None, repr=False, compare=False)  # of the broadcast model

    def __post_init__(self) -> None:
        check_settings(self)

    def bind(self, task: Task, writer: AnyWriter | None = None) -> Self:
        """The same settings with the task of a run, and the method that writes its broadcast if another one does."""
        return dataclasses.replace(self, bound=task, writer=writer)

    @property
    def task(self) -> Task:
        if self.bound is None:
            raise RuntimeError(f"{self.name} is not bound to a task: call bind first")
        return self.bound

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain values, in their order."""
        return {name: vars(self)[name] for name in self.defaults()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Names and defaults of the settings."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in ("bound", "writer")}

    def fingerprint(self, of: str = "") -> bytes:
        """8 bytes that differ whenever a message could not be read right."""
        return self.task.fingerprint(of or self.name, self.settings)

    # What a method must have

    @abc.abstractmethod
    def broadcast(self, state: ServerState[Own]) -> bytes:
        """The message that every client of the round gets."""

    @abc.abstractmethod
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        """What a client trains, from the broadcast alone. PayloadError: a message that cannot be read."""

    @abc.abstractmethod
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Draws) -> Tensor:
        """The objective of a local step, a scalar that `trainable` has gradients of."""

    @abc.abstractmethod
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        """The message up. `held_out`: samples that were not trained on. PayloadError: what is not finite."""

    @abc.abstractmethod
    def aggregate(self, state: ServerState[Own], uploads: Uploads) -> ServerState[Own]:
        """The server's new state. Every upload is read once, in order; NoUpdate where none could be used."""

    # What it may replace

    def initial(self, rng: Rng) -> ServerState[Own]:
        """What the server has before the first round."""
        return ServerState(self.task.initial(), cast(Own, None))

    def draw(self, progress: float, stream: Stream) -> Draws:
        """The randomness of a local step; progress in (0, 1] is the share of steps done with it."""
        return None

    def phases(self) -> Sequence[Phase]:
        """Local training in parts, each with an optimizer of its own."""
        return (Phase(self.task.plan),)

    def models(self, state: ServerState[Own], rng: Rng) -> list[Tensors]:
        """The models that a state stands for: their mean accuracy is the round's."""
        return [state.model]

    def sizes(self, upload: Buffer) -> Sizes:
        return Sizes(32.0 * count(self.task.tensors))

    def notes(self, state: ServerState[Own]) -> dict[str, Any]:
        """What the record says of a round beside the rest."""
        return {}

    def takes_mean(self) -> bool:
        """Whether another rule may stand in the place of the server's mean."""
        return self.averages

    def check(self, settings: Settings) -> None:
        """SpecError where the run's other fields do not go with the method's."""

    def sent(self, upload: Buffer, local: Local) -> Tensor:
        """At the client: what the server will read as its update [d], for error feedback."""
        raise TypeError(f"{self.name} has no error feedback")

    def summary(self, settings: Settings) -> dict[str, Any]:
        """What the record says of the whole run beside the rest."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ModelWriter(Method[Own], Generic[Own]):
    """A method that can also write any model in few bytes, with losses: what another method's broadcast can be."""

    @abc.abstractmethod
    def write_model(self, model: Tensors) -> bytes: ...

    @abc.abstractmethod
    def read_model(self, data: Buffer | memoryview) -> Tensors:
        """The tensors as clients read them. PayloadError: bytes that cannot be read."""

    @abc.abstractmethod
    def check_writer(self) -> None:
        """SpecError: settings with which it writes no model."""

    def received(self, model: Tensors) -> Tensors:
        """What a client reads of a model."""
        return self.read_model(self.write_model({name: model[name] for name in self.task.tensors}))


AnyMethod = Method[Any]
AnyWriter = ModelWriter[Any]
