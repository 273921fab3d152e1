"""Entropy coder: bytes that may never change, the Shannon bound, degenerate messages, and hostile ones."""

import hashlib
import math
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlib.errors import PayloadError
from fedlib.methods import fedmrn
from fedlib.wire import contexts, entropy

untimed = settings(deadline=None)
range_coded = pytest.mark.skipif(not entropy.RANGE_CODER, reason="constriction has no wheel for this machine")

LEVELS = np.array([0] * 60 + [1, 2, 1, 3] + [0] * 60, np.int32)


def spread_mask(n: int, density: float) -> np.ndarray:
    """A mask that needs no random generator: multiples of the golden ratio fall evenly into [0, 1)."""
    return np.arange(n, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32) < density * 2**32


@range_coded
def test_known_answers() -> None:
    # Codec 1; counts 120, 2, 1, 1; one word of the range coder.
    assert entropy.encode(LEVELS, 4) == bytes.fromhex("01 78 02 01 01 f9353623")
    message = entropy.encode(spread_mask(100_000, 0.05), 2)
    # Counts 95000 = 0x18 + 0x66 * 128 + 5 * 128**2 and 5000 = 8 + 0x27 * 128; the words that follow as recorded.
    assert message.startswith(bytes.fromhex("01 98e605 8827"))
    assert len(message) == 3590
    assert hashlib.sha256(message).hexdigest() == "bbe217b06a8d8e35c5b24b639f27848a4438ece441438a0dfed9337029d58923"


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


@untimed
@given(st.data())
def test_round_trip(data: Any) -> None:
    alphabet = data.draw(st.one_of(st.integers(1, 20), st.integers(1, 2**31)))
    top = data.draw(st.integers(0, alphabet - 1))
    symbols = np.array(data.draw(st.lists(st.integers(0, top), max_size=100)), np.int64)
    message = entropy.encode(symbols, alphabet)
    assert len(message) <= 1 + -(-symbols.size * math.ceil(math.log2(alphabet)) // 8)
    assert entropy.decode(memoryview(message), symbols.size, alphabet).tolist() == symbols.tolist()


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
        (b"\1" + b"\x80" * 50, "counts of 0 symbols"),
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


@untimed
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(1, 9))
def test_random_bytes(data: bytes, n: int, alphabet: int) -> None:
    for message in (data, b"\0" + data, b"\1" + data):
        try:
            symbols = entropy.decode(message, n, alphabet)
        except PayloadError:
            continue
        assert symbols.shape == (n,)
        assert ((symbols >= 0) & (symbols < alphabet)).all()


@range_coded
@untimed
@given(st.lists(st.integers(0, 100), min_size=2, max_size=9), st.binary(max_size=64))
def test_random_words_after_true_counts(counts: list[int], words: bytes) -> None:
    head = b"\1" + bytes(counts)
    try:
        symbols = entropy.decode(head + words[: len(words) // 4 * 4], sum(counts), len(counts))
    except PayloadError:
        return
    assert np.bincount(symbols, minlength=len(counts)).tolist() == counts


def test_claims_cost_no_memory() -> None:
    claims = [b"\1" + b"\xff" * 9 + b"\x7f", b"\1" + b"\xff" * 1000, b"\1" + bytes(1000), b"\0\xff"]
    tracemalloc.start()
    try:
        for claim in claims:
            for alphabet in (2, 60_000, 2**31):
                with pytest.raises(PayloadError):
                    entropy.decode(claim, 10_000, alphabet)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


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


KNOWN = np.array([7, 5, 300, 7, 7, 5, 5, 300, 7])  # three of context 5, four of 7, two of 300


def falling_mask(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A mask and magnitudes x in [0, 1) with P(1 | x) = min(0.1 / x, 1) / 2, FedMRN's law for |u| = 0.1 and noise on
    [-1, 1); no random generator."""
    x = (np.arange(n, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)).astype(np.float64) * 2.0**-32
    chance = (np.arange(n, dtype=np.uint64) * np.uint64(40503) % np.uint64(2**16)).astype(np.float64) * 2.0**-16
    x = x.astype(np.float32)
    return chance < np.minimum(0.1 / np.maximum(x, np.float32(1e-6)), 1) / 2, x


@range_coded
def test_known_answers_with_contexts() -> None:
    # Codec 2. Of context 0 two ones, of context 1 three of the 1000 are one; then the range coder's words.
    symbols = np.zeros(2000, np.int32)
    symbols[[0, 10, 1001, 1003, 1999]] = 1
    known = np.arange(2000) // 1000
    message = entropy.encode(symbols, 2, known)
    assert message == bytes.fromhex("02 02 03 ed6ffdff7e249a38")
    # The same entries with their contexts interleaved: they are sorted, and within each the order stays.
    assert entropy.encode(symbols.reshape(2, 1000).T.reshape(-1), 2, np.arange(2000) % 2) == message
    # Equal symbols in each context: counts of symbols 1 and 2, and no words. 1000 = 0x68 + 7 * 128.
    for values in (known, known * 256, known + 60_000):
        assert entropy.encode(known + 1, 3, values) == bytes.fromhex("02 e80700 00e807")
    mask, x = falling_mask(100_000)
    message = entropy.encode(mask, 2, contexts.buckets(x, 1.0))
    assert len(message) == 6540
    assert hashlib.sha256(message).hexdigest() == "62b7957bc1491c28d93e79ca702557cc75fae6715b6e8e97be54ce2b68738a38"


@range_coded
def test_contexts_against_a_plain_loop() -> None:
    from constriction import stream

    mask, x = falling_mask(20_000)
    symbols, known = mask.astype(int) + (mask & spread_mask(20_000, 0.4)), contexts.buckets(x, 1.0)
    head, coder = [2], stream.queue.RangeEncoder()
    for context in sorted(set(known.tolist())):
        own = [s for s, c in zip(symbols.tolist(), known.tolist(), strict=True) if c == context]
        for symbol in (1, 2):
            count = own.count(symbol)
            while count > 127:
                head.append(count % 128 + 128)
                count //= 128
            head.append(count)
        if len(set(own)) > 1:
            counts = np.array([own.count(symbol) for symbol in (0, 1, 2)], np.float64)
            coder.encode(np.array(own, np.int32), stream.model.Categorical(counts, perfect=False))
    assert entropy.encode(symbols, 3, known) == bytes(head) + coder.get_compressed().astype("<u4").tobytes()


@range_coded
def test_one_context_is_the_plain_form_without_a_count() -> None:
    mask = spread_mask(5000, 0.1)
    plain, message = entropy.encode(mask, 2), entropy.encode(mask, 2, np.full(5000, 9))
    assert plain[:5] == bytes([1, 0x94, 0x23, 0xF4, 0x03])  # 4500 = 0x14 + 0x23 * 128 and 500 = 0x74 + 3 * 128
    assert message == bytes([2, 0xF4, 0x03]) + plain[5:]


@untimed
@given(st.data())
def test_round_trip_with_contexts(data: Any) -> None:
    alphabet = data.draw(st.one_of(st.integers(1, 9), st.integers(1, 2**31)))
    top = data.draw(st.integers(0, alphabet - 1))
    symbols = np.array(data.draw(st.lists(st.integers(0, top), max_size=200)), np.int64)
    limit = data.draw(st.sampled_from([1, 2, 5, 256, 65536]))
    known = np.array(
        data.draw(st.lists(st.integers(0, limit - 1), min_size=symbols.size, max_size=symbols.size)), np.int64
    )
    message = entropy.encode(symbols, alphabet, known)
    assert len(message) <= len(entropy.encode(symbols, alphabet))
    assert entropy.decode(message, symbols.size, alphabet, known).tolist() == symbols.tolist()


@range_coded
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.int64, np.uint64])
def test_every_dtype_of_contexts(dtype: Any) -> None:
    known = (np.arange(6000) % 2).astype(dtype)
    symbols = spread_mask(6000, 0.02) | (np.arange(6000) % 2 == 0)
    message = entropy.encode(symbols[::3], 2, known[::3])
    assert message[0] == entropy.CONTEXTS
    assert message == entropy.encode(symbols[::3], 2, known[::3].astype(np.int32))
    assert entropy.decode(message, 2000, 2, known[::3]).tolist() == symbols[::3].astype(int).tolist()


@range_coded
@pytest.mark.parametrize("alphabet", [2, 3, 50])
def test_contexts_near_the_conditional_entropy(alphabet: int) -> None:
    random = np.random.default_rng(7)
    known = random.integers(0, 40, 300_000)
    symbols = np.minimum(random.exponential(0.1 + known / 20), alphabet - 1).astype(np.int64)
    message = entropy.encode(symbols, alphabet, known)
    table = [np.bincount(symbols[known == c], minlength=alphabet).tolist() for c in range(40)]
    bound = sum(-k * math.log2(k / sum(row)) for row in table for k in row if k)
    assert len(message) <= bound / 8 + 8 + 3 * 40 * (alphabet - 1)
    assert len(message) < 0.95 * len(entropy.encode(symbols, alphabet))
    assert (entropy.decode(message, symbols.size, alphabet, known) == symbols).all()


@range_coded
def test_contexts_that_tell_nothing_cost_nothing() -> None:
    mask = spread_mask(3000, 0.1)
    assert entropy.encode(mask, 2, np.arange(3000)) == entropy.encode(mask, 2), "a count each would not pay"
    assert entropy.encode(mask, 2, np.arange(3000) % 200) == entropy.encode(mask, 2)
    assert entropy.decode(entropy.encode(mask, 2), 3000, 2, np.arange(3000)).tolist() == mask.astype(int).tolist()
    half = np.arange(256) % 2
    assert entropy.encode(half, 2, np.arange(256) // 64) == bytes([0]) + bytes([0xAA]) * 32
    assert entropy.encode(np.zeros(0, int), 2, np.zeros(0, int)) == bytes([0])
    assert entropy.decode(bytes([2]), 0, 2, np.zeros(0, int)).size == 0


@pytest.mark.parametrize(
    "known", [np.zeros(3, int), np.zeros((4, 1), int), np.zeros(4), np.array([0, 0, 0, -1]), np.array([0, 0, 0, 65536])]
)
def test_contexts_refused(known: np.ndarray) -> None:
    for call in (lambda: entropy.encode(np.zeros(4, int), 2, known), lambda: entropy.decode(b"\0\0", 4, 2, known)):
        with pytest.raises(ValueError, match=r"contexts: .*expected") as error:
            call()
        assert not isinstance(error.value, PayloadError), "the caller's mistake, not the message's"


@range_coded
@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\2", "counts of 0 symbols with sum 0, expected 6 and 9"),
        (b"\2\1\1\0\0\2", "counts of 5 symbols"),
        (b"\2\2\2\0\0\2\0", "counts of 6 symbols with sum 6"),  # 4 in a context of 3
        (b"\2\x0a\1\0\0\2\0", "10 or more of symbol 1, expected 9 in all"),
        (b"\2\1\1\0\0\2\0" + b"abc", "3 bytes of range coder"),
        (b"\2\1\1\0\0\2\0", "altered"),  # no words
        (b"\2\0\0\0\0\2\0" + bytes(4), "altered"),  # words where each context has equal symbols
        (b"\2\1\1\0\0\x82\0\0" + bytes(4), "altered"),  # a count in two bytes where one is enough
        (b"\3\1\1\0\0\2\0" + bytes(4), r"codec 3, expected .* or 2 \(range coder with contexts\)"),
    ],
)
def test_defects_with_contexts_are_named(data: bytes, complaint: str) -> None:
    with pytest.raises(PayloadError, match=complaint):
        entropy.decode(data, 9, 3, KNOWN)


@range_coded
def test_contexts_missing_or_others() -> None:
    mask, x = falling_mask(3000)
    known = contexts.buckets(x, 1.0)
    message = entropy.encode(mask, 2, known)
    with pytest.raises(PayloadError, match=r"codec 2, expected 0 \(fixed width\) or 1 \(range coder\)$"):
        entropy.decode(message, 3000, 2)
    with pytest.raises(PayloadError):
        entropy.decode(message, 3000, 2, np.zeros(3000, int))
    with pytest.raises(PayloadError):
        entropy.decode(message, 3000, 3, known)
    for size in range(len(message)):
        with pytest.raises(PayloadError):
            entropy.decode(message[:size], 3000, 2, known)
    for extra in (b"\0", bytes(4), b"\xff" * 8):
        with pytest.raises(PayloadError):
            entropy.decode(message + extra, 3000, 2, known)


@range_coded
@untimed
@given(st.integers(0, 2**20), st.integers(1, 255))
def test_altered_byte_with_contexts(place: int, change: int) -> None:
    mask, x = falling_mask(3000)
    known = contexts.buckets(x, 1.0)
    altered = bytearray(entropy.encode(mask, 2, known))
    assert altered[0] == entropy.CONTEXTS
    altered[place % len(altered)] ^= change
    try:
        symbols = entropy.decode(altered, 3000, 2, known)
    except PayloadError:
        return
    assert (symbols != mask).any()
    assert entropy.encode(symbols, 2, known) == altered


@untimed
@given(st.binary(max_size=60), st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_random_bytes_with_contexts(data: bytes, known: list[int], alphabet: int) -> None:
    for message in (data, b"\0" + data, b"\1" + data, b"\2" + data):
        try:
            symbols = entropy.decode(message, len(known), alphabet, np.array(known, np.int64))
        except PayloadError:
            continue
        assert symbols.shape == (len(known),)
        assert ((symbols >= 0) & (symbols < alphabet)).all()


def test_claims_with_contexts_cost_no_memory() -> None:
    known = np.arange(10_000) % 200
    tracemalloc.start()
    try:
        for claim in (b"\2" + b"\xff" * 9 + b"\x7f", b"\2" + b"\xff" * 1000, b"\2" + bytes(1000), b"\2\xff"):
            for alphabet in (60, 60_000, 2**31):
                with pytest.raises(PayloadError):
                    entropy.decode(claim, 10_000, alphabet, known)
        entropy.encode(np.zeros(10_000, int), 60_000, known)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_buckets_worked_by_hand() -> None:
    # top = 8: the last from 6 on, then 4, 3, 2; the first holds all below.
    x = np.array([0, 1, 2, 2.99, 3, 3.99, 4, 5.99, 6, 8, 1e9, np.inf], np.float32)
    found = contexts.buckets(x, 8.0, 5)
    assert found.dtype == np.uint8
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert contexts.buckets(x, 8.0, 1).tolist() == [0] * 12
    assert contexts.buckets(np.zeros(0, np.float32), 8.0).tolist() == []


@untimed
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1), st.floats(1e-6, 1e6), st.integers(1, 256))
def test_buckets_against_logarithms(magnitudes: list[float], top: float, count: int) -> None:
    x = np.array(magnitudes, np.float32)
    found = contexts.buckets(x, top, count)
    for value, bucket in zip((x / np.float32(top)).tolist(), found.tolist(), strict=True):
        if value == 0 or value < 2.0**-126:
            assert bucket == 0 or count > 250
            continue
        power = math.floor(math.log2(value))
        power += (value >= 2.0 ** (power + 1)) - (value < 2.0**power)  # where the logarithm was rounded
        expected = 2 * (power + 1) + (value >= 1.5 * 2.0**power) + count - 2
        assert bucket == min(max(expected, 0), count - 1)


@pytest.mark.parametrize(
    ("x", "top", "count"),
    [
        (np.zeros(3), 1.0, 20),
        (np.zeros(3, np.float32), 0.0, 20),
        (np.zeros(3, np.float32), float("nan"), 20),
        (np.zeros(3, np.float32), 1.0, 0),
        (np.zeros(3, np.float32), 1.0, 257),
        (np.array([-1], np.float32), 1.0, 20),
        (np.array([1, np.nan], np.float32), 1.0, 20),
    ],
)
def test_buckets_refuse(x: np.ndarray, top: float, count: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        contexts.buckets(x, top, count)


@range_coded
@pytest.mark.parametrize("rho", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("law", ["uniform", "gauss", "bernoulli"])
def test_masks_of_fedmrn_within_one_percent_of_their_conditional_entropy(law: str, rho: float) -> None:
    """Noise of magnitude 1 and |u| = rho: P(1 | |n|) = min(rho / |n|, 1) / 2. The ideal code knows |n| itself."""
    d = 389_920
    n = fedmrn.LAWS[law](7, 0, d)
    x = np.maximum(np.abs(n), np.float32(1e-8)).astype(np.float64)
    p = np.minimum(rho / x, 1) / 2
    mask = np.random.default_rng(7).random(d) < p
    ideal = -np.log2(np.where(mask, p, 1 - p)).sum() / 8
    known = contexts.buckets(np.abs(n), 4.0)
    message = entropy.encode(mask, 2, known)
    assert len(message) <= 1.01 * ideal + 2
    assert (entropy.decode(message, d, 2, known) == mask).all()
    if law == "uniform":  # the closed form of the specification, section 13
        assert mask.mean() == pytest.approx((rho + rho * math.log(1 / rho)) / 2, abs=4 * (0.25 / d) ** 0.5)
