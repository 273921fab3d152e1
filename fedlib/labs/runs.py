"""Federated runs of a few seconds on digits. They leave no record and no checkpoint: nothing is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Local, Sizes
from fedlib.core.plan import count
from fedlib.core.uploads import Buffer
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import registry
from fedlib.methods.update_codec import Section, UpdateCodec
from fedlib.own.federate import federate
from fedlib.own.results import Run
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

Encode = Callable[[np.ndarray, np.random.Generator], bytes]
Decode = Callable[[bytes, int], np.ndarray]

# The same network, clients, rounds and learning rate for every method, but where OWN says otherwise.
COMMON: dict[str, Any] = dict(
    network="mlp", train="digits", clients=10, cohort=5, rounds=10, epochs=2, batch_size=16, lr=0.1, seed=0
)
OWN: dict[str, dict[str, Any]] = {
    "fedcompress": dict(
        settings=dict(
            layers="all", least=16, most=16, decay=0, augment="none", clustered_epochs=1, clustered_lr=0.0025,
            distil_epochs=2, distil_lr=0.001, distil_batch=100, images=300,
        )
    ),
    "fedmrn": dict(settings={"magnitude": 0.1}),
    "fedpm": dict(optimizer="adam", settings={"lam": 0.0, "weight_scale": "critical"}),
    "fedpt": dict(lr=0.2, settings={"policy": "random/0.2"}),
}  # fmt: skip


def train(method: str, **changes: Any) -> Run:
    """The labs' run of a method: `fedlib.federate` with these arguments changed; `settings` adds to the method's own.

    SpecError: an unknown method or argument, or a value out of range. RunError: a round in which no upload can be used;
    its message has the last reason.
    """
    own = OWN.get(method, {})
    settings = own.get("settings", {}) | changes.pop("settings", {})
    arguments = {**COMMON, "method": method, **own, **changes, "settings": settings}
    return federate(**arguments, engine="process", device="cpu")


def exchange(method: str, client: int = 0, **changes: Any) -> tuple[bytes, bytes]:
    """The broadcast of a run's first round, and what this client answers. PayloadError: it has nothing to send."""
    run = train(method, **changes | {"rounds": 1})  # whose record says what the run is
    engine = InProcess(torch.device("cpu"))
    job = build.job(Spec.from_dict(run.record["spec"]), engine.device)
    broadcast = rounds.broadcast(job.method, rounds.initial(job), 1)
    upload = engine.client(job, broadcast, 1, client)
    if not isinstance(upload, bytes):
        raise PayloadError(f"client {client} sends no plain upload: {upload}")
    return broadcast, upload


def update(client: int = 0) -> np.ndarray:
    """How a client's training changes the model in the first round of the labs' run, float32 [d]."""
    seen: list[np.ndarray] = []

    def encode(u: np.ndarray, rng: np.random.Generator) -> bytes:
        seen.append(u.copy())
        return b""

    with trying(encode, lambda data, d: np.zeros(d)) as name:
        exchange(name, client)
    return seen[-1]


@contextlib.contextmanager
def trying(encode: Encode, decode: Decode, name: str = "codec") -> Iterator[str]:
    """Inside, the codec is a method of this name, as fedavg is one. SpecError: the name is taken.

    encode: update float32 [d], generator of random numbers -> bytes; decode: those bytes, d -> update [d].
    """
    if name in registry.METHODS:
        raise SpecError(f"name: {name!r} is a method already; give the codec another one")
    registry.METHODS[name] = method_of(encode, decode, name)
    try:
        yield name
    finally:
        del registry.METHODS[name]


def method_of(encode: Encode, decode: Decode, codec: str) -> type[UpdateCodec[None]]:
    """A method that trains as FedAvg does and sends its update by this codec."""

    @dataclass(frozen=True, kw_only=True)
    class Trial(UpdateCodec[None]):
        """A codec under trial: its settings stand in its code."""

        name = codec
        sections = ("codec", "full precision")

        @override
        def encode(self, u: Tensor, local: Local, rng: Rng) -> list[Section]:
            data = encode(u.cpu().numpy().copy(), np.random.default_rng(rng.child("codec").seed()))
            if not isinstance(data, bytes):
                raise PayloadError(f"encode gave {type(data).__name__}, expected bytes")
            return [data]

        @override
        def decode(self, sections: Sequence[memoryview], own: None) -> Tensor:
            d = count(self.task.weights)
            found = np.array(decode(bytes(sections[0]), d), dtype=np.float32)
            if found.shape != (d,) or not np.isfinite(found).all():
                raise PayloadError(f"decode gave shape {found.shape}, expected {d} finite numbers")
            return torch.from_numpy(found)

        @override
        def sizes(self, upload: Buffer) -> Sizes:
            return Sizes(8.0 * container.section_sizes(upload)[0])

    return Trial
