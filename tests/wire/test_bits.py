"""Bits and integers of a few bits: bytes worked by hand, the layout by large integers, and padding that is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlib.errors import PayloadError
from fedlib.wire import bits


def test_bits_known_bytes() -> None:
    mask = np.array([1, 0, 1, 1, 0, 0, 0, 0, 1, 1], bool)  # 1 + 4 + 8 = 0x0d, then 1 + 2 = 0x03
    assert bits.pack(mask) == bytes([0x0D, 0x03])
    assert bits.pack(mask.astype(np.uint8)) == bytes([0x0D, 0x03])
    assert bits.unpack(bytes([0x0D, 0x03]), 10).tolist() == mask.tolist()


def bits_one_by_one(symbols: list[int], width: int) -> bytes:
    """The layout as the module's head describes it, through one large integer."""
    low = width if width <= 8 else 8
    parts = [(low, [s & (1 << low) - 1 for s in symbols])] + [(width - 8, [s >> 8 for s in symbols])] * (width > 8)
    return b"".join(
        sum(s << i * w for i, s in enumerate(run)).to_bytes((len(run) * w + 7) // 8, "little") for w, run in parts
    )


@given(st.integers(1, 16).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), max_size=60))))
def test_integers_of_any_width_travel_as_the_layout_says(case: tuple[int, list[int]]) -> None:
    width, symbols = case
    data = bits.pack(np.array(symbols, np.int64), width)
    assert data == bits_one_by_one(symbols, width)
    assert len(data) == bits.size(len(symbols), width) == -(-len(symbols) * width // 8)
    unpacked = bits.unpack(memoryview(data), len(symbols), width)
    assert unpacked.tolist() == symbols
    if width == 1:
        assert unpacked.dtype == bool and bits.pack(unpacked) == data


@pytest.mark.parametrize(
    ("data", "n", "width"),
    [
        *[(b"", 1, 1), (b"\1\1", 8, 1), (b"\1", 9, 1), (b"\0", 0, 1), (b"\x10", 4, 1), (b"\xff\x80", 15, 1)],
        *[(b"ab", 3, 4), (b"\x21\x13", 3, 4), (b"a", 1, 9), (b"abc\0\x10", 3, 12), (b"abc", 3, 2)],
    ],
)
def test_other_lengths_and_padding_are_refused(data: bytes, n: int, width: int) -> None:
    with pytest.raises(PayloadError, match="bits: "):
        bits.unpack(data, n, width)


@pytest.mark.parametrize("width", [0, 17, -1])
def test_widths_that_do_not_exist(width: int) -> None:
    for call in (lambda: bits.pack(np.zeros(3, np.uint8), width), lambda: bits.unpack(b"", 0, width)):
        with pytest.raises(ValueError, match="expected 1 to 16"):
            call()
