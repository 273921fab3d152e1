"""Costs, penalties and training of Bernoulli masks, against hand-worked numbers, exact counting, autograd and torch."""

import itertools
from math import comb, e, log2, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlib.data.sets import Dataset
from fedlib.data.sources import load
from fedlib.rng import Rng
from fedlib.theory import fedsparse
from fedlib.theory.fedsparse import PENALTIES, Network

PLACE = Rng(11)
penalties = pytest.mark.parametrize("penalty", PENALTIES)
counts = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def network() -> Network:
    return Network.draw((64, 128, 128, 10), e, PLACE.child("weights"))


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scores(n: int, name: str = "scores", shift: float = 0.0) -> Tensor:
    return torch.randn(n, generator=PLACE.child(name).torch(), dtype=torch.float64) + shift


def within_five_standard_errors(samples: Tensor, expected: float) -> bool:
    return abs(samples.mean().item() - expected) < 5 * samples.std().item() / sqrt(len(samples))


def test_entropy_by_hand() -> None:
    # H(1/4) = 2 - (3/4) log2 3; H(1/8) = 3 - (7/8) log2 7.
    expected = [0, 0, 1, 2 - 0.75 * log2(3), 2 - 0.75 * log2(3), 3 - 0.875 * log2(7)]
    assert fedsparse.entropy(doubles(0, 1, 0.5, 0.25, 0.75, 0.125)).tolist() == pytest.approx(expected, abs=1e-15)


def test_slope_is_the_derivative_of_entropy() -> None:
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fedsparse.entropy(p).sum(), p)
    torch.testing.assert_close(fedsparse.slope(p).detach(), slope)
    assert fedsparse.slope(doubles(1 / 3)).item() == pytest.approx(1)


@given(st.floats(1e-9, 1.0))
def test_density_of_inverts_the_entropy(bits: float) -> None:
    p = fedsparse.density_of(bits)
    assert 0 < p <= 0.5
    assert fedsparse.entropy(doubles(p)).item() == pytest.approx(bits, rel=1e-9)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_adaptive_bits_is_the_sequential_product(mask: list[bool]) -> None:
    bits = 0.0
    for seen, bit in enumerate(mask):
        chance = (sum(mask[:seen]) + 0.5) / (seen + 1)
        bits -= log2(chance if bit else 1 - chance)
    assert fedsparse.adaptive_bits(len(mask), sum(mask)) == pytest.approx(bits)


@given(counts)
def test_both_codes_keep_their_bounds(case: tuple[int, int]) -> None:
    n, k = case
    bound = n * fedsparse.entropy(doubles(k / n)).item()
    assert -1e-6 < fedsparse.adaptive_bits(n, k) - bound <= 0.5 * log2(n) + 1 + 1e-6
    assert -1e-6 < fedsparse.enumerative_bits(n, k) - bound <= log2(n + 1) + 1e-6
    assert fedsparse.enumerative_bits(n, k) == pytest.approx(log2(n + 1) + log2(comb(n, k)))


def test_three_counts_by_hand() -> None:
    mask, theta = doubles(1, 0, 0, 0, 1, 1, 0, 0), doubles(0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5)
    pooled, layered, given_model = fedsparse.bits_per_parameter(mask, [4, 4], theta)
    assert pooled == pytest.approx(3 / 8 * log2(8 / 3) + 5 / 8 * log2(8 / 5))
    assert layered == pytest.approx((2 - 0.75 * log2(3) + 1) / 2)
    assert given_model == pytest.approx((1 + 3 * log2(4 / 3) + 4) / 8)


@given(st.lists(st.booleans(), min_size=6, max_size=40), st.integers(1, 5))
def test_layers_never_cost_more_than_the_pool_and_its_frequency_costs_the_same(mask: list[bool], cut: int) -> None:
    bits, n = torch.tensor(mask, dtype=torch.float64), len(mask)
    pooled, layered, at_frequency = fedsparse.bits_per_parameter(bits, [cut, n - cut], bits.mean().expand(n))
    assert layered <= pooled + 1e-12
    assert at_frequency == pytest.approx(pooled, nan_ok=True)


def test_given_the_model_a_mask_costs_the_mean_entropy_and_not_more_than_a_real_code() -> None:
    theta, generator, n = torch.sigmoid(scores(500, "skewed", -2.0)), PLACE.child("masks").torch(), 500
    found = [fedsparse.bits_per_parameter(fedsparse.draw_mask(theta, generator), [n], theta) for _ in range(400)]
    pooled, _, given_model = torch.tensor(found).T
    mean = fedsparse.entropy(theta).mean().item()
    assert within_five_standard_errors(given_model, mean)
    assert mean <= pooled.mean() + log2(n + 1) / n
    assert mean < 0.9 * fedsparse.entropy(theta.mean())


@penalties
def test_gradients_are_those_of_autograd(penalty: str) -> None:
    s = scores(40, shift=-0.7).requires_grad_()
    (expected,) = torch.autograd.grad(PENALTIES[penalty](torch.sigmoid(s)), s)
    torch.testing.assert_close(fedsparse.gradient(penalty, s.detach()), 40 * expected)
    pooled = torch.sigmoid(s.detach()).mean().item()
    torch.testing.assert_close(fedsparse.gradient(penalty, s.detach(), pooled), 40 * expected)


def test_penalties_at_zero_scores_and_directions() -> None:
    half = torch.full((8,), 0.5)
    assert [PENALTIES[name](half).item() for name in ("linear", "pooled entropy", "mean entropy")] == [0.5, 1, 1]
    s = doubles(-2, 0, 2)
    assert (fedsparse.gradient("linear", s) > 0).all()
    assert fedsparse.gradient("linear", doubles(0)).item() == 0.25
    assert fedsparse.gradient("mean entropy", s).sign().tolist() == [1, 0, -1]
    for pooled, sign in ((0.3, 1), (0.5, 0), (0.7, -1)):
        assert (fedsparse.gradient("pooled entropy", s, pooled).sign() == sign).all()


def test_drawn_masks_have_their_means() -> None:
    theta, generator = doubles(0, 0.01, 0.5, 0.9, 1), PLACE.child("means").torch()
    masks = torch.stack([fedsparse.draw_mask(theta, generator) for _ in range(20_000)])
    assert set(masks.unique().tolist()) == {0, 1}
    assert all(within_five_standard_errors(masks[:, i], theta[i].item()) for i in (1, 2, 3))
    assert (masks[:, 0] == 0).all()
    assert (masks[:, 4] == 1).all()


def test_estimation_error_of_fair_coins_and_of_certainties_by_hand() -> None:
    # One fair coin is always 1/2 off. Two are 1/2 off, or not at all, with equal chances: 1/8 on average.
    assert (fedsparse.estimation_errors(torch.full((1, 50), 0.5), 3, PLACE) == 0.25).all()
    assert within_five_standard_errors(fedsparse.estimation_errors(torch.full((2, 50), 0.5), 400, PLACE), 1 / 8)
    assert (fedsparse.estimation_errors(doubles(0, 1, 1).expand(4, 3), 3, PLACE) == 0).all()


@pytest.mark.parametrize("clients", [1, 3, 10])
def test_estimation_error_is_the_mean_variance_over_k_and_below_its_bounds(clients: int) -> None:
    theta = torch.sigmoid(scores(clients * 200, shift=-1.0)).view(clients, 200)
    expected = (theta * (1 - theta)).sum().item() / (clients**2 * 200)
    assert within_five_standard_errors(fedsparse.estimation_errors(theta, 400, PLACE.child(clients)), expected)
    density = theta.mean().item()
    assert expected <= density * (1 - density) / clients <= 1 / (4 * clients)


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adam_steps_are_those_of_torch(eps: float) -> None:
    gradients, w = scores(60).view(20, 3), torch.zeros(3, dtype=torch.float64)
    optimizer, places = torch.optim.Adam([w], lr=0.1, eps=eps), []
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
        places.append(-w.clone() / 0.1)
    torch.testing.assert_close(fedsparse.adam_steps(gradients, eps).cumsum(0), torch.stack(places))


def test_adam_answers_a_constant_gradient_by_its_size_over_itself_plus_eps() -> None:
    g = doubles(1e-7, 1e-8, -1e-9)
    torch.testing.assert_close(fedsparse.adam_steps(g.expand(50, 3)), (g / (g.abs() + 1e-8)).expand(50, 3))


def test_network_by_hand() -> None:
    # Inputs (2, -1). First layer: 2 - 1 = 1 and -2 - 1 = -3, whose ReLU is 0. Second: 1 * 1, -1 * 1.
    w = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0])
    network, x = Network(w, ((2, 2), (2, 2))), torch.tensor([[2.0, -1.0]])
    first, logits = network.layers(torch.ones(8), x)
    assert (first.tolist(), logits.tolist()) == ([[1, -3]], [[1, -1]])
    assert network.layers(torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1]), x)[1].tolist() == [[0, -2]]
    # Loss gradient of logits (1, -1), label 0: (q, -q), q = p - 1 with p = sigma(2). theta (1 - theta) = 1/4 at s = 0.
    q = torch.sigmoid(torch.tensor(2.0)).item() - 1
    gradient = network.data_gradient(torch.ones(8), torch.zeros(8), x, torch.tensor([0]))
    # First layer: w2' (q, -q) = 2 q for the live unit, times w and input. Second: (q, -q) times activation 1, times w.
    assert (4 * gradient).tolist() == pytest.approx([4 * q, -2 * q, 0, 0, q, 0, q, 0])


def test_weights_are_two_points_of_each_layers_own_size(network: Network) -> None:
    assert network.sizes == [64 * 128, 128 * 128, 1280]
    for part, inputs in zip(network.w.split(network.sizes), (64, 128, 128), strict=True):
        torch.testing.assert_close(part.abs(), torch.full_like(part, e / sqrt(inputs)))
        assert abs((part > 0).float().mean() - 0.5) < 5 * 0.5 / sqrt(len(part))


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_a_layer_multiplies_the_mean_square_by_c2_fan_in_p_over_2(density: float) -> None:
    scale, x, generator = 1.7, torch.ones(1, 30), PLACE.child("variance", int(10 * density)).torch()
    squares = []
    for draw in range(600):
        network = Network.draw((30, 40, 40, 40), scale, PLACE.child("net", draw))
        mask = fedsparse.draw_mask(torch.full((len(network.w),), density), generator)
        squares.append([z.square().mean() for z in network.layers(mask, x)])
    for layer, samples in enumerate(torch.tensor(squares).T):
        assert within_five_standard_errors(samples, scale**2 * density * (scale**2 * density / 2) ** layer)


def test_which_empty_layers_end_all_learning(network: Network, digits: Dataset) -> None:
    x, y, s = digits.train_x[:64].flatten(1), digits.train_y[:64], torch.zeros(len(network.w))
    full = fedsparse.draw_mask(torch.full_like(s, 0.5), PLACE.child("half").torch())
    for empty in itertools.chain.from_iterable(itertools.combinations(range(3), r) for r in range(4)):
        parts = [part * (i not in empty) for i, part in enumerate(full.split(network.sizes))]
        live = [bool(g.any()) for g in network.data_gradient(torch.cat(parts), s, x, y).split(network.sizes)]
        # An empty hidden layer silences all: ReLU has slope 0 at 0. An empty output layer still learns itself.
        assert live == {(): [True, True, True], (2,): [False, False, True]}.get(empty, [False] * 3)


def test_a_collapsed_network_stays_where_it_is(network: Network, digits: Dataset) -> None:
    start = torch.full((len(network.w),), -200.0)  # sigma(-200) is 0 in float32
    history, end = fedsparse.train(network, digits, PLACE, rounds=2, scores=start)
    assert torch.equal(end, start)
    assert history["bits"].tolist() == [0, 0]


def test_training_learns_repeats_and_leaves_what_it_was_given(network: Network, digits: Dataset) -> None:
    w, start = network.w.clone(), torch.zeros(len(network.w))
    history, end = fedsparse.train(network, digits, PLACE, rounds=6, scores=start)
    again, same = fedsparse.train(network, digits, PLACE, "mean entropy", 0.0, rounds=6, scores=start)
    assert torch.equal(end, same)
    assert history.equals(again)
    assert not torch.equal(end, fedsparse.train(network, digits, Rng(12), rounds=6, scores=start)[1])
    assert torch.equal(network.w, w)
    assert not start.any()
    assert history["accuracy"].iloc[-1] > 60
    kept = history[[f"layer {i}" for i in (1, 2, 3)]].sum(axis=1)
    assert (kept / len(w)).tolist() == pytest.approx(history["density"].tolist())


def test_linear_penalty_sparsifies_and_mean_entropy_polarises(network: Network, digits: Dataset) -> None:
    ends = {
        name: fedsparse.train(network, digits, PLACE, name, strength, rounds=12)[0].iloc[-1]
        for name, strength in (("linear", 10.0), ("mean entropy", 10.0))
    }
    plain = fedsparse.train(network, digits, PLACE, rounds=12)[0].iloc[-1]
    assert plain["bits"] > 0.99
    assert ends["linear"]["bits"] < 0.6
    assert ends["mean entropy"]["bits"] > 0.99
    assert ends["mean entropy"]["mean entropy"] < 0.1 < 0.4 < plain["mean entropy"]


def test_an_adam_state_that_is_kept_weakens_the_penalty(network: Network, digits: Dataset) -> None:
    fresh, kept = (fedsparse.train(network, digits, PLACE, "linear", 1.0, 10, f)[0].iloc[-1] for f in (True, False))
    assert fresh["density"] + 0.05 < kept["density"]
