"""FedDQ's messages: exact sizes (property 6 of its specification's section 7.3; 3.5), and lies that are only its own.

Integers of any width and the entropy coder have tests of their own in tests/wire.
"""

import dataclasses
import functools
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from common import range_coded
from feddq_runs import sections
from hypothesis import given
from hypothesis import strategies as st
from small_task import make_task
from torch import Tensor, nn

from fedlib.core.plan import Plan, Tensors
from fedlib.core.task import Task
from fedlib.errors import PayloadError
from fedlib.methods.feddq.method import FedDQ
from fedlib.rng import Rng
from fedlib.wire import container, entropy, levels
from fedlib.wire.levels import Levels

pytestmark = pytest.mark.usefixtures("one_thread")
Sections = list[bytes]


class Unused(nn.ModuleList):
    """Layers that have no say in the output."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@functools.cache
def task_of(*sizes: int) -> Task:
    """Matrices of the given sizes and nothing else."""
    return make_task(Unused(nn.Linear(size, 1, bias=False) for size in sizes), Plan(epochs=1, batch=4, lr=0.1))


def of(task: Task | None = None, **settings: Any) -> FedDQ:
    return FedDQ(**settings).bind(task or SMALL)


SHARD = (torch.zeros(7, 2), torch.zeros(7, dtype=torch.int64))
SMALL = task_of(5, 700, 33, 1)
SIZES = [5, 700, 33, 1]
AFFINE = of()
CODED = of(coding="entropy")
SYMMETRIC = of(quantizer="symmetric_nearest", schedule="loss", first=9)
NORM = of(quantizer="norm", schedule="fixed", width=3, most=15)
BUCKETS = of(quantizer="buckets", schedule="ascending", first=3, most=15, coding="entropy")
ALL = [AFFINE, CODED, SYMMETRIC, NORM, BUCKETS]


def update(task: Task) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 0.01 * (i + 1) for i, shape in enumerate(task.weights.values())]


def upload(method: FedDQ) -> bytes:
    """What a client sends whose training has moved its tensors by the update."""
    local = method.begin(method.broadcast(method.initial(Rng(0))), SHARD, Rng(0))
    for name, change in zip(local.trainable, update(method.task), strict=True):
        local.frozen[f"from {name}"].zero_()
        local.trainable[name].detach().copy_(change)
    local.frozen["loss"] = torch.tensor(2.5)
    return method.upload(local, SHARD, Rng(3))


def seal(parts: Sections, method: FedDQ, kind: str = "feddq.up", samples: int = 7) -> bytes:
    """A message whose envelope is right, whatever its sections say."""
    return container.pack(kind, method.fingerprint(), samples, parts)


def read(parts: Sections, method: FedDQ) -> Tensors:
    return method.read_update(seal(parts, method))[0]


# Sizes


@pytest.mark.parametrize("method", [AFFINE, SYMMETRIC, of(schedule="fixed", width=11), of(resolution=1e-5)])
def test_06_payload_of_entries_at_their_width(method: FedDQ) -> None:
    """sum d b bits, nine bytes of header a tensor, each tensor's levels from a byte of its own, an envelope."""
    message = upload(method)
    head, body, scales, loss = sections(message)
    widths = [head[9 * i] for i in range(4)]
    ranges = [float(x.max()) - float(x.min()) for x in update(SMALL)]
    if method.schedule == "range":
        assert widths == [math.ceil(math.log2(r / method.resolution)) if r else 0 for r in ranges]
    else:
        assert widths == [4 if method.schedule == "loss" else 11] * 3 + [0], "s = 9 intervals take ceil(log2(10)) bits"
    assert len(head) == 9 * 4 and scales == b"" and len(loss) == 4 * (method.schedule == "loss")
    assert len(body) == sum(math.ceil(d * b / 8) for d, b in zip(SIZES, widths, strict=True))
    assert method.sizes(message).paper == sum(d * b for d, b in zip(SIZES, widths, strict=True))
    told = method.read_update(message)[0]
    assert told["widths"].tolist() == widths and told["ranges"].tolist() == pytest.approx(ranges, rel=1e-6)
    assert 0 < len(message) - len(head) - len(body) - len(loss) <= 64


@pytest.mark.parametrize("s", [1, 2, 3, 4, 7, 8, 255])
@pytest.mark.parametrize("quantizer", ["norm", "buckets"])
def test_06_norm_quantizers_take_a_scale_and_a_sign(quantizer: str, s: int) -> None:
    """32 + d + d ceil(log2(s + 1)) bits a tensor; of buckets 32 for each 512 entries."""
    method = of(quantizer=quantizer, schedule="ascending", first=s, most=15)
    message = upload(method)
    counts = [1, 2, 1, 1] if quantizer == "buckets" else [1] * 4
    expected = sum(32 * c + d + d * math.ceil(math.log2(s + 1)) for c, d in zip(counts, SIZES, strict=True))
    assert method.sizes(message).paper == expected
    assert len(sections(message)[2]) == 4 * sum(counts)


@range_coded
@pytest.mark.parametrize("method", [AFFINE, SYMMETRIC, NORM, BUCKETS])
def test_entropy_coding_changes_the_size_alone(method: FedDQ) -> None:
    task = task_of(100_000, 50_000, 300)
    packed, coded = (dataclasses.replace(method, coding=coding, bound=task) for coding in ("packed", "entropy"))
    small, large = upload(coded), upload(packed)
    one, other = coded.read_update(small)[0], packed.read_update(large)[0]
    assert one.keys() == other.keys()
    assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one)
    assert coded.sizes(small).paper == packed.sizes(large).paper
    body, (head, plain, *_) = sections(small)[1], sections(large)
    start, bound = 0, 0.0
    for part in levels.unpack(memoryview(head), memoryview(plain), [100_000, 50_000, 300], False):
        counts = np.unique(part.levels, return_counts=True)[1]
        least = float(-(counts * np.log2(counts / counts.sum())).sum()) / 8
        (length,) = struct.unpack_from("<I", body, start)
        assert least - 4 <= length <= 1.01 * least + 64
        start, bound = start + 4 + length, bound + least
    assert start == len(body) < len(plain)
    assert coded.sizes(small).others["entropy"] == pytest.approx(8 * bound)
    assert packed.sizes(large).others["entropy"] == pytest.approx(8 * bound)


@given(
    st.lists(
        st.integers(0, 16).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), min_size=1))),
        max_size=4,
    ),
    st.booleans(),
)
def test_05_levels_of_any_width_come_back(tensors: list[tuple[int, list[int]]], coded: bool) -> None:
    sent = [Levels(w, 0.5 * w, -1.25, np.array(symbols if w else [], np.uint16)) for w, symbols in tensors]
    sizes = [len(symbols) for _, symbols in tensors]
    head, body = levels.headers(sent), levels.pack(sent, coded)
    assert coded or len(body) == sum(-(-w * n // 8) for (w, _), n in zip(tensors, sizes, strict=True))
    found = levels.unpack(memoryview(head), memoryview(body), sizes, coded)
    for one, other in zip(found, sent, strict=True):
        assert (one.width, one.first, one.second) == (other.width, other.first, other.second)
        assert one.levels.tolist() == other.levels.tolist()


# Bad messages


def header(tensor: int, width: int | None = None, first: float | None = None, second: float | None = None) -> Any:
    def alter(parts: Sections) -> Sections:
        head = bytearray(parts[0])
        old = struct.unpack_from("<Bff", head, 9 * tensor)
        new = [b if a is None else a for a, b in zip((width, first, second), old, strict=True)]
        struct.pack_into("<Bff", head, 9 * tensor, *new)
        return [bytes(head), *parts[1:]]

    return alter


def section(index: int, change: Callable[[bytes], bytes]) -> Any:
    return lambda parts: [change(part) if i == index else part for i, part in enumerate(parts)]


def flipped(at: int, bit: int = 1) -> Callable[[bytes], bytes]:
    return lambda data: data[: at % len(data)] + bytes([data[at] ^ bit]) + data[at % len(data) + 1 :]


BAD: list[tuple[str, FedDQ, Any, str]] = [
    *[(f"width {w}", method, header(0, width=w), f"width {w}") for w in (17, 255) for method in ALL],
    ("numbers that overflow", AFFINE, header(1, second=3e38), "not finite"),
    *[("longer by width", method, header(1, width=13), ".") for method in (AFFINE, SYMMETRIC, NORM)],
    *[("shorter by width", method, header(1, width=1), ".") for method in (AFFINE, SYMMETRIC, NORM)],
    *[("no width", method, header(1, width=0), ".") for method in ALL],
    *[("another alphabet", method, header(1, width=9), "symbols") for method in (CODED, BUCKETS)],
    *[("a width of its own", method, header(3, width=4), ".") for method in (AFFINE, SYMMETRIC, CODED)],
    ("padding", AFFINE, section(1, flipped(-1, 0x80)), "bits"),
    ("padding of a norm", NORM, section(1, flipped(-1, 0x80)), "bits"),
    *[("first coded byte", method, section(1, flipped(4, 7)), "symbols") for method in (CODED, BUCKETS)],
    *[("coded words", method, section(1, flipped(60)), "symbols") for method in (CODED, BUCKETS)],
    *[("coded padding", method, section(1, flipped(-1, 0x80)), "bits") for method in (CODED, BUCKETS)],
    *[("coded length", method, section(1, flipped(0)), ".") for method in (CODED, BUCKETS)],
    *[("coded length huge", method, section(1, flipped(3, 0xFF)), "levels") for method in (CODED, BUCKETS)],
    *[("intervals 0", method, header(1, first=0.0), "intervals") for method in (NORM, BUCKETS)],
    *[("intervals -1", method, header(1, first=-1.0), "intervals") for method in (NORM, BUCKETS)],
    *[("intervals above the width", method, header(1, first=1e5), "intervals") for method in (NORM, BUCKETS)],
    ("intervals that need the sign's bit", NORM, header(1, first=8.0), "intervals"),
    ("intervals that need the sign's bit", BUCKETS, header(1, first=4.0), "intervals"),
    ("intervals that need less", NORM, header(1, first=3.0), "intervals"),
    ("levels above the intervals", BUCKETS, header(1, first=2.0), "levels: 3, expected at most 2"),
    ("intervals and a half", NORM, header(1, first=2.5), "intervals"),
    *[("loss below 0", h, section(3, lambda data: struct.pack("<f", -1.0)), "loss") for h in (SYMMETRIC, BUCKETS)],
]


@pytest.mark.parametrize("name, method, alter, complaint", BAD, ids=[f"{b[0]}-{ALL.index(b[1])}" for b in BAD])
def test_bad_messages_are_refused(name: str, method: FedDQ, alter: Any, complaint: str) -> None:
    """And by nothing but PayloadError."""
    if name == "coded words" and not entropy.RANGE_CODER:
        pytest.skip("constriction has no wheel for this machine")
    parts = sections(upload(method))
    assert read(parts, method)
    with pytest.raises(PayloadError, match=complaint):
        read(alter(parts), method)


# Bad broadcasts


@pytest.mark.parametrize("downlink", [0.0, 0.01])
@pytest.mark.parametrize("intervals", [0.0, -3.0, 1e9, math.nan])
def test_broadcasts_of_impossible_intervals_are_refused(downlink: float, intervals: float) -> None:
    method = of(schedule="ascending", downlink=downlink)
    good = method.broadcast(method.initial(Rng(0)))
    assert method.begin(good, SHARD, Rng(0))
    parts = sections(good)
    parts[-1] = parts[-1][:-4] + struct.pack("<f", intervals)
    with pytest.raises(PayloadError):
        method.begin(seal(parts, method, kind="feddq.down", samples=0), SHARD, Rng(0))


@pytest.mark.parametrize("alter", [header(0, width=17), header(1, width=3), header(0, first=math.nan)])
def test_bad_quantized_broadcasts_are_refused(alter: Any) -> None:
    method = of(downlink=0.001)
    parts = sections(method.broadcast(method.initial(Rng(0))))
    assert method.begin(seal(parts, method, kind="feddq.down"), SHARD, Rng(0))
    with pytest.raises(PayloadError):
        method.begin(seal(alter(parts), method, kind="feddq.down"), SHARD, Rng(0))
