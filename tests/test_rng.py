"""Random draws: the published Philox vectors, an independent Philox, fixed bytes, and the laws to follow."""

import hashlib
import itertools
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
import torch

from fedlib import rng
from fedlib.rng import Rng

MASK = 2**64 - 1


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """One block of Philox4x64-10 in plain integers (Salmon et al., SC 2011, section 3.3)."""
    x = [counter >> 64 * i & MASK for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], 2**64)
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & MASK, k1 + 0xBB67AE8584CAA73B & MASK
    return x


def plain_words(seed: int, stream: int, count: int) -> list[int]:
    """What `words` promises: blocks 1, 2, ... under the key (seed, stream), each 64-bit number low half first."""
    numbers = [number for block in range(1, count // 8 + 2) for number in philox(block, (seed, stream))]
    return [half for number in numbers for half in (number & 0xFFFFFFFF, number >> 32)][:count]


def digest(array: np.ndarray) -> str:
    little = array.astype(array.dtype.newbyteorder("<"))
    return hashlib.sha256(little.tobytes()).hexdigest()[:16]


# Random123's file kat_vectors, lines "philox4x64 10": counter (lowest word first), key, result.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, (0, 0), "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        (2**256 - 1, (MASK, MASK), "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    ],
)
def test_numpy_and_our_oracle_give_the_published_vectors(counter: int, key: tuple[int, int], expected: str) -> None:
    result = [int(word, 16) for word in expected.split()]
    assert philox(counter, key) == result
    before = (counter - 1) % 2**256  # numpy counts up before it draws
    state = np.array([before >> 64 * i & MASK for i in range(4)], dtype=np.uint64)
    generator = np.random.Philox(counter=state, key=np.array(key, dtype=np.uint64))
    assert generator.random_raw(4).tolist() == result


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 30])
def test_words_equal_the_plain_integers(count: int) -> None:
    for seed, stream in ((0, 0), (MASK, 3), (0x0123456789ABCDEF, 2**40)):
        assert rng.words(seed, stream, count).tolist() == plain_words(seed, stream, count)


def test_uniform_signs_and_normal_are_made_of_the_words() -> None:
    words = plain_words(99, 5, 64)
    assert rng.uniform(99, 5, 64).tolist() == [(word // 256) / 2**23 - 1 for word in words]
    bits = [word >> place & 1 for word in words for place in range(32)]
    assert rng.signs(99, 5, 2000).tolist() == [2 * bit - 1 for bit in bits[:2000]]
    expected = [NormalDist().inv_cdf((word + 0.5) / 2**32) for word in words]
    np.testing.assert_allclose(rng.normal(99, 5, 64), expected, rtol=3e-7, atol=0)


def test_draws_in_training_are_made_of_the_words() -> None:
    place = Rng(7).child("x")
    stream = place.stream()
    assert (stream.uniform(3, 5) * 2**24).flatten().tolist() == [w // 256 for w in plain_words(place.seed(), 0, 15)]
    halves = plain_words(place.seed(), 1, 40)
    numbers = [low + (high << 32) for low, high in zip(halves[::2], halves[1::2], strict=True)]
    assert stream.permutation(20).tolist() == sorted(range(20), key=lambda i: numbers[i])
    assert (stream.uniform(1) * 2**24).tolist() == [plain_words(place.seed(), 2, 1)[0] // 256]
    assert Rng(7).child("x").stream().permutation(5).tolist() != Rng(7).child("y").stream().permutation(5).tolist()


def test_draws_in_training_follow_their_laws() -> None:
    drawn = Rng(1).child("law").stream().uniform(200_000)
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
    assert abs(float(drawn.mean()) - 0.5) < 5 * (1 / 12 / len(drawn)) ** 0.5
    orders = Counter(tuple(Rng(seed).stream().permutation(3).tolist()) for seed in range(6000))
    assert len(orders) == 6 and all(abs(count - 1000) < 5 * (6000 * 5 / 36) ** 0.5 for count in orders.values())


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        ("words", "b1f8b869e7ca73d7"),
        ("uniform", "302f9febbd0f4407"),
        ("signs", "e9b26a5baa68b6d4"),
        ("normal", "6e39eef09948364f"),
    ],
)
def test_known_answers(draw: str, expected: str) -> None:
    """These bytes travel as a seed: a change here is a change of the wire format."""
    assert digest(getattr(rng, draw)(20240806, 7, 100_003)) == expected


def test_normal_is_the_inverse_of_the_normal_law() -> None:
    p = (rng.words(1, 0, 100_000).astype(np.float64) + 0.5) / 2**32
    inverse = np.array([NormalDist().inv_cdf(value) for value in p.tolist()])
    assert p.min() < 1e-4 and p.max() > 1 - 1e-4, "both tails are reached"
    np.testing.assert_allclose(rng.normal(1, 0, 100_000), inverse, rtol=4e-7, atol=1e-9)


def test_laws() -> None:
    """Mean and variance within 5 standard errors, ranges, and no echo between neighbouring streams and seeds."""
    n = 400_000
    for draw, variance, fourth in ((rng.uniform, 1 / 3, 1 / 5), (rng.signs, 1.0, 1.0), (rng.normal, 1.0, 3.0)):
        x = draw(5, 0, n).astype(np.float64)
        assert draw(5, 0, 3).dtype == np.float32
        assert abs(x.mean()) < 5 * (variance / n) ** 0.5
        assert abs((x**2).mean() - variance) <= 5 * ((fourth - variance**2) / n) ** 0.5
        for other in (draw(5, 1, n), draw(6, 0, n), np.roll(x, 1)):
            assert abs((x * other).mean()) < 5 * variance / n**0.5
    assert set(rng.signs(5, 0, n).tolist()) == {-1.0, 1.0}
    x = rng.uniform(5, 0, n)
    assert x.min() >= -1 and x.max() < 1 and x.min() < -0.9999 and x.max() > 0.9999
    counts = np.histogram(x, 20, (-1, 1))[0]
    assert abs(counts - n / 20).max() < 5 * (n / 20) ** 0.5


def test_seed_is_a_fixed_function_of_the_names() -> None:
    text = b"(7, 'client', 3, 12)"
    assert Rng(7).child("client", 3, 12).seed() == int.from_bytes(
        hashlib.blake2b(text, digest_size=8).digest(), "little"
    )
    assert Rng(7).child("client", 3).child(12) == Rng(7).child("client", 3, 12)


def test_places_are_all_different() -> None:
    places = [
        Rng(base).child(name, a, b) for base in (0, 1) for name in ("x", "y") for a in range(20) for b in range(20)
    ]
    places += [Rng(0), Rng(0).child("x", 1), Rng(0).child("x", "1", 2), Rng(0).child("x", 12)]
    assert len({place.seed() for place in places}) == len(places)


def test_draws_do_not_depend_on_the_order_of_asking() -> None:
    places = [Rng(1).child("client", client) for client in range(4)]
    forward = [torch.rand(3, generator=place.torch()) for place in places]
    torch.manual_seed(0)  # a global generator would change what follows
    np.random.seed(0)  # noqa: NPY002
    backward = [torch.rand(3, generator=place.torch()) for place in reversed(places)]
    assert torch.equal(torch.stack(forward), torch.stack(backward[::-1]))
    assert not torch.equal(forward[0], forward[1])


def test_sample_draws_every_subset_equally_often() -> None:
    counts = Counter(tuple(sorted(rng.sample(Rng(seed), 5, 2))) for seed in range(5000))
    assert counts.keys() == set(itertools.combinations(range(5), 2)), "distinct numbers below 5"
    assert all(abs(count - 500) < 5 * 450**0.5 for count in counts.values())


def test_sample_at_its_limits() -> None:
    assert sorted(rng.sample(Rng(0), 7, 7)) == list(range(7))
    assert rng.sample(Rng(0), 1, 1) == [0]
    few = rng.sample(Rng(0), 10**12, 50)
    assert len(set(few)) == 50 and all(0 <= draw < 10**12 for draw in few) and max(few) > 10**11
