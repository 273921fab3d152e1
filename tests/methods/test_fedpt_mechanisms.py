"""Clipping and noise of private training: properties 9 to 14 of FedPT's specification."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlib.errors import PayloadError
from fedlib.methods.fedpt import mechanisms
from fedlib.methods.fedpt.mechanisms import ftrl_start, ftrl_step, tree_nodes, tree_noise
from fedlib.rng import Rng
from fedlib.theory import fedpt as theory

SHAPES = {"kernel": torch.Size((3, 4)), "bias": torch.Size((5,)), "scale": torch.Size(())}
SIZE = 200_000  # entries of a statistical test; five standard errors are allowed each time


def update(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def minus(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one[name].double() - other[name].double() for name in one}


def assert_variance(draws: Tensor, variance: float) -> None:
    """Chi-square: the sum of squares over the variance has mean n and variance 2 n."""
    n = draws.numel()
    assert abs(float(draws.double().square().sum()) / variance - n) < 5 * math.sqrt(2 * n)
    assert abs(float(draws.double().mean())) < 5 * math.sqrt(variance / n)


def assert_uncorrelated(one: Tensor, other: Tensor) -> None:
    both = torch.corrcoef(torch.stack([one.double(), other.double()]))
    assert abs(float(both[0, 1])) < 5 / math.sqrt(one.numel())


# Properties 9 and 10: clipping and sensitivity


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-12, 12), bound=st.floats(1e-6, 1e6))
def test_a_clipped_update_has_at_most_the_bound_and_its_old_direction(seed: int, exponent: int, bound: float) -> None:
    plain = update(seed, 10.0**exponent)
    clipped, before = mechanisms.clip(plain, bound)
    assert before == pytest.approx(norm(plain), rel=1e-9)
    assert norm(clipped) <= bound * (1 + 1e-6)
    factor = 1 if before <= bound else bound / before
    torch.testing.assert_close(clipped, {name: plain[name] * factor for name in SHAPES}, rtol=0, atol=0)


def test_the_norm_is_joint_over_all_tensors() -> None:
    clipped, before = mechanisms.clip({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}, 3.5)
    assert before == 5
    torch.testing.assert_close(clipped, {"a": torch.tensor([2.1, 0.0]), "b": torch.tensor([[2.8]])})
    assert mechanisms.clip({"a": torch.zeros(3)}, 1.0)[1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(PayloadError, match="norm"):
        mechanisms.clip({"a": torch.ones(2), "b": torch.tensor([0.0, bad])}, 1.0)


@given(seeds=st.lists(st.integers(0, 2**32), min_size=3, max_size=6, unique=True), bound=st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_one_client_moves_the_sum_by_the_bound_and_a_replaced_one_by_twice_the_bound(
    seeds: list[int], bound: float
) -> None:
    other, *cohort = [mechanisms.clip(update(seed, 1e3), bound)[0] for seed in seeds]
    total = {name: torch.stack([one[name].double() for one in cohort]).sum(0) for name in SHAPES}
    zeroed = minus(total, cohort[0])
    replaced = {name: zeroed[name] + other[name].double() for name in SHAPES}
    assert norm(minus(total, zeroed)) <= bound * (1 + 1e-6)
    assert norm(minus(total, replaced)) <= 2 * bound * (1 + 1e-6)


# Properties 11 and 12: the noise of DP-FedAvg


def test_the_noise_of_the_mean_has_the_stated_deviation_and_is_new_each_round() -> None:
    total, std = torch.full((SIZE,), 7.0), 1.13 * 0.3
    noises = [mechanisms.private_mean(total, Rng(3).child("noise", t), std, 100) - 0.07 for t in range(3)]
    for noise in noises:
        assert_variance(noise, (std / 100) ** 2)
    for one, other in itertools.combinations(noises, 2):
        assert_uncorrelated(one, other)
    again = mechanisms.private_mean(total, Rng(3).child("noise", 1), std, 100) - 0.07
    assert torch.equal(again, noises[1]), "the same name, the same noise"


@pytest.mark.parametrize("size", [20_000, 83_902, 242_340])
def test_the_noise_grows_with_the_root_of_the_trained_entries(size: int) -> None:
    noise = mechanisms.gaussian(Rng(size), size, 0.25)
    assert noise.shape == (size,)
    assert float(noise.norm()) / 0.25 == pytest.approx(math.sqrt(size), rel=0.01)
    assert theory.expected_norm(size, 0.25) == pytest.approx(0.25 * math.sqrt(size), rel=1 / size)


def test_the_expected_norm_at_known_dimensions() -> None:
    assert theory.expected_norm(1, 2.0) == pytest.approx(2 * math.sqrt(2 / math.pi))
    assert theory.expected_norm(2, 2.0) == pytest.approx(2 * math.sqrt(math.pi / 2))
    assert theory.expected_norm(3, 2.0) == pytest.approx(2 * math.sqrt(8 / math.pi))
    assert theory.expected_norm(11_227_812, 1.0) == pytest.approx(math.sqrt(11_227_812 - 0.5), rel=1e-7)


def test_flat_and_named_tensors_are_each_other_s_inverse() -> None:
    torch.testing.assert_close(mechanisms.unflatten(mechanisms.flatten(update(5)), SHAPES), update(5), rtol=0, atol=0)


# Property 13: the noise of the tree


@settings(deadline=None)
@given(rounds=st.integers(0, 5000))
def test_the_nodes_of_a_prefix_cover_each_of_its_rounds_once(rounds: int) -> None:
    nodes = tree_nodes(rounds)
    covered = [t for level, index in nodes for t in range(index << level, (index + 1) << level)]
    assert covered == list(range(rounds))
    assert len(nodes) == rounds.bit_count()


@pytest.mark.parametrize("rounds", [1, 2, 3, 7, 8, 11, 1599, 1600])
def test_the_variance_of_a_prefix_counts_the_ones_of_its_length(rounds: int) -> None:
    assert_variance(tree_noise(Rng(rounds), rounds, SIZE, 0.5), rounds.bit_count() * 0.25)


def test_nested_prefixes_share_nodes_and_others_do_not() -> None:
    six, four, one = (tree_noise(Rng(1), rounds, SIZE, 1.0) for rounds in (6, 4, 1))
    torch.testing.assert_close(six - four, mechanisms.gaussian(Rng(1).child(1, 2), SIZE, 1.0).double())
    assert_variance(six - four, 1)
    assert_uncorrelated(six - four, four)
    assert_uncorrelated(one, four)
    assert_uncorrelated(four, tree_noise(Rng(1).child("restart"), 4, SIZE, 1.0))
    assert torch.equal(six, tree_noise(Rng(1), 6, SIZE, 1.0)), "made anew from its names"
    assert not tree_noise(Rng(1), 0, SIZE, 1.0).any()


# Property 14: DP-FTRL with momentum


def test_without_noise_ftrl_is_momentum_sgd_to_the_last_bit() -> None:
    # Halves and small integers: every float operation is exact, whatever its order.
    generator = torch.Generator().manual_seed(0)
    plain = torch.randint(-8, 8, (50,), generator=generator).float().requires_grad_()
    sgd = torch.optim.SGD([plain], lr=0.25, momentum=0.5)
    state, point = ftrl_start(plain.detach().clone()), plain.detach().clone()
    for _ in range(12):
        gradient = torch.randint(-8, 8, (50,), generator=generator).float()
        plain.grad = gradient.clone()
        sgd.step()
        state, point = ftrl_step(state, gradient, 0.0, lr=0.25, momentum=0.5)
        assert torch.equal(point, plain.detach())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_noise_ftrl_follows_momentum_sgd_down_a_bowl(momentum: float) -> None:
    curvature = torch.linspace(0.1, 3, 40)
    start = torch.randn(40, generator=torch.Generator().manual_seed(1))
    plain = start.clone().requires_grad_()
    sgd = torch.optim.SGD([plain], lr=0.1, momentum=momentum)
    state, point = ftrl_start(start), start
    for _ in range(200):
        plain.grad = curvature * plain.detach()
        sgd.step()
        state, point = ftrl_step(state, curvature * point, 0.0, lr=0.1, momentum=momentum)
        torch.testing.assert_close(point, plain.detach(), rtol=0, atol=1e-5)
    assert torch.equal(state.start, start) and point.dtype == start.dtype


def test_the_noise_of_ftrl_is_the_prefix_s_and_enters_the_momentum() -> None:
    start, gradients = torch.zeros(6), [torch.full((6,), float(t)) for t in range(5)]
    noises = [tree_noise(Rng(2), t + 1, 6, 0.1) for t in range(5)]
    state = ftrl_start(start)
    for pair in zip(gradients, noises, strict=True):
        state, point = ftrl_step(state, *pair, lr=2.0, momentum=0.5)
    sums = [sum(gradients[: t + 1], torch.zeros(6)) + noises[t] for t in range(5)]
    expected = -2 * sum((0.5 ** (4 - t) * sums[t] for t in range(5)), torch.zeros(6))
    torch.testing.assert_close(point, expected.float())
    again = ftrl_start(point)  # a restart
    assert torch.equal(again.start, point) and not again.total.any() and not again.velocity.any()
