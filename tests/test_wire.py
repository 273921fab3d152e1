"""Container, bits and floats: bytes worked by hand, round trips, and every defect refused by PayloadError alone."""

import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedlib.errors import PayloadError
from fedlib.wire import bits, container, floats

untimed = settings(deadline=None)

FINGERPRINT = bytes.fromhex("0102030405060708")
LIMITS = (4, 0)
# "FLW", version 1, kind of 6 bytes "t.u" + 3 zeros; fingerprint; 258 samples; 2 sections of 3 and 0 bytes; "abc"; CRC.
KNOWN = bytes.fromhex("464c57 01 06 742e75000000 0102030405060708 02010000 02 03000000 00000000 616263 a1073c24")


def crc32_by_bits(data: bytes) -> int:
    """CRC-32 of ISO 3309, straight from its polynomial."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0xEDB88320 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def sealed(body: bytes) -> bytes:
    """A message whose checksum is right, whatever its body says: what an adversary can write."""
    return body + zlib.crc32(body).to_bytes(4, "little")


def unpack(data: Any) -> container.Message:
    return container.unpack(data, "t.u", FINGERPRINT, LIMITS)


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_container_known_bytes() -> None:
    assert container.pack("t.u", FINGERPRINT, 258, [b"abc", b""]) == KNOWN
    assert crc32_by_bits(KNOWN[:-4]) == int.from_bytes(KNOWN[-4:], "little")
    message = unpack(KNOWN)
    assert (message.kind, message.samples) == ("t.u", 258)
    assert [bytes(section) for section in message.sections] == [b"abc", b""]
    assert container.section_sizes(KNOWN) == (3, 0)


@untimed
@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20),
    st.binary(min_size=8, max_size=8),
    st.integers(0, 2**32 - 1),
    st.lists(st.binary(max_size=50), min_size=1, max_size=4),
)
def test_container_round_trip(kind: str, fingerprint: bytes, samples: int, sections: list[bytes]) -> None:
    data = container.pack(kind, fingerprint, samples, sections)
    sizes = tuple(map(len, sections))
    for buffer in (data, bytearray(data), memoryview(data)):
        message = container.unpack(buffer, kind, fingerprint, sizes)
        assert (message.kind, message.samples) == (kind, samples)
        assert [bytes(section) for section in message.sections] == sections
        assert all(section.readonly for section in message.sections)
    assert container.section_sizes(data) == sizes
    overhead = len(data) - sum(sizes)
    assert overhead <= container.OVERHEAD_LIMIT
    assert overhead % 4 == 0  # of which 4 stand at the end: the first section starts on a multiple of four


def test_container_takes_every_buffer_without_copying_it_twice() -> None:
    big = np.arange(2**20, dtype=np.uint8)
    sections: list[Any] = [big, big.data, bytearray(b"xy"), np.zeros(0, np.uint8)]
    peak = peak_bytes(lambda: container.pack("t.u", FINGERPRINT, 0, sections))
    assert peak < 2 * big.size + 10_000
    data = container.pack("t.u", FINGERPRINT, 0, sections)
    assert peak_bytes(lambda: container.unpack(data, "t.u", FINGERPRINT, [big.size, big.size, 2, 0])) < 10_000
    message = container.unpack(data, "t.u", FINGERPRINT, [big.size, big.size, 2, 0])
    assert bytes(message.sections[1]) == big.tobytes()


@pytest.mark.parametrize("size", range(len(KNOWN)))
def test_container_truncated(size: int) -> None:
    with pytest.raises(PayloadError):
        unpack(KNOWN[:size])
    with pytest.raises(PayloadError):
        container.section_sizes(KNOWN[:size])


def test_container_any_flipped_bit() -> None:
    for bit in range(8 * len(KNOWN)):
        altered = bytearray(KNOWN)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            unpack(altered)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"PK" + KNOWN, "not a fedlib message: starts with b'PKF', expected b'FLW'"),
        (sealed(KNOWN[:3] + b"\2" + KNOWN[4:-4]), "format version 2, this program reads version 1"),
        (KNOWN[:-1], "truncated: 38 bytes, at least 39 expected"),
        (KNOWN[:10], "truncated"),
        (KNOWN + b"\0", "message of 40 bytes, its header states 39: trailing bytes"),
        (KNOWN[:-5] + b"d" + KNOWN[-4:], "altered: checksum"),
        (container.pack("t.v", FINGERPRINT, 0, [b"", b""]), "kind 't.v', expected 't.u'"),
        (sealed(KNOWN[:5] + b"\xff" + KNOWN[6:-4]), r"kind '\\\\xff\.u', expected 't.u'"),
        (sealed(KNOWN[:8] + b"\1" + KNOWN[9:-4]), "kind"),  # padding that is not zero
        (
            container.pack("t.u", b"x" * 8, 0, [b"", b""]),
            "another model or other settings: fingerprint 7878787878787878, expected 0102030405060708",
        ),
        (container.pack("t.u", FINGERPRINT, 0, [b"", b"", b""]), "3 sections, expected 2"),
        (container.pack("t.u", FINGERPRINT, 0, [b"12345", b""]), "section 0: 5 bytes, the model allows at most 4"),
        (container.pack("t.u", FINGERPRINT, 0, [b"", b"1"]), "section 1: 1 bytes, the model allows at most 0"),
        (memoryview(KNOWN)[::2], "not one run of bytes"),
        (memoryview(KNOWN + b"\0").cast("I"), "not one run of bytes"),
    ],
)
def test_container_defects_are_named(data: Any, complaint: str) -> None:
    with pytest.raises(PayloadError, match=complaint):
        unpack(data)


@untimed
@given(st.binary(max_size=80), st.integers(0, 255))
def test_container_random_bytes(tail: bytes, kind_length: int) -> None:
    for data in (tail, KNOWN[:3] + tail, sealed(KNOWN[:4] + bytes([kind_length]) + tail), sealed(KNOWN[:23] + tail)):
        with pytest.raises(PayloadError):
            unpack(data)


def test_container_claims_cost_nothing() -> None:
    claims = sealed(KNOWN[:23] + b"\xff" + b"\xff" * 4 * 255)

    def refused() -> None:
        with pytest.raises(PayloadError, match="truncated"):
            unpack(claims)

    assert peak_bytes(refused) < 100_000


@pytest.mark.parametrize(
    "wrong",
    [
        ("k" * 21, FINGERPRINT, 0, [b""]),
        ("", FINGERPRINT, 0, [b""]),
        ("ü", FINGERPRINT, 0, [b""]),
        ("t.u\0", FINGERPRINT, 0, [b""]),
        ("t.u", b"short", 0, [b""]),
        ("t.u", FINGERPRINT, -1, [b""]),
        ("t.u", FINGERPRINT, 2**32, [b""]),
        ("t.u", FINGERPRINT, 0, []),
        ("t.u", FINGERPRINT, 0, [b""] * 5),
    ],
)
def test_container_refuses_to_pack(wrong: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        container.pack(*wrong)


def test_bits_known_bytes() -> None:
    mask = np.array([1, 0, 1, 1, 0, 0, 0, 0, 1, 1], bool)  # 1 + 4 + 8 = 0x0d, then 1 + 2 = 0x03
    assert bits.pack(mask) == bytes([0x0D, 0x03])
    assert bits.pack(mask.astype(np.uint8)) == bytes([0x0D, 0x03])
    assert bits.unpack(bytes([0x0D, 0x03]), 10).tolist() == mask.tolist()


@untimed
@given(hnp.arrays(bool, st.integers(0, 70)))
def test_bits_round_trip(mask: np.ndarray) -> None:
    data = bits.pack(mask)
    assert len(data) == -(-mask.size // 8)
    unpacked = bits.unpack(memoryview(data), mask.size)
    assert unpacked.dtype == bool
    assert unpacked.tolist() == mask.tolist()


@pytest.mark.parametrize(
    ("data", "n"), [(b"", 1), (b"\1\1", 8), (b"\1", 9), (b"\0", 0), (b"\x10", 4), (b"\xff\x80", 15)]
)
def test_bits_defects(data: Any, n: int) -> None:
    with pytest.raises(PayloadError, match="bits: "):
        bits.unpack(data, n)


def bits_one_by_one(symbols: list[int], width: int) -> bytes:
    """The layout as the module's head describes it, through one large integer."""
    low = width if width <= 8 else 8
    parts = [(low, [s & (1 << low) - 1 for s in symbols])] + [(width - 8, [s >> 8 for s in symbols])] * (width > 8)
    return b"".join(
        sum(s << i * w for i, s in enumerate(run)).to_bytes((len(run) * w + 7) // 8, "little") for w, run in parts
    )


@untimed
@given(st.integers(1, 16).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), max_size=60))))
def test_integers_of_any_width_travel_as_the_layout_says(case: tuple[int, list[int]]) -> None:
    width, symbols = case
    data = bits.pack(np.array(symbols, np.int64), width)
    assert data == bits_one_by_one(symbols, width)
    assert len(data) == bits.size(len(symbols), width) == -(-len(symbols) * width // 8)
    assert bits.unpack(memoryview(data), len(symbols), width).tolist() == symbols


@pytest.mark.parametrize("width", range(1, 17))
def test_integers_over_several_blocks(width: int) -> None:
    n = 2 * bits._BLOCK + 13
    symbols = np.random.default_rng(width).integers(0, 2**width, n, np.uint16)
    data = bits.pack(symbols, width)
    for start in (0, bits._BLOCK, 2 * bits._BLOCK):  # block boundaries, in the run of the lower bits
        w = min(width, 8)
        part = bits_one_by_one([s & (1 << w) - 1 for s in symbols[start : start + 13].tolist()], w)
        begin = start * w // 8
        assert data[begin : begin + len(part) - 1] == part[:-1]
    np.testing.assert_array_equal(bits.unpack(data, n, width), symbols)


@pytest.mark.parametrize(
    "data, n, width", [(b"ab", 3, 4), (b"\x21\x13", 3, 4), (b"a", 1, 9), (b"abc\0\x10", 3, 12), (b"abc", 3, 2)]
)
def test_integers_that_fit_no_width_are_refused(data: bytes, n: int, width: int) -> None:
    with pytest.raises(PayloadError, match="bits: "):
        bits.unpack(data, n, width)


@pytest.mark.parametrize("width", [0, 17, -1])
def test_widths_that_do_not_exist(width: int) -> None:
    for call in (lambda: bits.pack(np.zeros(3, np.uint8), width), lambda: bits.unpack(b"", 0, width)):
        with pytest.raises(ValueError, match="expected 1 to 16"):
            call()


def test_floats_known_bytes() -> None:
    # IEEE 754: 1 = 3f800000, -2 = c0000000, 0.5 = 3f000000, smallest subnormal = 00000001.
    arrays = [np.array([[1.0], [-2.0]], np.float32), np.array(0.5, np.float32), np.array([2.0**-149], np.float32)]
    data = bytes.fromhex("0000803f 000000c0 0000003f 01000000")
    assert floats.encode(arrays).dtype == np.uint8
    assert floats.encode(arrays).tobytes() == data
    decoded = floats.decode(data, [(2, 1), (), (1,)])
    assert [array.tolist() for array in decoded] == [array.tolist() for array in arrays]


@untimed
@given(
    st.lists(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
        ),
        max_size=4,
    )
)
def test_floats_round_trip(arrays: list[np.ndarray]) -> None:
    data = floats.encode([array.T for array in arrays])  # a transposed array is not contiguous
    decoded = floats.decode(data.tobytes(), [array.T.shape for array in arrays])
    for array, back in zip(arrays, decoded, strict=True):
        assert back.dtype == np.float32
        assert back.shape == array.T.shape
        assert back.tobytes() == array.T.tobytes()


def test_floats_are_read_in_place_and_cannot_be_changed() -> None:
    values = np.arange(6, dtype=np.float32)
    data = bytearray(container.pack("fedavg.up", FINGERPRINT, 1, [floats.encode([values])]))
    section = container.unpack(data, "fedavg.up", FINGERPRINT, [24]).sections[0]
    (array,) = floats.decode(section, [(2, 3)])
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))
    assert not array.flags.writeable
    assert not floats.decode(bytearray(values.tobytes()), [(6,)])[0].flags.writeable
    (unaligned,) = floats.decode(memoryview(bytes(1) + values.tobytes())[1:], [(6,)])
    assert unaligned.flags.aligned
    assert unaligned.tolist() == values.tolist()


@pytest.mark.parametrize(("bad", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_floats_not_finite(bad: float, text: str) -> None:
    arrays = [np.zeros(2, np.float32), np.array([0, bad, 0], np.float32)]
    data = b"".join(array.tobytes() for array in arrays)
    for call in (
        lambda names: floats.encode(arrays, names),
        lambda names: floats.decode(data, [(2,), (3,)], names),
    ):
        with pytest.raises(PayloadError, match=f"^tensor 1: value 1 is {text},"):
            call(None)
        with pytest.raises(PayloadError, match=f"^conv.bias: value 1 is {text},"):
            call(["conv.weight", "conv.bias"])


def test_floats_wrong_length_or_dtype() -> None:
    for size in (0, 11, 13, 16):
        with pytest.raises(PayloadError, match=f"{size} bytes, expected 12 for 2 tensors"):
            floats.decode(bytes(size), [(2,), (1,)])
    with pytest.raises(TypeError, match="w: float64, expected float32"):
        floats.encode([np.zeros(2)], ["w"])
