"""Dealing samples out: the exact sizes of the authors' seed, every sample once, and clear refusals."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedlib.data import partition
from fedlib.errors import SpecError
from fedlib.runs.spec import Spec


def balanced(classes: int, each: int) -> np.ndarray:
    return np.repeat(np.arange(classes), each)


def deal(labels: np.ndarray, clients: int, **parameters: Any) -> list[np.ndarray]:
    made = partition.make(labels, clients, **parameters)
    assert made.clients == clients
    return [made.indices(k) for k in range(clients)]


FASHION = balanced(10, 6000)
KINDS: list[dict[str, Any]] = [{"kind": "iid"}, {"kind": "dirichlet", "beta": 0.3}, {"kind": "labels", "count": 3}]


# Spec, section 7.1: smallest, median, largest client; likewise classes per client; batches of 64, with their mean.
@pytest.mark.parametrize(
    ("labels", "beta", "sizes", "classes", "batches"),
    [
        (FASHION, 0.3, (133, 610, 1744), (1, 8, 10), (3, 9.86, 28)),
        (balanced(10, 5000), 0.3, (89, 508.5, 1648), (2, 8, 10), (2, 8.33, 26)),
        (balanced(100, 500), 0.2, (226, 506, 655), (30, 50, 82), (4, 8.21, 11)),
    ],
    ids=["fashion-mnist", "cifar10", "cifar100"],
)
def test_dirichlet_gives_the_sizes_of_the_authors_seed(
    labels: np.ndarray, beta: float, sizes: tuple[float, ...], classes: tuple[float, ...], batches: tuple[float, ...]
) -> None:
    shards = deal(labels, 100, kind="dirichlet", seed=1234, beta=beta)
    size = [len(shard) for shard in shards]
    held = [len(np.unique(labels[shard])) for shard in shards]
    steps = [-(-n // 64) for n in size]
    assert (min(size), np.median(size), max(size)) == sizes
    assert (min(held), np.median(held), max(held)) == classes
    assert (min(steps), round(float(np.mean(steps)), 2), max(steps)) == batches


def test_sizes_depend_on_class_counts_alone() -> None:
    """So the sizes above, found with sorted labels, are those of the real data sets."""
    shuffled = np.random.RandomState(0).permutation(FASHION)
    expected = [len(shard) for shard in deal(FASHION, 100, kind="dirichlet", seed=1234, beta=0.3)]
    assert [len(shard) for shard in deal(shuffled, 100, kind="dirichlet", seed=1234, beta=0.3)] == expected


def test_label_counts() -> None:
    shards = deal(FASHION, 100, kind="labels", seed=1234, count=3)
    sets = [frozenset(FASHION[shard].tolist()) for shard in shards]
    assert [set(held) for held in sets[:4]] == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}, {0, 1, 9}]
    assert all(len(held) == 3 for held in sets)
    assert [sum(label in held for held in sets) for label in range(10)] == [30] * 10
    assert len(set(sets)) == 10 and all(sets.count(held) == 10 for held in sets)
    assert {len(shard) for shard in shards} == {600}
    assert {int((FASHION[shard] == label).sum()) for shard in shards for label in range(10)} == {0, 200}


def test_label_counts_of_a_hundred_classes() -> None:
    labels = balanced(100, 500)
    sets = [frozenset(labels[shard].tolist()) for shard in deal(labels, 100, kind="labels", seed=1234, count=20)]
    assert len(set(sets)) == 5 and all(sets.count(held) == 20 for held in sets)


@pytest.mark.parametrize(("n", "clients", "sizes"), [(60_000, 100, {600}), (10, 4, {2, 3}), (3, 3, {1})])
def test_iid_sizes(n: int, clients: int, sizes: set[int]) -> None:
    assert {len(shard) for shard in deal(np.zeros(n, dtype=int), clients, kind="iid", seed=0)} == sizes


def test_iid_is_the_permutation_of_the_frozen_generator() -> None:
    """RandomState(1234).permutation(6), a stream that numpy has promised never to change."""
    assert [shard.tolist() for shard in deal(np.zeros(6), 3, kind="iid", seed=1234)] == [[2, 1], [5, 0], [4, 3]]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind["kind"]))
@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_every_sample_is_dealt_exactly_once(kind: dict[str, Any], seed: int) -> None:
    labels = np.random.RandomState(seed).randint(0, 10, 2003)  # classes of different sizes
    dealt = np.concatenate(deal(labels, 20, seed=seed, **kind))
    assert dealt.dtype == np.int64
    assert np.array_equal(np.sort(dealt), np.arange(2003))


def test_dirichlet_shares_follow_beta() -> None:
    """With a large beta all clients hold about as many; every client has the ten samples that make it worth asking."""
    skewed, even = (deal(balanced(10, 600), 20, kind="dirichlet", seed=0, beta=beta) for beta in (0.1, 1000.0))
    assert min(len(shard) for shard in skewed) >= 10
    assert max(abs(len(shard) - 300) for shard in even) < 30 < max(abs(len(shard) - 300) for shard in skewed)
    assert np.mean([len(np.unique(shard // 600)) for shard in skewed]) < 7


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind["kind"]))
def test_hash_names_the_deal(kind: dict[str, Any]) -> None:
    labels = balanced(10, 100)
    one, again, other = (partition.make(labels, 10, seed=seed, **kind) for seed in (1, 1, 2))
    assert one.hash == again.hash != other.hash
    fewer = partition.make(labels, 5, seed=1, **kind)
    assert fewer.hash != one.hash


def test_hash_sees_where_one_client_ends() -> None:
    one = partition.Partition.of([np.array([0, 1]), np.array([2])])
    other = partition.Partition.of([np.array([0]), np.array([1, 2])])
    assert one.hash != other.hash


def test_dirichlet_ends_where_no_deal_exists() -> None:
    with pytest.raises(SpecError, match="in 1,000 tries"):
        deal(balanced(2, 20), 10, kind="dirichlet", seed=0, beta=0.3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kind": "sorted", "seed": 0}, "partition.kind: 'sorted' is unknown; allowed: iid, .*dirichlet"),
        ({"kind": "iid", "seed": 0, "beta": 1.0}, "partition: unknown key 'beta'; allowed: kind, seed"),
        ({"kind": "dirichlet", "seed": 0}, "partition.beta not given"),
        ({"kind": "dirichlet", "seed": 0, "beta": 0.0}, "partition.beta: 0.0 must be a number from"),
        ({"kind": "dirichlet", "seed": 0, "beta": float("nan")}, "partition.beta: nan must be a number from"),
        ({"kind": "labels", "seed": 0, "count": -1}, "partition.count: -1 must be an integer from 1"),
        ({"kind": "resampled", "seed": 0, "count": 3}, "partition: unknown key 'count'; allowed: kind, seed, size"),
        ({"kind": "resampled", "seed": 0, "size": 0.5}, "partition.size: 0.5 must be an integer"),
        ({"kind": "dirichlet", "seed": 0, "beta": "0.3"}, "partition.beta: '0.3' must be a number .*quotes"),
        ({"kind": "iid", "seed": -1}, "partition.seed: -1"),
        ({"kind": "iid"}, "partition.seed not given"),
        ({"seed": 0}, "partition.kind not given"),
        (["iid"], "partition: .* must be a mapping"),
    ],
)
def test_bad_parameters_are_named(tiny: Callable[..., Spec], parameters: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        tiny(partition=parameters)


def test_the_kinds_that_a_spec_may_name_are_those_that_can_be_dealt() -> None:
    assert set(partition.PARAMETERS) == {*partition.KINDS, "given", "natural", "resampled"}


@pytest.mark.parametrize(
    ("clients", "count", "message"), [(5, 11, "11 is outside 1..10"), (2, 3, "leave class 6 to nobody")]
)
def test_impossible_label_counts_are_named(clients: int, count: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        deal(balanced(10, 5), clients, kind="labels", seed=0, count=count)


def test_resampled() -> None:
    """For more clients than samples: each draws by itself, with replacement, the same on every call."""
    made = partition.make(np.zeros(50), 10**9, kind="resampled", seed=3, size=40)
    first, last = made.indices(0), made.indices(10**9 - 1)
    assert len(first) == len(last) == 40 and made.clients == 10**9
    assert np.array_equal(first, made.indices(0)) and not np.array_equal(first, last)
    assert len(np.unique(first)) < 40, "40 draws from 50 without a repetition are next to impossible"
    counts = np.bincount(np.concatenate([made.indices(k) for k in range(1000)]), minlength=50)
    assert len(counts) == 50 and abs(counts - 800).max() < 5 * 800**0.5
    assert made.hash != partition.make(np.zeros(50), 10**9, kind="resampled", seed=4, size=40).hash


def test_quotas_are_equal_and_take_no_sample_twice() -> None:
    labels = np.random.RandomState(3).permutation(balanced(5, 41))  # 205 samples, 5 too many
    shards = deal(labels, 20, kind="quota", seed=1, beta=0.5)
    assert {len(shard) for shard in shards} == {10}
    assert len(set(np.concatenate(shards).tolist())) == 200
    again = deal(labels, 20, kind="quota", seed=1, beta=0.5)
    assert all((a == b).all() for a, b in zip(shards, again, strict=True))
    assert any((a != b).any() for a, b in zip(shards, deal(labels, 20, kind="quota", seed=2, beta=0.5), strict=True))


@pytest.mark.parametrize(
    ("beta", "low", "high"), [(1e4, 0.09, 0.13), (1.0, 0.2, 0.4), (0.05, 0.7, 1.0), (1e-3, 0.8, 1.0)]
)
def test_a_quota_is_as_skewed_as_its_shares(beta: float, low: float, high: float) -> None:
    """Mean share of a client's largest class, for clients that come while no class is used up: of a symmetric
    Dirichlet(1) over ten classes it is (1 + 1/2 + ... + 1/10) / 10 = 0.293."""
    shards = deal(FASHION, 100, kind="quota", seed=5, beta=beta)[:25]
    largest = [np.bincount(FASHION[shard], minlength=10).max() / 600 for shard in shards]
    assert low < float(np.mean(largest)) < high
