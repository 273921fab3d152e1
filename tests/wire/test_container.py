"""The container: bytes worked by hand, round trips, and every defect refused by PayloadError alone."""

from typing import Any

import numpy as np
import pytest
import xxhash
from common import peak_bytes
from hypothesis import given
from hypothesis import strategies as st

from fedlib.errors import PayloadError
from fedlib.wire import container

FINGERPRINT = bytes.fromhex("0102030405060708")
LIMITS = (4, 0)
# "FLW", version 2, kind of 6 bytes "t.u" + 3 zeros; fingerprint; 258 samples, round and client 0; 2 sections of 3 and 0
# bytes; "abc"; checksum.
HEAD = "464c57 02 06 742e75000000 0102030405060708 02010000 "
KNOWN = bytes.fromhex(HEAD + "00000000 00000000 02 03000000 00000000 616263 815267d5")
ADDRESSED = bytes.fromhex(HEAD + "03000000 05000000 02 03000000 00000000 616263 b9723a78")  # round 3, client 5


def sealed(body: bytes) -> bytes:
    """A message whose checksum is right, whatever its body says: what an adversary can write."""
    return body + (xxhash.xxh3_64_intdigest(body) % 2**32).to_bytes(4, "little")


def unpack(data: Any) -> container.Message:
    return container.unpack(data, "t.u", FINGERPRINT, LIMITS)


def test_container_known_bytes() -> None:
    assert container.pack("t.u", FINGERPRINT, 258, [b"abc", b""]) == KNOWN
    assert container.address(KNOWN, 3, 5) == ADDRESSED and container.address(ADDRESSED, 0, 0) == KNOWN
    assert xxhash.xxh3_64_hexdigest(b"") == "2d06800538d394c2"  # as published with XXH3
    assert sealed(KNOWN[:-4]) == KNOWN
    message = unpack(KNOWN)
    assert message.samples == 258
    assert [bytes(section) for section in message.sections] == [b"abc", b""]
    assert container.section_sizes(KNOWN) == (3, 0)


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=18),
    st.binary(min_size=8, max_size=8),
    st.integers(0, 2**32 - 1),
    st.lists(st.binary(max_size=50), min_size=1, max_size=4),
)
def test_container_round_trip(kind: str, fingerprint: bytes, samples: int, sections: list[bytes]) -> None:
    data = container.pack(kind, fingerprint, samples, sections)
    sizes = tuple(map(len, sections))
    for buffer in (data, bytearray(data), memoryview(data)):
        message = container.unpack(buffer, kind, fingerprint, sizes)
        assert message.samples == samples
        assert [bytes(section) for section in message.sections] == sections
        assert all(section.readonly for section in message.sections)
    container.check_address(data, 0, 0)
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


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_message_of_another_round_or_client_is_refused(round: int, client: int, other: int, another: int) -> None:
    data = container.address(KNOWN, round, client)
    container.check_address(data, round, client)
    assert [bytes(section) for section in unpack(data).sections] == [b"abc", b""]
    if (other, another) != (round, client):
        with pytest.raises(PayloadError, match=f"of round {round} and client {client}, expected round {other} and"):
            container.check_address(data, other, another)


@pytest.mark.parametrize("size", range(len(KNOWN)))
def test_container_truncated(size: int) -> None:
    with pytest.raises(PayloadError):
        unpack(KNOWN[:size])
    with pytest.raises(PayloadError):
        container.section_sizes(KNOWN[:size])
    with pytest.raises(PayloadError):
        container.check_address(KNOWN[:size], 0, 0)


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
        (sealed(KNOWN[:3] + b"\1" + KNOWN[4:-4]), "format version 1, this program reads version 2"),
        (KNOWN[:-1], "truncated: 46 bytes, at least 47 expected"),
        (KNOWN[:10], "truncated"),
        (KNOWN + b"\0", "message of 48 bytes, its header states 47: trailing bytes"),
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


@given(st.binary(max_size=80), st.integers(0, 255))
def test_container_random_bytes(tail: bytes, kind_length: int) -> None:
    for data in (tail, KNOWN[:3] + tail, sealed(KNOWN[:4] + bytes([kind_length]) + tail), sealed(KNOWN[:31] + tail)):
        with pytest.raises(PayloadError):
            unpack(data)


def test_container_claims_cost_nothing() -> None:
    claims = sealed(KNOWN[:31] + b"\xff" + b"\xff" * 4 * 255)

    def refused() -> None:
        with pytest.raises(PayloadError, match="truncated"):
            unpack(claims)

    assert peak_bytes(refused) < 100_000


@pytest.mark.parametrize(
    "wrong",
    [
        ("k" * 19, FINGERPRINT, 0, [b""]),
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
