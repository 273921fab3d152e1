"""FedDQ's messages: exact sizes (property 6 of its specification's section 7.3; 3.5), and every defect refused.

Integers of any width are tested in test_wire.py, the entropy coder in test_wire_entropy.py.
"""

import functools
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlib.core.plan import Plan, State
from fedlib.core.task import Task
from fedlib.core.uploads import NoUpdate, Uploads
from fedlib.data.partition import Partition
from fedlib.errors import PayloadError
from fedlib.methods.feddq import method as feddq
from fedlib.methods.feddq.method import Hyper
from fedlib.rng import Rng
from fedlib.wire import container, entropy, levels
from fedlib.wire.levels import Levels

pytestmark = pytest.mark.usefixtures("one_thread")
untimed = settings(deadline=None)
Sections = list[bytes]
AFFINE = Hyper()
CODED = Hyper(coding="entropy")
SYMMETRIC = Hyper(quantizer="symmetric_nearest", schedule="loss", first=9)
NORM = Hyper(quantizer="norm", schedule="fixed", width=3, most=15)
BUCKETS = Hyper(quantizer="buckets", schedule="ascending", first=3, most=15, coding="entropy")
ALL = [AFFINE, CODED, SYMMETRIC, NORM, BUCKETS]
needs_coder = pytest.mark.skipif(not entropy.RANGE_CODER, reason="constriction has no wheel for this machine")


@functools.cache
def task_of(*sizes: int) -> Task:
    """Matrices of the given sizes and nothing else; no data."""
    network = nn.ModuleList(nn.Linear(size, 1, bias=False) for size in sizes)
    none = (torch.zeros(0), torch.zeros(0))
    shapes = {name: p.shape for name, p in network.named_parameters()}
    plan, partition = Plan(epochs=1, batch=4, lr=0.1), Partition.of([np.arange(0)])
    return Task(network, shapes, {}, {}, plan, none, none, partition, torch.device("cpu"))


SMALL = task_of(5, 700, 33, 1)
SIZES = [5, 700, 33, 1]


def update(task: Task, seed: int = 0, scale: float = 0.01) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale * (i + 1) for i, shape in enumerate(task.weights.values())]


def upload(hyper: Hyper, task: Task = SMALL, x: list[Tensor] | None = None, samples: int = 7) -> bytes:
    """What a client sends whose training has moved its tensors by x."""
    message = feddq.broadcast(feddq.initial(hyper, task, Rng(0)), hyper, task)
    trainable, frozen = feddq.start(message, hyper, task, Rng(0))
    for name, change in zip(trainable, x or update(task), strict=True):
        frozen[f"from {name}"].zero_()
        trainable[name].detach().copy_(change)
    return feddq.finish(trainable, frozen | {"loss": torch.tensor(2.5)}, samples, hyper, task, Rng(3))


def sections(message: bytes) -> Sections:
    sizes = container.section_sizes(message)
    start, found = len(message) - 4 - sum(sizes), []
    for size in sizes:
        found.append(message[start : start + size])
        start += size
    return found


def sealed(parts: Sections, hyper: Hyper, task: Task = SMALL, kind: str = "feddq.up", samples: int = 7) -> bytes:
    """A message whose envelope is right, whatever its sections say."""
    return container.pack(kind, task.fingerprint("feddq", hyper), samples, parts)


def read(parts: Sections, hyper: Hyper, task: Task = SMALL) -> State:
    return feddq.read_update(sealed(parts, hyper, task), hyper, task)[0]


# Sizes


@pytest.mark.parametrize("hyper", [AFFINE, SYMMETRIC, Hyper(schedule="fixed", width=11), Hyper(resolution=1e-5)])
def test_06_payload_of_entries_at_their_width(hyper: Hyper) -> None:
    """sum d b bits, nine bytes of header a tensor, each tensor's levels from a byte of its own, an envelope."""
    message = upload(hyper)
    head, body, scales, loss = sections(message)
    widths = [head[9 * i] for i in range(4)]
    ranges = [float(x.max()) - float(x.min()) for x in update(SMALL)]
    if hyper.schedule == "range":
        assert widths == [math.ceil(math.log2(r / hyper.resolution)) if r else 0 for r in ranges]
    else:
        assert widths == [4 if hyper.schedule == "loss" else 11] * 3 + [0], "s = 9 intervals take ceil(log2(10)) bits"
    assert len(head) == 9 * 4 and scales == b"" and len(loss) == 4 * (hyper.schedule == "loss")
    assert len(body) == sum(math.ceil(d * b / 8) for d, b in zip(SIZES, widths, strict=True))
    assert feddq.paper_bits(message, hyper, SMALL) == sum(d * b for d, b in zip(SIZES, widths, strict=True))
    told = feddq.read_update(message, hyper, SMALL)[0]
    assert told["widths"].tolist() == widths and told["ranges"].tolist() == pytest.approx(ranges, rel=1e-6)
    assert 0 < len(message) - len(head) - len(body) - len(loss) <= 64


def test_06_golden_message() -> None:
    """3.6: x of six entries is four bits an entry, 24 bits of payload, 12 bytes on the wire and the envelope."""
    task, x = task_of(6), [torch.tensor([[-0.0200, -0.0071, 0.0, 0.0032, 0.0110, 0.0300]])]
    hyper = Hyper(quantizer="affine_nearest")
    message = upload(hyper, task, x)
    head, body, *rest = sections(message)
    assert struct.unpack("<Bff", head) == (4, float(np.float32(-0.02)), pytest.approx(1 / 300))
    assert body == bytes([0x40, 0x76, 0xF9]), "0, 4, 6, 7, 9, 15: the first is the lower half of the first byte"
    assert rest == [b"", b""] and feddq.paper_bits(message, hyper, task) == 24
    assert len(message) <= 12 + 64


@pytest.mark.parametrize("s", [1, 2, 3, 4, 7, 8, 255])
@pytest.mark.parametrize("quantizer", ["norm", "buckets"])
def test_06_norm_quantizers_take_a_scale_and_a_sign(quantizer: str, s: int) -> None:
    """32 + d + d ceil(log2(s + 1)) bits a tensor; of buckets 32 for each 512 entries."""
    hyper = Hyper(quantizer=quantizer, schedule="ascending", first=s, most=15)
    message = upload(hyper)
    counts = [1, 2, 1, 1] if quantizer == "buckets" else [1] * 4
    expected = sum(32 * c + d + d * math.ceil(math.log2(s + 1)) for c, d in zip(counts, SIZES, strict=True))
    assert feddq.paper_bits(message, hyper, SMALL) == expected
    assert len(sections(message)[2]) == 4 * sum(counts)


@needs_coder
@pytest.mark.parametrize("hyper", [AFFINE, SYMMETRIC, NORM, BUCKETS])
def test_entropy_coding_changes_the_size_alone(hyper: Hyper) -> None:
    packed, coded = (Hyper(**{**vars(hyper), "coding": coding}) for coding in ("packed", "entropy"))
    task = task_of(100_000, 50_000, 300)
    small, large = upload(coded, task), upload(packed, task)
    one, other = (feddq.read_update(message, h, task)[0] for message, h in ((small, coded), (large, packed)))
    assert one.keys() == other.keys()
    assert all(one[name].numpy().tobytes() == other[name].numpy().tobytes() for name in one)
    assert feddq.paper_bits(small, coded, task) == feddq.paper_bits(large, packed, task)
    body, (head, plain, *_) = sections(small)[1], sections(large)
    start, bound = 0, 0.0
    for part in levels.unpack(memoryview(head), memoryview(plain), [100_000, 50_000, 300], False):
        counts = np.unique(part.levels, return_counts=True)[1]
        least = float(-(counts * np.log2(counts / counts.sum())).sum()) / 8
        (length,) = struct.unpack_from("<I", body, start)
        assert least - 4 <= length <= 1.01 * least + 64
        start, bound = start + 4 + length, bound + least
    assert start == len(body) < len(plain)
    assert feddq.other_bits(small, coded, task)["entropy"] == pytest.approx(8 * bound)
    assert feddq.other_bits(large, packed, task)["entropy"] == pytest.approx(8 * bound)


@untimed
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


def swapped(parts: Sections) -> Sections:
    return [parts[1], parts[0], *parts[2:]]


def flipped(at: int, bit: int = 1) -> Callable[[bytes], bytes]:
    return lambda data: data[: at % len(data)] + bytes([data[at] ^ bit]) + data[at % len(data) + 1 :]


NAN, INF = struct.pack("<f", math.nan), struct.pack("<f", -math.inf)
BAD: list[tuple[str, Hyper, Any, str]] = [
    *[(f"width {w}", hyper, header(0, width=w), f"width {w}") for w in (17, 255) for hyper in ALL],
    *[(f"first {x}", hyper, header(2, first=x), "header 2") for x in (math.nan, math.inf) for hyper in ALL],
    *[(f"second {x}", AFFINE, header(1, second=x), "header 1") for x in (math.nan, -math.inf)],
    ("numbers that overflow", AFFINE, header(1, second=3e38), "not finite"),
    *[("longer by width", hyper, header(1, width=13), ".") for hyper in (AFFINE, SYMMETRIC, NORM)],
    *[("shorter by width", hyper, header(1, width=1), ".") for hyper in (AFFINE, SYMMETRIC, NORM)],
    *[("no width", hyper, header(1, width=0), ".") for hyper in ALL],
    *[("another alphabet", hyper, header(1, width=9), "symbols") for hyper in (CODED, BUCKETS)],
    *[("a width of its own", hyper, header(3, width=4), ".") for hyper in (AFFINE, SYMMETRIC, CODED)],
    *[("headers cut", hyper, section(0, lambda data: data[:-1]), "headers: 35 bytes, expected 36") for hyper in ALL],
    *[("headers none", hyper, section(0, lambda data: b""), "headers: 0 bytes") for hyper in ALL],
    *[("headers long", hyper, section(0, lambda data: data + b"\0"), "section 0") for hyper in ALL],
    *[("levels cut", hyper, section(1, lambda data: data[:-1]), ".") for hyper in ALL],
    *[("levels none", hyper, section(1, lambda data: b""), "levels: 0 bytes") for hyper in ALL],
    *[("levels long", hyper, section(1, lambda data: data + b"\0"), "levels: ") for hyper in ALL],
    *[("swapped", hyper, swapped, ".") for hyper in ALL],
    ("padding", AFFINE, section(1, flipped(-1, 0x80)), "bits"),
    ("padding of a norm", NORM, section(1, flipped(-1, 0x80)), "bits"),
    *[("first coded byte", hyper, section(1, flipped(4, 7)), "symbols") for hyper in (CODED, BUCKETS)],
    *[("coded words", hyper, section(1, flipped(60)), "symbols") for hyper in (CODED, BUCKETS)],
    *[("coded padding", hyper, section(1, flipped(-1, 0x80)), "bits") for hyper in (CODED, BUCKETS)],
    *[("coded length", hyper, section(1, flipped(0)), ".") for hyper in (CODED, BUCKETS)],
    *[("coded length huge", hyper, section(1, flipped(3, 0xFF)), "levels") for hyper in (CODED, BUCKETS)],
    *[("scales cut", hyper, section(2, lambda data: data[:-4]), "scales") for hyper in (NORM, BUCKETS)],
    *[("scales cut in a number", hyper, section(2, lambda data: data[:-1]), "scales") for hyper in (NORM, BUCKETS)],
    *[("scales long", hyper, section(2, lambda data: data + bytes(4)), "section 2") for hyper in (NORM, BUCKETS)],
    *[("scales unasked", hyper, section(2, lambda data: bytes(4)), "section 2") for hyper in (AFFINE, SYMMETRIC)],
    *[("scales nan", hyper, section(2, lambda data: data[:-4] + NAN), "scales") for hyper in (NORM, BUCKETS)],
    *[("scales inf", hyper, section(2, lambda data: INF + data[4:]), "scales") for hyper in (NORM, BUCKETS)],
    *[("intervals 0", hyper, header(1, first=0.0), "intervals") for hyper in (NORM, BUCKETS)],
    *[("intervals -1", hyper, header(1, first=-1.0), "intervals") for hyper in (NORM, BUCKETS)],
    *[("intervals above the width", hyper, header(1, first=1e5), "intervals") for hyper in (NORM, BUCKETS)],
    ("intervals that need the sign's bit", NORM, header(1, first=8.0), "intervals"),
    ("intervals that need the sign's bit", BUCKETS, header(1, first=4.0), "intervals"),
    ("intervals that need less", NORM, header(1, first=3.0), "intervals"),
    ("levels above the intervals", BUCKETS, header(1, first=2.0), "levels: 3, expected at most 2"),
    ("intervals and a half", NORM, header(1, first=2.5), "intervals"),
    *[("loss nan", hyper, section(3, lambda data: NAN), "loss") for hyper in (SYMMETRIC, BUCKETS)],
    *[("loss cut", hyper, section(3, lambda data: data[:-1]), "floats") for hyper in (SYMMETRIC, BUCKETS)],
    *[("loss below 0", h, section(3, lambda data: struct.pack("<f", -1.0)), "loss") for h in (SYMMETRIC, BUCKETS)],
    ("loss unasked", AFFINE, section(3, lambda data: bytes(4)), "section 3"),
    ("a section less", AFFINE, lambda parts: parts[:3], "3 sections, expected 4"),
]


@pytest.mark.parametrize("name, hyper, alter, complaint", BAD, ids=[f"{b[0]}-{ALL.index(b[1])}" for b in BAD])
def test_bad_messages_are_refused(name: str, hyper: Hyper, alter: Any, complaint: str) -> None:
    """And by nothing but PayloadError."""
    if name == "coded words" and not entropy.RANGE_CODER:
        pytest.skip("constriction has no wheel for this machine")
    parts = sections(upload(hyper))
    assert read(parts, hyper)
    with pytest.raises(PayloadError, match=complaint):
        read(alter(parts), hyper)


def test_a_flipped_bit_or_foreign_settings_are_refused() -> None:
    message = upload(AFFINE)
    for at in range(0, len(message), 37):
        with pytest.raises(PayloadError):
            feddq.read_update(bytearray(flipped(at)(message)), AFFINE, SMALL)
    for hyper, task in ((CODED, SMALL), (AFFINE, task_of(5, 700, 34, 1))):
        with pytest.raises(PayloadError, match="another model or other settings"):
            feddq.read_update(message, hyper, task)


edits = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(ALL), edits, st.integers(-3, 3), st.integers(0, 3))
def test_altered_messages_are_read_or_refused(
    hyper: Hyper, changes: list[tuple[int, int, int]], longer: int, where: int
) -> None:
    """Checksum mended: a message gives finite numbers, with which the server and the record go on, or PayloadError."""
    parts = [bytearray(part) for part in sections(upload(hyper))]
    for index, at, value in changes:
        if parts[index]:
            parts[index][at % len(parts[index])] = value
    parts[where] = parts[where] + bytes(longer) if longer > 0 else parts[where][: len(parts[where]) + longer]
    message = sealed([bytes(part) for part in parts], hyper)
    state, sizes = feddq.initial(hyper, SMALL, Rng(0)), []

    def measure(found: Any) -> None:
        sizes.append((feddq.paper_bits(found, hyper, SMALL), feddq.other_bits(found, hyper, SMALL)))

    try:
        new = feddq.server(state, Uploads([(0, message)], measure), hyper, SMALL)
    except NoUpdate:
        return
    assert len(sizes) == 1 and all(bool(torch.isfinite(tensor).all()) for tensor in new.values())
    assert new["intervals"] >= 1
    feddq.notes(new, hyper, SMALL)


# Bad broadcasts


@pytest.mark.parametrize("downlink", [0.0, 0.01])
@pytest.mark.parametrize("intervals", [0.0, -3.0, 1e9, math.nan])
def test_broadcasts_of_impossible_intervals_are_refused(downlink: float, intervals: float) -> None:
    hyper = Hyper(schedule="ascending", downlink=downlink)
    good = feddq.broadcast(feddq.initial(hyper, SMALL, Rng(0)), hyper, SMALL)
    assert feddq.start(good, hyper, SMALL, Rng(0))
    parts = sections(good)
    parts[-1] = parts[-1][:-4] + struct.pack("<f", intervals)
    with pytest.raises(PayloadError):
        feddq.start(sealed(parts, hyper, kind="feddq.down", samples=0), hyper, SMALL, Rng(0))


@pytest.mark.parametrize(
    "alter",
    [swapped, header(0, width=17), header(1, width=3), header(0, first=math.nan)]
    + [section(i, lambda data: data[:-1]) for i in range(3)],
)
def test_bad_quantized_broadcasts_are_refused(alter: Any) -> None:
    hyper = Hyper(downlink=0.001)
    parts = sections(feddq.broadcast(feddq.initial(hyper, SMALL, Rng(0)), hyper, SMALL))
    assert feddq.received(sealed(parts, hyper, kind="feddq.down"), hyper, SMALL)
    with pytest.raises(PayloadError):
        feddq.received(sealed(alter(parts), hyper, kind="feddq.down"), hyper, SMALL)
