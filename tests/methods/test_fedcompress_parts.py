"""What FedCompress is made of: clusters, the score and the rule for their number, images flipped, shifted and cut."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from fedcompress_toys import begun
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlib.errors import PayloadError, SpecError
from fedlib.methods.fedcompress import adaptive_clusters, augmentation, clustering
from fedlib.methods.fedcompress.adaptive_clusters import Rule, effective_rank, gram
from fedlib.methods.fedcompress.clustering import Line
from fedlib.methods.fedcompress.method import FedCompress
from fedlib.rng import Rng

FLOATS = st.floats(-4, 4, width=32).map(lambda x: x + 0.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Clusters: the nearest centroid, where centroids begin, and what training through them does


def nearest(weights: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Brute force in exact numbers; of two equally near ones the lower."""
    mu = [Fraction(c) for c in centroids.tolist()]
    return np.array([min(range(len(mu)), key=lambda j: abs(Fraction(w) - mu[j])) for w in weights.tolist()])


@given(st.lists(FLOATS, min_size=1, max_size=40), st.lists(FLOATS, min_size=1, max_size=9))
def test_assignment_is_brute_force(weights: list[float], centroids: list[float]) -> None:
    w, mu = np.array(weights, np.float32), np.unique(np.array(centroids, np.float32))
    found = clustering.assign(torch.from_numpy(w), torch.from_numpy(mu)).numpy()
    assert (found == nearest(w, mu)).all()
    line = Line.of(torch.from_numpy(w))
    bounds = line.bounds(mu)
    assert (np.repeat(np.arange(mu.size), np.diff(bounds)) == nearest(line.values, mu)).all(), "and in sorted order"


def test_a_weight_beside_the_midpoint() -> None:
    """The midpoint of two neighbours in float32 is none; rounded up it would take a weight from the upper one."""
    one = np.float32(1)
    neighbours = np.array([one, np.nextafter(one, np.float32(2))], np.float32)
    found = clustering.assign(torch.from_numpy(neighbours), torch.from_numpy(neighbours))
    assert found.tolist() == [0, 1]
    assert clustering.assign(torch.tensor([1.0]), torch.tensor([0.0, 2.0])).tolist() == [0], "in a tie the lower"


def test_by_hand() -> None:
    line = Line.of(torch.tensor([4.0, 0.0, 1.0, 5.0, 0.5]))
    assert line.values.tolist() == [0.0, 0.5, 1.0, 4.0, 5.0]
    mu = np.array([0.5, 4.0], np.float32)
    assert line.bounds(mu).tolist() == [0, 3, 5]
    assert clustering.distortion(line, mu) == pytest.approx((0.25 + 0 + 0.25 + 0 + 1) / 5)
    assert clustering.lloyd(line, mu, 1).tolist() == [0.5, 4.5]
    assert clustering.lloyd(line, np.array([0.5, 4.0, 100.0], np.float32), 3).tolist() == [0.5, 4.5, 100.0], (
        "empty: stays"
    )


@given(st.lists(FLOATS, min_size=1, max_size=60), st.integers(2, 9), st.integers(0, 5))
def test_seeds_are_values(values: list[float], number: int, seed: int) -> None:
    tensor = torch.tensor(values)
    found = clustering.seeds(tensor, number, Rng(seed))
    assert found.dtype == np.float32 and found.size == number
    assert found.flags.c_contiguous, "optimizers step through memory"
    assert set(found.tolist()) <= set(tensor.tolist())
    distinct = len(set(tensor.tolist()))
    assert len(set(found.tolist())) == min(number, distinct), "as many as there can be"
    assert (np.diff(found) >= 0).all()
    assert (found == clustering.seeds(tensor, number, Rng(seed))).all(), "the same for the same seed"


def test_equal_values_far_from_zero() -> None:
    """Where squares cancel: three values a hair apart, far from 0, many times over."""
    values = torch.tensor([1000.0, 1000.0625, 1000.125]).repeat(500)
    assert clustering.seeds(values, 3, Rng(1)).tolist() == [1000.0, 1000.0625, 1000.125]
    assert clustering.seeds(values, 2, Rng(1)).size == 2


def test_distortion_falls_with_the_number_of_clusters() -> None:
    """In the mean over seeds, about like one over its square; Lloyd's steps lower it further, and never raise it."""
    line = Line.of(random(20_000).float())
    means = []
    for number in (2, 4, 8, 16, 32):
        found = [clustering.seeds(torch.from_numpy(line.values), number, Rng(seed)) for seed in range(5)]
        for mu in found:
            path = [clustering.distortion(line, clustering.lloyd(line, mu, steps)) for steps in range(6)]
            assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(path))
        means.append(np.mean([clustering.distortion(line, mu) for mu in found]))
    ratios = [a / b for a, b in itertools.pairwise(means)]
    assert all(2 < ratio < 6 for ratio in ratios), ratios


def test_sampling_is_by_squared_distance() -> None:
    """Two values besides the first: at distance 1, nine times, and at distance 3, once: equal chances without retries.

    With the best of three draws (3 + ln 2, rounded down) the near value is taken unless all three miss it: 7/8.
    """
    line = Line.of(torch.tensor([0.0] * 10_000 + [1.0] * 9 + [3.0]))
    taken = []
    for seed in range(400):
        taken.append(clustering.seeds(torch.from_numpy(line.values), 2, Rng(seed)).tolist()[1])
    assert set(taken) == {1.0, 3.0}
    # Distortion after taking 1: (3 - 1)^2 = 4; after taking 3: nine times 1 = 9. So 1 is the better of a pair.
    assert abs(np.mean([value == 1.0 for value in taken]) - 0.875) < 0.06


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    weights = torch.tensor([0.0, bad, 1.0])
    with pytest.raises(PayloadError, match="not finite: local training diverged; lower the learning rate"):
        clustering.seeds(weights, 2, Rng(0))
    with pytest.raises(PayloadError, match="not finite"):
        clustering.clustered(weights, torch.tensor([0.0, 1.0]))
    with pytest.raises(PayloadError, match="not finite"):
        clustering.clustered(torch.zeros(2), torch.tensor([0.0, bad]))


def test_nothing_to_cluster() -> None:
    with pytest.raises(ValueError, match="values: none"):
        clustering.seeds(torch.empty(0), 2, Rng(0))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_straight_through_by_hand(order: list[int]) -> None:
    """With the loss sum of g times clustered w: the gradient of w is g, of a centroid the sum over its members."""
    w = torch.tensor([[-1.1, 0.2], [0.9, 5.0]], requires_grad=True)
    mu = torch.tensor([-1.0, 0.0, 1.0])[order].requires_grad_()
    g = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    shown = clustering.straight_through(w, mu)
    assert shown.tolist() == [[-1.0, 0.0], [1.0, 1.0]]
    of_w, of_mu = torch.autograd.grad((g * shown).sum(), [w, mu])
    assert of_w.tolist() == g.tolist()
    assert of_mu.tolist() == torch.tensor([1.0, 2.0, 12.0])[order].tolist()


@given(st.lists(FLOATS, min_size=1, max_size=40), st.lists(FLOATS, min_size=1, max_size=9))
def test_a_gpu_s_fixed_order_gives_what_gather_does(weights: list[float], centroids: list[float]) -> None:
    ascending = torch.tensor(sorted(centroids), requires_grad=True)
    index = clustering.assign(torch.tensor(weights), ascending.detach())
    g = torch.arange(1.0, 1 + len(weights))  # whole, so that any order of summing is exact
    expected, found = ascending.gather(0, index), clustering.picked(ascending, index)
    assert torch.equal(found, expected)
    of_expected, of_found = (torch.autograd.grad((g * shown).sum(), ascending)[0] for shown in (expected, found))
    assert torch.equal(of_found, of_expected)
    stacked = torch.stack([ascending.detach(), 2 * ascending.detach()])
    both = torch.func.vmap(clustering.picked, in_dims=(0, None))(stacked, index.view(1, -1))
    assert torch.equal(both, stacked[:, index].unsqueeze(1))


def test_an_unused_centroid_has_no_gradient() -> None:
    w, mu = torch.tensor([0.1, 0.2], requires_grad=True), torch.tensor([0.0, 9.0], requires_grad=True)
    assert torch.autograd.grad(clustering.straight_through(w, mu).sum(), mu)[0].tolist() == [2.0, 0.0]
    assert clustering.clustered(w, mu).tolist() == [0.0, 0.0]


def test_pull_by_hand() -> None:
    w, mu = torch.tensor([0.5, 2.0, 3.0], requires_grad=True), torch.tensor([2.0, 0.0], requires_grad=True)
    loss = clustering.pull(w, mu)
    assert float(loss.detach()) == pytest.approx(0.25 + 0 + 1)
    of_w, of_mu = torch.autograd.grad(loss, [w, mu])
    assert of_w.tolist() == [1.0, 0.0, 2.0] and of_mu.tolist() == [-2.0, -1.0]


@pytest.mark.parametrize("n", [1, 31, 500])
def test_clustered_has_few_values(n: int) -> None:
    w, mu = random(n).float(), torch.from_numpy(clustering.seeds(random(n, seed=1).float(), 8, Rng(0)))
    shown = clustering.clustered(w, mu)
    assert len(set(shown.tolist())) <= 8 and shown.shape == w.shape
    assert (shown == clustering.straight_through(w, mu)).all(), "what was trained with"
    assert not torch.signbit(clustering.clustered(torch.zeros(1), torch.tensor([-0.0]))).any()


def test_names_of_centroids() -> None:
    state = {"conv.weight": random(100).float(), "bias": random(3).float()}
    made = clustering.first_centroids(state, ["conv.weight"], 4, Rng(9))
    assert all(mu.requires_grad for mu in made.values())
    assert set(clustering.centroids(state | made)) == {"conv.weight"}
    assert clustering.centroids(state) == {}


# The score of a representation, and the rule


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
    z = z.relu()
    z[:, 3:] = 0
    assert effective_rank(gram(z)) == pytest.approx(by_singular_values(z[:, :3]), rel=1e-6), "nor do dead ones"
    low = random(400, 3) @ random(3, 200, seed=1)
    assert effective_rank(gram(low)) == pytest.approx(by_singular_values(low), rel=1e-6), "nor what rounding makes of 0"


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


# Augmentation


def test_augmentation_by_hand() -> None:
    """Of 8 x 8 pixels the border is one wide, and what is cut reaches two from its centre."""
    x = torch.arange(64.0).view(1, 1, 8, 8) + 1
    labels = torch.tensor([3])

    def made(kind: str, *u: float) -> Tensor:
        images, same = augmentation.augmented((x, labels), torch.tensor([u, [0.0] * 5]), kind)
        assert same is labels and images.shape == x.shape
        return images[0, 0]

    plain = x[0, 0].clone()
    plain[:2, :2] = 0
    assert torch.equal(made("corner", 0.5, 0.4, 0.4, 0.9, 0.9), plain), "no flip, no shift, and the corner"
    flipped = x[0, 0].flip(1)
    flipped[:2, :2] = 0
    assert torch.equal(made("corner", 0.49, 0.4, 0.4, 0.9, 0.9), flipped), "the cut stays where it is"
    moved = torch.zeros(8, 8)
    moved[:7, 1:] = x[0, 0, 1:, :7]
    moved[2:6, 3:7] = 0
    assert torch.equal(made("random", 0.5, 0.99, 0.0, 0.5, 0.63), moved), "a row down, a column left, a cut at (4, 5)"
    assert augmentation.augmented((x, labels), None, "none") == (x, labels)


@given(st.integers(4, 40), st.integers(0, 2**32 - 1))
def test_augmentation_keeps_values_and_cuts_what_it_should(side: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, side, side, generator=generator) + 1
    u = torch.rand(5, 5, generator=generator)
    for kind in ("corner", "random"):
        made, _ = augmentation.augmented((x, torch.zeros(3)), u, kind)
        for image, own in zip(made, x, strict=True):
            assert set(image.flatten().tolist()) <= {0.0, *own.flatten().tolist()}
            lost = float((image[0] == 0).float().mean())
            assert lost <= 1 - (1 - 2 * (side // 4) / side) ** 2 + 2 * (side // 8) / side + 1e-6
            assert torch.equal(image[0] == 0, image[1] == 0), "all channels alike"
    with_grad = torch.func.vmap(lambda a, b: augmentation.augmented((a, a), b, "random")[0])(x[:, None], u[:3, None])
    alone = [augmentation.augmented((x[i : i + 1], x), u[i : i + 1], "random")[0] for i in range(3)]
    assert torch.equal(with_grad, torch.stack(alone))


def test_augmentation_changes_what_is_learned_and_nothing_else() -> None:
    for method in ("fedcompress", "fedzip"):
        plain, other = (begun({"augment": kind}, method) for kind in ("none", "random"))
        assert len(plain.message) == len(other.message)
        assert plain.upload() != other.upload() and other.upload() == other.upload()
