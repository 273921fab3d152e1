"""Codebooks and indexes as bytes: exact both ways, close to their entropy, and no defect read as numbers."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlib.errors import PayloadError
from fedlib.models.registry import build
from fedlib.rng import Rng
from fedlib.wire import codebook, entropy

GENERATOR = np.random.default_rng(5)


def tensor(values: int, n: int) -> np.ndarray:
    """n entries that take just so many values."""
    book = np.sort(GENERATOR.standard_normal(values).astype(np.float32))
    index = np.concatenate([np.arange(values), GENERATOR.integers(0, values, n - values)])
    return book[GENERATOR.permutation(index)]


def both_ways(tensors: list[np.ndarray]) -> list[np.ndarray]:
    books, indexes = codebook.encode(tensors)
    return codebook.decode(memoryview(books), memoryview(indexes), [t.size for t in tensors])


@pytest.mark.parametrize("values", [1, 2, 3, 7, 8, 16, 30, 255, 256])
def test_what_is_read_is_what_was_written(values: int) -> None:
    tensors = [tensor(values, 900), tensor(1, 1), tensor(values, values)]
    for written, found in zip(tensors, both_ways(tensors), strict=True):
        assert found.dtype == np.float32 and found.tobytes() == written.tobytes()


@given(st.lists(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=60), min_size=1, max_size=4))
def test_any_few_values(lists: list[list[float]]) -> None:
    tensors = [np.array(values, np.float32) + np.float32(0) for values in lists]
    assert [t.tobytes() for t in both_ways(tensors)] == [t.tobytes() for t in tensors]


def test_by_hand() -> None:
    """Three values: 1 + 12 bytes of codebook; two and a half: the fixed coder's 2 bits an index, after its codec."""
    books, indexes = codebook.encode([np.array([[0.5, -1.0], [2.0, 0.5]], np.float32)])
    assert books == b"\x02" + struct.pack("<fff", -1.0, 0.5, 2.0)
    assert indexes == struct.pack("<I", 2) + bytes((entropy.FIXED, 0b01_10_00_01))


def test_a_negative_zero_is_zero() -> None:
    (found,) = both_ways([np.array([-0.0, 0.0, 1.0], np.float32)])
    assert found.tobytes() == np.array([0.0, 0.0, 1.0], np.float32).tobytes()


@pytest.mark.parametrize("values", [2, 8, 16, 30])
def test_indexes_take_their_entropy(values: int) -> None:
    """Within one percent and 64 bytes; and a codebook of fixed width takes no less."""
    chances = GENERATOR.dirichlet(np.full(values, 2.0))
    index = GENERATOR.choice(values, 40_000, p=chances)
    _, indexes = codebook.encode([np.arange(values, dtype=np.float32)[index]])
    bound = entropy.entropy_bits(np.bincount(index)) / 8
    assert bound <= len(indexes) <= 1.01 * bound + 64
    assert codebook.fixed_bits([values], [40_000]) / 8 + 64 >= len(indexes) + 4 * values


@pytest.mark.parametrize(
    ("values", "n", "expected"),
    [(8, 10, 4 * 8 + 4), (9, 10, 4 * 9 + 5), (1, 10, 4), (2, 9, 8 + 2), (30, 36_864, 120 + 23_040)],
)
def test_fixed_width_by_hand(values: int, n: int, expected: int) -> None:
    assert codebook.fixed_bits([values], [n]) == 8 * expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [(8, 114_602), (12, 148_368), (16, 148_672), (20, 182_438), (24, 182_742), (30, 183_198)],
)
def test_fixed_width_of_resnet20(values: int, expected: int) -> None:
    """Specification, table 9.2: nineteen kernels in codebooks, 3,402 other values as float32."""
    network = build("resnet20", 3, 32, 10, Rng(0))
    kernels = [p.numel() for p in network.parameters() if p.ndim == 4]
    floats = sum(b.numel() for b in network.buffers() if b.is_floating_point())
    others = sum(p.numel() for p in network.parameters()) + floats - sum(kernels)
    assert codebook.fixed_bits([values] * 19, kernels) / 8 + 4 * others == expected


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.array([0.0, np.nan], np.float32), "conv: values are not finite"),
        (np.array([0.0, np.inf], np.float32), "conv: values are not finite"),
        (np.arange(257, dtype=np.float32), "conv: 257 distinct values, expected 1 to 256"),
        (np.empty(0, np.float32), "conv: 0 distinct values, expected 1 to 256"),
    ],
)
def test_what_cannot_be_written(values: np.ndarray, match: str) -> None:
    with pytest.raises(PayloadError, match=match):
        codebook.encode([values], ["conv"])


def test_an_index_out_of_range() -> None:
    """Three values need two bits, in which a fourth could be named."""
    books = b"\x02" + struct.pack("<fff", -1.0, 0.5, 2.0)
    indexes = struct.pack("<I", 2) + bytes((entropy.FIXED, 0b01_10_00_11))
    with pytest.raises(PayloadError, match="found 3, expected at most 2"):
        codebook.decode(memoryview(books), memoryview(indexes), [4])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda books, indexes: (books[:-1], indexes), "codebooks: 12 bytes, expected 13 or more up to tensor 0"),
        (lambda books, indexes: (b"", indexes), "codebooks: 0 bytes"),
        (lambda books, indexes: (books + b"\0", indexes), "codebooks: 14 bytes, expected 13 for 1 tensors"),
        (lambda books, indexes: (books[:1] + books[5:9] + books[1:5] + books[9:], indexes), "ascending order"),
        (lambda books, indexes: (books[:1] + b"\0\0\xc0\x7f" + books[5:], indexes), "codebook 0.* finite"),
        (lambda books, indexes: (books, indexes[:3]), "indexes: 3 bytes, expected 4 or more up to tensor 0"),
        (lambda books, indexes: (books, indexes[:-1]), "indexes: 5 bytes, expected 6 or more up to tensor 0"),
        (lambda books, indexes: (books, indexes + b"\0"), "indexes: 7 bytes, expected 6 by the lengths"),
    ],
)
def test_defects(damage, match: str) -> None:  # type: ignore[no-untyped-def]
    books, indexes = codebook.encode([np.array([0.5, -1.0, 2.0, 0.5], np.float32)])
    books, indexes = damage(books, indexes)
    with pytest.raises(PayloadError, match=match):
        codebook.decode(memoryview(books), memoryview(indexes), [4])


def test_limits_hold() -> None:
    tensors = [tensor(256, 4000), tensor(2, 5)]
    sections = codebook.encode(tensors)
    assert all(len(s) <= most for s, most in zip(sections, codebook.limits([4000, 5]), strict=True))
