"""Messages as they are really sent, of every method and in both directions, and what may happen to them."""

import contextlib
import functools
import itertools
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from known_answers import CASES, QUICK, TINY
from small_task import CPU
from typing_extensions import override

from fedlib.core import client
from fedlib.core.client import Job, Reply
from fedlib.core.method import AnyMethod, ServerState
from fedlib.core.plan import Tensors, count
from fedlib.core.uploads import Buffer, NoUpdate, Update, Uploads
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError
from fedlib.methods.fedsparse.method import FedPM
from fedlib.rng import Rng
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

ENGINE = InProcess(CPU)
MORE: dict[str, dict[str, Any]] = {  # forms of messages that the short runs of known_answers do not send
    "fedavg over clusters": {
        "downlink": {"method": "fedcompress", "hyper": QUICK | {"least": 8, "most": 8}},
        "model": "emnist-hidden8",
    },
    "feddq symmetric": {
        "method": "feddq",
        "hyper": {"quantizer": "symmetric_nearest", "schedule": "loss", "first": 9, "downlink": 0.001},
    },
    "feddq coded": {"method": "feddq", "hyper": {"coding": "entropy"}, "model": "emnist-hidden8"},
    "feddq norm": {"method": "feddq", "hyper": {"quantizer": "norm", "schedule": "fixed", "width": 3, "most": 15}},
    "feddq buckets": {
        "method": "feddq",
        "hyper": {"quantizer": "buckets", "schedule": "ascending", "first": 3, "most": 15, "coding": "entropy"},
    },
    "fedmrn coded": {"method": "fedmrn", "hyper": {"coding": "entropy"}, "lr": 0.001},
    "fedpm by layers": {"method": "fedpm", "hyper": {"coding": "layers"}, "optimizer": "adam"},
}
EVERY = CASES | MORE
# Sections of float32 alone: those of uploads by name, and those of broadcasts that are no plain model
FLOATS = {"model", "full precision", "scales", "scale", "values", "loss", "trained part"}
DOWN = {
    "fedcompress": (2,),
    "fedpm": (1,),
    "fedpt": (1,),
    "fedsparsify": (1, 2),
    "fedzip": (2,),
    "feddq symmetric": (2,),
}


# What is really sent


@dataclass(frozen=True)
class Channel:
    """A message as it is sent, and its receiver: what it reads, by name. PayloadError."""

    message: bytes
    read: Callable[[bytes], Tensors]
    floats: tuple[int, ...]  # sections that hold float32 and nothing else
    model: int  # bytes
    serve: Callable[[bytes], Tensors] | None = None  # of an upload: the server's new model

    @functools.cached_property
    def sections(self) -> list[bytes]:
        ends = np.cumsum([0, *container.section_sizes(self.message)])
        body = self.message[len(self.message) - 4 - ends[-1] : -4]
        return [body[start:end] for start, end in itertools.pairwise(ends)]

    @property
    def label(self) -> tuple[str, bytes]:
        """Kind and fingerprint."""
        end = 5 + self.message[4]
        return self.message[5:end].rstrip(b"\0").decode(), self.message[end : end + 8]

    def packed(self, sections: list[bytes], label: tuple[str, bytes] | None = None) -> bytes:
        """The same with other sections or under another label."""
        (samples,) = struct.unpack_from("<I", self.message, 13 + self.message[4])
        return container.address(container.pack(*(label or self.label), samples, sections), *self.address)

    @property
    def address(self) -> tuple[int, int]:
        """Round and client."""
        return struct.unpack_from("<II", self.message, 17 + self.message[4])

    def changed(self, index: int, content: bytes) -> bytes:
        """The same with another content of one section."""
        return self.packed([*self.sections[:index], content, *self.sections[index + 1 :]])

    def reads(self, message: bytes) -> bool:
        """Whether it is read, and if so, rightly; False for a refusal."""
        try:
            found = self.read(message)
        except PayloadError:
            return False
        assert {name: tensor.shape for name, tensor in found.items()} == self.shapes
        assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
        return True

    @functools.cached_property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.read(self.message).items()}


class Asked(Uploads):
    """Uploads that keep the reader that a method hands them, and have nothing to read."""

    @override
    def read(self, decode: Callable[[Buffer], Update]) -> Iterator[Update]:
        self.decode = decode
        raise NoUpdate


def reader(method: AnyMethod, state: ServerState[Any]) -> Callable[[bytes], Tensors]:
    """What the server reads of client 3's upload in round 2, the sample count among it."""
    asked = Asked([])
    with contextlib.suppress(NoUpdate):  # which rounds in private do not raise
        method.aggregate(state, asked)

    def read(upload: bytes) -> Tensors:
        container.check_address(upload, 2, 3)
        tensors, samples = asked.decode(upload)
        return tensors | {"samples": torch.tensor(samples)}

    return read


def sent(job: Job, message: bytes, number: int, memory: bytes | None) -> tuple[bytes, bytes | None]:
    """Client 3's upload, and what it keeps."""
    upload = ENGINE.client(job, message, number, 3, memory)
    if isinstance(upload, Reply):
        return upload.upload, upload.memory
    assert isinstance(upload, bytes), upload
    return upload, None


@functools.cache
def channels(name: str, **changes: Any) -> dict[str, Channel]:
    """The messages of a run's second round, by direction: then pruning, levels and the like have begun.

    changes: of the run's description, such as another model.
    """
    spec = Spec.from_dict(TINY | EVERY[name] | changes)
    job = build.job(spec, ENGINE.device)
    method, task = job.method, job.task
    first = rounds.initial(job)
    upload, memory = sent(job, rounds.broadcast(method, first, 1), 1, b"" if spec.feedback or spec.persistent else None)
    state = method.aggregate(first, Uploads([(3, upload)]))
    message = rounds.broadcast(method, state, 2)
    upload, _ = sent(job, message, 2, memory)
    size = 4 * count({**task.tensors, **task.frozen})

    def begun(message: bytes) -> Tensors:
        local = client.read(method, message, 2, task.shard(3), Rng(0))
        here = local.trainable | local.frozen
        here.pop("loss", None)  # of FedDQ: not read but measured, and at enormous weights it overflows
        return {name: tensor.detach() for name, tensor in here.items()}

    def served(upload: bytes) -> Tensors:
        new = method.aggregate(state, Uploads([(3, upload)], method.sizes, round=2))
        method.notes(new)
        return new.model

    floats = tuple(index for index, part in enumerate(method.sections) if part in FLOATS)
    plain = () if method.writer else DOWN.get(name, DOWN.get(method.name, (0,)))
    found = {
        "up": Channel(upload, reader(method, state), floats, size, served),
        "down": Channel(message, begun, plain, size),
    }
    if method.writer:
        model = {name: state.model[name] for name in task.tensors}
        found["model"] = Channel(method.writer.write_model(model), method.writer.read_model, (), size)
    if isinstance(method, FedPM):
        found["file"] = Channel(method.save_model(state, Rng(0)), method.load_model, (), size)
    return found


CHANNELS = [(name, "up") for name in EVERY] + [(name, "down") for name in EVERY]
CHANNELS += [(name, "model") for name in EVERY if "downlink" in EVERY[name]]
CHANNELS += [(name, "file") for name in EVERY if EVERY[name].get("method") == "fedpm"]


# What may happen to it

Bad = Iterator[tuple[str, bytes]]  # what has been done to a message, and the message


def places(size: int, first: int = 64, between: int = 40, last: int = 8) -> list[int]:
    """Some places in so many bytes: the first, the last, and some between them."""
    spread = range(first, size, max(1, (size - first) // between)) if size > first else ()
    return sorted({*range(min(first, size)), *spread, *range(max(0, size - last), size)})


def flipped(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def sealed(message: bytes) -> bytes:
    """With the checksum that its bytes have now."""
    return message[:-4] + struct.pack("<I", xxhash.xxh3_64_intdigest(message[:-4]) % 2**32)


def cut_or_grown(channel: Channel) -> Bad:
    good = channel.message
    for at in places(len(good)):
        yield f"cut to {at}", good[:at]
        if at > 4:
            yield f"cut to {at}, sealed", sealed(good[:at])
    for more in (b"\0", bytes(4), b"\xff" * 64, good):
        yield f"{len(more)} more", good + more
        yield f"{len(more)} more, sealed", sealed(good + more)


def altered(channel: Channel) -> Bad:
    """A flipped bit that the checksum shows."""
    for at in places(len(channel.message)):
        yield f"byte {at}", flipped(channel.message, at, 1 << at % 8)


def altered_heads(channel: Channel) -> Bad:
    """All of the envelope but the sample count, which may be any, and the address of what is sent to nobody."""
    samples = 13 + channel.message[4]
    head = len(channel.message) - 4 - sum(map(len, channel.sections))
    free = range(samples, samples + (4 if any(channel.address) else 12))
    for at in set(range(head)) - set(free):
        for mask in (1, 4, 128, 255):
            yield f"byte {at} by {mask}", sealed(flipped(channel.message, at, mask))


def other_lengths(channel: Channel) -> Bad:
    parts = channel.sections
    for index, part in enumerate(parts):
        for cut in {1, 4, len(part) // 2, len(part)}:
            if 0 < cut <= len(part):
                yield f"section {index} without its last {cut}", channel.changed(index, part[:-cut])
        for more in (b"\0", bytes(4), b"\xff" * 4, bytes(64), part or b"\0"):
            yield f"section {index} and {len(more)}", channel.changed(index, part + more)
        for other in range(index):
            if len(parts[other]) != len(part):
                swapped = list(parts)
                swapped[index], swapped[other] = parts[other], part
                yield f"sections {other} and {index} swapped", channel.packed(swapped)
        if len(parts) > 1:
            yield f"no section {index}", channel.packed([*parts[:index], *parts[index + 1 :]])
    for another in (b"", b"\0", bytes(8)):
        if len(parts) < 4:
            yield "a section more", channel.packed([*parts, another])


NUMBERS = {"nan": "0000c07f", "inf": "0000807f", "minus inf": "000080ff", "signalling nan": "010080ff"}


def not_finite(channel: Channel, index: int) -> Bad:
    part = channel.sections[index]
    for number, coded in NUMBERS.items():
        for at in places(len(part) // 4, 2, 3, 2):
            content = part[: 4 * at] + bytes.fromhex(coded) + part[4 * at + 4 :]
            yield f"{number} at {at}", channel.changed(index, content)


def altered_sections(channel: Channel) -> Bad:
    """Flipped bits, and four bytes that are no finite number, anywhere, with the right checksum."""
    for index, part in enumerate(channel.sections):
        for at in places(len(part), 48, 24, 8):
            contents = [flipped(part, at, mask) for mask in (1 << at % 8, 255)]
            contents += [part[:at] + bytes.fromhex(coded) + part[at + 4 :] for coded in ("0000c07f", "000080ff")]
            for content in contents:
                if len(content) == len(part):
                    yield f"section {index} at {at}", channel.changed(index, content)
