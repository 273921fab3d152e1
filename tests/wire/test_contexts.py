"""The entropy coder with contexts: bytes that may never change, a plain loop, the conditional entropy, hostile
messages; and the contexts themselves."""

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
from common import range_coded
from hypothesis import given
from hypothesis import strategies as st
from spread import falling_mask, spread_mask

from fedlib.errors import PayloadError
from fedlib.methods import fedmrn
from fedlib.wire import contexts, entropy

KNOWN = np.array([7, 5, 300, 7, 7, 5, 5, 300, 7])  # three of context 5, four of 7, two of 300


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
    assert len(message) == 6536
    assert hashlib.sha256(message).hexdigest() == "f6caa559b0066b2c48229bda30666c7a147909eb55da96c06d7c85f6315a8dd6"


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
            whole = len(own) - len(own) % 5 if len(own) >= 2048 else 0  # five neighbours have 243 combinations
            if whole:
                shares = [math.prod(counts[list(digits)]) for digits in itertools.product(range(3), repeat=5)]
                numbers = [sum(3**place * own[at + place] for place in range(5)) for at in range(0, whole, 5)]
                # A share is a product of five counts, in whichever order they stand.
                coder.encode(np.array(numbers, np.int32), stream.model.Categorical(np.array(shares), perfect=False))
            if whole < len(own):
                coder.encode(np.array(own[whole:], np.int32), stream.model.Categorical(counts, perfect=False))
    assert entropy.encode(symbols, 3, known) == bytes(head) + coder.get_compressed().astype("<u4").tobytes()


@range_coded
def test_one_context_is_the_plain_form_without_a_count() -> None:
    mask = spread_mask(5000, 0.1)
    plain, message = entropy.encode(mask, 2), entropy.encode(mask, 2, np.full(5000, 9))
    assert plain[:5] == bytes([1, 0x94, 0x23, 0xF4, 0x03])  # 4500 = 0x14 + 0x23 * 128 and 500 = 0x74 + 3 * 128
    assert message == bytes([2, 0xF4, 0x03]) + plain[5:]


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


def test_buckets_worked_by_hand() -> None:
    # top = 8: the last from 6 on, then 4, 3, 2; the first holds all below.
    x = np.array([0, 1, 2, 2.99, 3, 3.99, 4, 5.99, 6, 8, 1e9, np.inf], np.float32)
    found = contexts.buckets(x, 8.0, 5)
    assert found.dtype == np.uint8
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert contexts.buckets(x, 8.0, 1).tolist() == [0] * 12
    assert contexts.buckets(np.zeros(0, np.float32), 8.0).tolist() == []


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
