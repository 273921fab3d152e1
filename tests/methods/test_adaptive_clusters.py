"""The score of a representation, and the server's rule for the number of clusters with its four reference traces."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlib.errors import PayloadError, SpecError
from fedlib.methods.fedcompress import adaptive_clusters
from fedlib.methods.fedcompress.adaptive_clusters import Rule, effective_rank, gram
from fedlib.methods.fedcompress.method import FedCompress


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_singular_values(z: Tensor) -> float:
    """The definition, on stacked rows."""
    rows = z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
    sigma = torch.linalg.svdvals(rows)
    p = sigma / sigma.sum()
    return math.exp(-sum(float(v) * math.log(float(v)) for v in p if v > 0))


def test_effective_rank_by_hand() -> None:
    assert effective_rank(gram(torch.eye(5))) == pytest.approx(5)
    assert effective_rank(gram(torch.tensor([[1.0, 2.0, 2.0], [-2.0, -4.0, -4.0]]))) == pytest.approx(1)
    # Three rows along one axis, one along the other: singular values sqrt(3) and 1.
    p = np.array([math.sqrt(3), 1]) / (1 + math.sqrt(3))
    expected = math.exp(-(p * np.log(p)).sum())
    assert effective_rank(gram(torch.tensor([[1.0, 0], [5, 0], [-2, 0], [0, 3]]))) == pytest.approx(expected)
    assert effective_rank(torch.zeros(4, 4)) == 0, "no rows"
    assert effective_rank(gram(torch.zeros(3, 4))) == 0, "rows of zeros have no direction"


def test_effective_rank_by_its_definition_and_invariances() -> None:
    z = random(40, 12) @ random(12, 12, seed=1)
    score = effective_rank(gram(z))
    assert score == pytest.approx(by_singular_values(z), rel=1e-9)
    rotation, _ = torch.linalg.qr(random(12, 12, seed=2))
    assert effective_rank(gram(z @ rotation)) == pytest.approx(score, rel=1e-9)
    assert effective_rank(gram(7 * z)) == pytest.approx(score, rel=1e-9)
    assert effective_rank(gram(z * random(40, 1, seed=3).abs())) == pytest.approx(score, rel=1e-9), "rows' lengths"
    twice = effective_rank(gram(torch.cat([z, z], 1)))
    assert twice == pytest.approx(score, rel=1e-6), "features said twice add none"


def test_summed_gram_matrices_are_those_of_stacked_rows() -> None:
    """What clients send, in float32, gives the score of all rows together to 1e-5."""
    clients = [random(n, 16, seed=n).relu() for n in (3, 20, 45)]
    summed = sum(gram(z.float()).float().double() for z in clients)
    assert isinstance(summed, Tensor)
    assert effective_rank(summed) == pytest.approx(by_singular_values(torch.cat(clients)), rel=1e-5)


def test_dead_features_make_no_score_of_nothing() -> None:
    z = random(30, 8).relu()
    z[:, 3:] = 0
    assert effective_rank(gram(z)) == pytest.approx(by_singular_values(z[:, :3]), rel=1e-6)


@pytest.mark.parametrize(("n", "rank"), [(30, 4), (5, 5), (12, 12), (1, 1), (40, 9)])
def test_a_report_has_the_score_of_the_rows_and_none_of_them(n: int, rank: int) -> None:
    """In float32, of any rank; never longer than the rows or than the triangle of Z'Z."""
    z = random(n, rank) @ random(rank, 12, seed=1)
    report = adaptive_clusters.pack_report(z.float(), n // 2)
    assert len(report) == adaptive_clusters.report_bytes(n, 12) <= 8 + 4 * min(12 * n, 78)
    found = adaptive_clusters.read_report(memoryview(report), 12)
    assert (int(found["held"]), int(found["right"])) == (n, n // 2)
    torch.testing.assert_close(found["gram"], gram(z), atol=1e-6, rtol=1e-5)
    assert effective_rank(found["gram"]) == pytest.approx(by_singular_values(z), rel=1e-5)


def test_embeddings_longer_than_rows_of_length_one_are_refused() -> None:
    report = bytearray(adaptive_clusters.pack_report(random(6, 4), 3))
    report[8:12] = np.float32(9).tobytes()
    with pytest.raises(PayloadError, match=r"embeddings of squared length .* expected at most 6"):
        adaptive_clusters.read_report(memoryview(bytes(report)), 4)


def grown(accuracies: list[float], scores: list[float], rule: Rule, by_accuracy: bool = True) -> list[int]:
    """Clusters in force by round, the last for the round after; each seen from the history up to then."""
    numbers = [rule.least]
    for r in range(1, len(accuracies) + 1):
        numbers.append(rule.following(accuracies[:r], scores[:r], numbers, by_accuracy))
    return numbers


def rounds_of_growth(numbers: list[int]) -> list[int]:
    return [r for r in range(1, len(numbers)) if numbers[r] > numbers[r - 1]]


R = range(1, 101)
EVERY_FOURTH = {31: list(range(35, 100, 4)), 52: list(range(56, 101, 4))}
TRACES = {  # specification, section 3.7
    "flat": ([0.5] * 100, [20.0] * 100, list(range(4, 89, 4)), 30),
    "rising": ([0.011 * r for r in R], [20.0] * 100, [], 8),
    "saturating 6, 10": (
        [0.85 * (1 - math.exp(-r / 6)) for r in R],
        [24 + 3 * (1 - math.exp(-r / 10)) for r in R],
        [18, 22, 27, 31, *EVERY_FOURTH[31]],
        29,
    ),
    "saturating 12, 20": (
        [0.90 * (1 - math.exp(-r / 12)) for r in R],
        [24 + 3 * (1 - math.exp(-r / 20)) for r in R],
        [26, 35, 43, 48, 52, *EVERY_FOURTH[52]],
        25,
    ),
}


@pytest.mark.parametrize("trace", TRACES)
def test_reference_traces(trace: str) -> None:
    accuracies, scores, expected, final = TRACES[trace]
    numbers = grown(accuracies, scores, Rule())
    assert rounds_of_growth(numbers) == expected
    assert numbers[-1] == final


def test_thresholds() -> None:
    found = [Rule().threshold(c) for c in (8, 9, 10, 12, 16, 24)]
    assert found == pytest.approx([0.01, 0.005, 0.0025, 0.00125, 6.25e-4, 3.125e-4])


@pytest.mark.parametrize("seed", range(20))
def test_any_history(seed: int) -> None:
    """Clusters never fall, never pass the most, change every `patience` rounds at most, and not before the first."""
    draw = np.random.default_rng(seed)
    rule = Rule(least=4, most=11, step=2, window=int(draw.integers(1, 5)), patience=int(draw.integers(1, 5)), first=5)
    numbers = grown(draw.normal(0, 0.01, 60).tolist(), draw.normal(0, 0.1, 60).tolist(), rule)
    at = rounds_of_growth(numbers)
    assert at and at[0] >= 5 and numbers[-1] <= 11
    assert all(b - a >= rule.patience for a, b in itertools.pairwise(at))
    assert all(b - a in (0, 2) or b == 11 for a, b in itertools.pairwise(numbers))


def test_both_must_stall_in_the_code_and_the_score_alone_in_the_paper() -> None:
    rising, flat = [0.02 * r for r in range(20)], [20.0] * 20
    assert grown(rising, flat, Rule())[-1] == 8
    assert grown(rising, flat, Rule(), by_accuracy=False)[-1] > 8
    assert grown(flat, [50 * r for r in rising], Rule())[-1] == 8
    assert grown([1.0], [1.0], Rule(patience=1, first=1)) == [8, 8], "one round makes no difference to look at"


def test_least_above_most() -> None:
    with pytest.raises(SpecError, match=r"hyper.least: 9 exceeds hyper.most: 8; start with fewer clusters"):
        FedCompress(least=9, most=8)
