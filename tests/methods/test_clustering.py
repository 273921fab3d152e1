"""Weight clustering: the nearest centroid, where centroids begin, and what training through them does."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlib.errors import PayloadError
from fedlib.methods.fedcompress import clustering
from fedlib.methods.fedcompress.clustering import Line
from fedlib.rng import Rng

FLOATS = st.floats(-4, 4, width=32).map(lambda x: x + 0.0)


def random(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


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
    line = Line.of(random(20_000))
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
    w, mu = random(n), torch.from_numpy(clustering.seeds(random(n, 1), 8, Rng(0)))
    shown = clustering.clustered(w, mu)
    assert len(set(shown.tolist())) <= 8 and shown.shape == w.shape
    assert (shown == clustering.straight_through(w, mu)).all(), "what was trained with"
    assert not torch.signbit(clustering.clustered(torch.zeros(1), torch.tensor([-0.0]))).any()


def test_names_of_centroids() -> None:
    state = {"conv.weight": random(100), "bias": random(3)}
    made = clustering.first_centroids(state, ["conv.weight"], 4, Rng(9))
    assert all(mu.requires_grad for mu in made.values())
    assert set(clustering.centroids(state | made)) == {"conv.weight"}
    assert clustering.centroids(state) == {}
