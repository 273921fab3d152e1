"""Entropy coder: bytes that may never change, the Shannon bound, degenerate messages, and hostile ones."""

import hashlib
import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from common import peak_bytes, range_coded
from hypothesis import given
from hypothesis import strategies as st
from spread import spread_mask

from fedlib.errors import PayloadError
from fedlib.wire import entropy

LEVELS = np.array([0] * 60 + [1, 2, 1, 3] + [0] * 60, np.int32)


@range_coded
def test_known_answers() -> None:
    # Codec 1; counts 120, 2, 1, 1; one word of the range coder.
    assert entropy.encode(LEVELS, 4) == bytes.fromhex("01 78 02 01 01 f9353623")
    message = entropy.encode(spread_mask(100_000, 0.05), 2)
    # Counts 95000 = 0x18 + 0x66 * 128 + 5 * 128**2 and 5000 = 8 + 0x27 * 128; the words that follow as recorded.
    assert message.startswith(bytes.fromhex("01 98e605 8827"))
    assert len(message) == 3590
    assert hashlib.sha256(message).hexdigest() == "a17bdac8cda95757f60a5392499b9b78074157f47fafa5b665461c93ecdb0ff9"


@range_coded
@pytest.mark.parametrize(("alphabet", "together"), [(2, 8), (3, 5), (4, 4), (6, 3), (16, 2), (17, 1)])
def test_neighbours_are_taken_together(alphabet: int, together: int) -> None:
    """Against a plain loop: a combination's number has its first symbol as the lowest digit, its share is a product."""
    from constriction import stream

    for n in (2047, 2048, 2048 + together - 1):
        symbols = np.random.default_rng(n).binomial(alphabet - 1, 0.3, n).tolist()
        counts = [symbols.count(symbol) for symbol in range(alphabet)]
        coder = stream.queue.RangeEncoder()
        whole = n - n % together if together > 1 and n >= 2048 else 0
        if whole:
            combinations = [tuple(reversed(digits)) for digits in itertools.product(range(alphabet), repeat=together)]
            shares = [float(math.prod(counts[digit] for digit in digits)) for digits in combinations]
            numbers = [combinations.index(tuple(symbols[at : at + together])) for at in range(0, whole, together)]
            coder.encode(np.array(numbers, np.int32), stream.model.Categorical(np.array(shares), perfect=False))
        if whole < n:
            plain = stream.model.Categorical(np.array(counts, np.float64), perfect=False)
            coder.encode(np.array(symbols[whole:], np.int32), plain)
        message = entropy.encode(np.array(symbols), alphabet)
        assert message[0] == 1 and message.endswith(coder.get_compressed().astype("<u4").tobytes())
        assert entropy.decode(message, n, alphabet).tolist() == symbols


def test_fixed_width_known_bytes() -> None:
    # Three bits each, lowest first: 1 = 100, 4 = 001, 2 = 010, together 10000101 0, thus 1 + 32 + 128 = 0xa1, then 0.
    assert entropy.encode(np.array([1, 4, 2]), 5) == bytes([0, 0xA1, 0])
    assert entropy.encode(np.array([True, False, True]), 2) == bytes([0, 5])
    assert entropy.decode(bytes([0, 0xA1, 0]), 3, 5).tolist() == [1, 4, 2]
    # 0x2a5 in 10 bits: 1010010101 from the lowest, thus 0xa5 and 2.
    assert entropy.encode(np.array([0x2A5]), 1024) == bytes([0, 0xA5, 2])


@range_coded
@pytest.mark.parametrize("density", [0.0, 1e-5, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.97, 1.0])
def test_mask_within_one_percent_of_its_entropy(density: float) -> None:
    mask = np.random.default_rng(7).random(200_000) < density
    message = entropy.encode(mask, 2)
    ones = int(mask.sum())
    bound = sum(-k * math.log2(k / mask.size) for k in (ones, mask.size - ones) if k)
    assert len(message) <= 1.01 * bound / 8 + 32
    assert entropy.entropy_bits(np.array([mask.size - ones, ones])) == pytest.approx(bound)
    assert (entropy.decode(message, mask.size, 2) == mask).all()


@range_coded
@pytest.mark.parametrize("alphabet", [3, 16, 200, 65536])
def test_levels_near_their_entropy(alphabet: int) -> None:
    bell = np.random.default_rng(7).normal(alphabet / 2, alphabet / 12, 300_000)
    symbols = np.clip(bell, 0, alphabet - 1).astype(np.int64)
    message = entropy.encode(symbols, alphabet)
    counts = np.bincount(symbols, minlength=alphabet)
    assert len(message) <= 1.01 * entropy.entropy_bits(counts) / 8 + 32 + 3 * alphabet
    decoded = entropy.decode(message, symbols.size, alphabet)
    assert decoded.dtype == np.int32
    assert (decoded == symbols).all()


@given(st.data())
def test_round_trip(data: Any) -> None:
    """With contexts too, which never make a message longer."""
    alphabet = data.draw(st.one_of(st.integers(1, 20), st.integers(1, 2**31)))
    top = data.draw(st.integers(0, alphabet - 1))
    symbols = np.array(data.draw(st.lists(st.integers(0, top), max_size=200)), np.int64)
    limit = data.draw(st.sampled_from([1, 2, 5, 256, 65536]))
    known = st.lists(st.integers(0, limit - 1), min_size=symbols.size, max_size=symbols.size)
    message, fixed = entropy.encode(symbols, alphabet), 1 + -(-symbols.size * math.ceil(math.log2(alphabet)) // 8)
    for contexts in (None, np.array(data.draw(known), np.int64)):
        sent = entropy.encode(symbols, alphabet, contexts)
        assert len(sent) <= len(message) <= fixed
        assert entropy.decode(memoryview(sent), symbols.size, alphabet, contexts).tolist() == symbols.tolist()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int64, np.uint64])
def test_every_integer_dtype_and_stride(dtype: Any) -> None:
    symbols = spread_mask(4000, 0.02).astype(dtype)
    assert entropy.encode(symbols, 2) == entropy.encode(symbols.astype(np.int32), 2)
    assert entropy.decode(entropy.encode(symbols[::2], 2), 2000, 2).tolist() == symbols[::2].astype(int).tolist()


@range_coded
def test_degenerate_messages() -> None:
    assert entropy.encode(np.zeros(0, np.int32), 7) == bytes([0])
    assert entropy.encode(np.zeros(1000, np.int32), 1) == bytes([0])
    assert entropy.decode(bytes([0]), 1000, 1).tolist() == [0] * 1000
    constant = entropy.encode(np.full(1000, 2), 4)
    assert constant == bytes([1, 0, 0, 0xE8, 0x07, 0])  # 1000 = 7 * 128 + 104; no words
    assert entropy.decode(constant, 1000, 4).tolist() == [2] * 1000


@range_coded
def test_rarer_than_the_model_can_say() -> None:
    symbols = np.zeros(2**24 + 2, np.int8)
    symbols[12345] = 1  # probability below 2**-24
    message = entropy.encode(symbols, 2)
    assert len(message) < 32
    assert np.flatnonzero(entropy.decode(message, symbols.size, 2)).tolist() == [12345]


@range_coded
def test_never_longer_than_fixed_width() -> None:
    for ones in range(129):  # near one half the range coder's counts and its whole words cost more than they save
        assert len(entropy.encode(np.arange(256) < ones, 2)) <= 33


def test_large_alphabet_is_fixed_width() -> None:
    symbols = np.zeros(100_000, np.int32)
    assert entropy.encode(symbols, 2**16 + 1) == bytes(1 + 17 * 100_000 // 8)
    with pytest.raises(PayloadError, match=r"alphabet of 65537|install the package"):
        entropy.decode(b"\1\1" + bytes(2**16), 1, 2**16 + 1)
    with pytest.raises(PayloadError, match="found 7, expected at most 4"):
        entropy.decode(b"\0\7", 1, 5)


@pytest.mark.parametrize(
    ("symbols", "alphabet"),
    [
        (np.array([0, 2]), 2),
        (np.array([-1, 0]), 2),
        (np.array([0.0]), 2),
        (np.zeros((2, 2), int), 2),
        (np.zeros(0, int), 0),
        (np.zeros(3, int), 2**31 + 1),
    ],
)
def test_encode_refuses(symbols: np.ndarray, alphabet: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        entropy.encode(symbols, alphabet)


@range_coded
@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "no bytes"),
        (b"\2\0", "codec 2, expected 0"),
        (b"\0" + bytes(30), "30 bytes, expected 31 for 248 entries"),
        (b"\1" + bytes([120, 2, 1]), "counts of 3 symbols"),
        (b"\1" + bytes([120, 2, 0, 1]) + bytes(4), "sum 123, expected 4 and 124"),
        (b"\1" + bytes([119, 2, 1, 1]) + bytes(4), "sum 123"),
        (b"\1\xff\xff\xff\xff\xff\x7f", "or more of symbol 0, expected 124 in all"),
        (b"\1" + b"\x80" * 4, "counts of 0 symbols"),
        (b"\1" + b"\x80" * 5000 + b"\1", "5002 bytes of range coder, expected at most 95"),
        (bytes.fromhex("01") + bytes([120, 2, 1, 1]) + b"abc", "3 bytes of range coder"),
        (b"\1\0\xfc\0\0\0" + bytes(4), "altered"),  # 0xfc, 0: 124 in two bytes where one is enough
        (b"\1\0\x7c\0\0" + bytes(4), "altered"),  # all symbols equal, and still a word
        (b"\1\x78\x02\x01\x01", "altered"),  # counts without words
    ],
)
def test_defects_are_named(data: Any, complaint: str) -> None:
    with pytest.raises(PayloadError, match=complaint):
        entropy.decode(data, LEVELS.size, 4)


@range_coded
def test_words_missing_or_left_over() -> None:
    mask = spread_mask(5000, 0.1)
    message = entropy.encode(mask, 2)
    assert message[0] == entropy.RANGE
    for size in range(len(message)):
        with pytest.raises(PayloadError):
            entropy.decode(message[:size], mask.size, 2)
    for extra in (bytes(4), bytes(8), b"\xff" * 4, b"\0"):
        with pytest.raises(PayloadError):
            entropy.decode(message + extra, mask.size, 2)
    with pytest.raises(PayloadError):
        entropy.decode(message, mask.size + 1, 2)
    with pytest.raises(PayloadError):
        entropy.decode(message, mask.size, 3)


@range_coded
def test_any_flipped_bit_is_refused_or_another_message() -> None:
    message = entropy.encode(LEVELS, 4)
    refused = 0
    for bit in range(8 * len(message)):
        altered = bytearray(message)
        altered[bit // 8] ^= 1 << bit % 8
        try:
            symbols = entropy.decode(altered, LEVELS.size, 4)
        except PayloadError:
            refused += 1
        else:
            assert (symbols != LEVELS).any()
            assert np.bincount(symbols, minlength=4).tolist() == list(altered[1:5])
    assert refused > 40  # all five bytes of codec and counts, and most of the rest


@given(st.binary(max_size=60), st.lists(st.integers(0, 3), max_size=200), st.integers(1, 9))
def test_random_bytes(data: bytes, known: list[int], alphabet: int) -> None:
    heads, n = (b"", b"\0", b"\1", b"\2"), len(known)
    for head, contexts in itertools.product(heads, (None, np.array(known, np.int64))):
        try:
            symbols = entropy.decode(head + data, n, alphabet, contexts)
        except PayloadError:
            continue
        assert symbols.shape == (n,)
        assert ((symbols >= 0) & (symbols < alphabet)).all()


@range_coded
@given(st.lists(st.integers(0, 100), min_size=2, max_size=9), st.binary(max_size=64))
def test_random_words_after_true_counts(counts: list[int], words: bytes) -> None:
    head = b"\1" + bytes(counts)
    try:
        symbols = entropy.decode(head + words[: len(words) // 4 * 4], sum(counts), len(counts))
    except PayloadError:
        return
    assert np.bincount(symbols, minlength=len(counts)).tolist() == counts


@pytest.mark.parametrize(
    ("head", "contexts", "alphabets", "most"),
    [
        (b"\1", None, (2, 60_000, 2**31), 200_000),
        (b"\2", np.arange(10_000) % 200, (60, 60_000, 2**31), 1_000_000),
    ],
)
def test_claims_cost_no_memory(head: bytes, contexts: np.ndarray | None, alphabets: tuple[int, ...], most: int) -> None:
    claims = [head + claim for claim in (b"\xff" * 9 + b"\x7f", b"\xff" * 1000, bytes(1000))] + [b"\0\xff", b"\2\xff"]

    def refused() -> None:
        for claim, alphabet in itertools.product(claims, alphabets):
            with pytest.raises(PayloadError):
                entropy.decode(claim, 10_000, alphabet, contexts)
        if contexts is not None:
            entropy.encode(np.zeros(10_000, int), 60_000, contexts)

    assert peak_bytes(refused) < most


def test_entropy_bits() -> None:
    assert entropy.entropy_bits(np.array([4, 4, 0])) == 8
    assert entropy.entropy_bits(np.array([2, 1, 1])) == 6
    assert entropy.entropy_bits(np.array([9, 0])) == 0
    assert entropy.entropy_bits(np.array([0, 0])) == 0


WITHOUT_CONSTRICTION = """
import sys
sys.modules["constriction"] = None
import numpy as np
from fedlib.errors import PayloadError
from fedlib.wire import entropy
assert not entropy.RANGE_CODER
mask = np.arange(1000) == 3
message = entropy.encode(mask, 2)
assert len(message) == 126 and message[0] == entropy.FIXED
assert (entropy.decode(message, 1000, 2) == mask).all()
try:
    entropy.decode(bytes([1, 0, 4]), 4, 2)
except PayloadError as error:
    print(error)
"""


def test_without_constriction() -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_CONSTRICTION]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "install the package constriction" in run.stdout


@range_coded
def test_reads_fixed_width_of_a_machine_without_the_range_coder() -> None:
    mask = np.arange(1000) == 3
    message = bytes([0]) + np.packbits(mask, bitorder="little").tobytes()
    assert len(entropy.encode(mask, 2)) < len(message)
    assert (entropy.decode(message, 1000, 2) == mask).all()
