"""Clipping, noise and accounting of private training: properties 9 to 15 of FedPT's specification."""

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlib.errors import PayloadError, RunError, SpecError
from fedlib.methods.fedpt import accounting, mechanisms
from fedlib.methods.fedpt.accounting import INTEGERS, epsilon
from fedlib.methods.fedpt.mechanisms import ftrl_start, ftrl_step, tree_nodes, tree_noise
from fedlib.methods.fedpt.tree_sensitivity import kappa, queue_weight
from fedlib.rng import Rng

SHAPES = {"kernel": torch.Size((3, 4)), "bias": torch.Size((5,)), "scale": torch.Size(())}
SIZE = 200_000  # entries of a statistical test; five standard errors are allowed each time
DELTA = 3400**-1.1
FEDAVG: dict[str, Any] = dict(rounds=1500, delta=DELTA, clients=3400, cohort=100)


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
    total, numbers = torch.full((SIZE,), 7.0), dict(noise_multiplier=1.13, bound=0.3, cohort=100)
    noises = [mechanisms.private_mean(total, Rng(3).child("noise", t), **numbers) - 0.07 for t in range(3)]
    for noise in noises:
        assert_variance(noise, (1.13 * 0.3 / 100) ** 2)
    for one, other in itertools.combinations(noises, 2):
        assert_uncorrelated(one, other)
    again = mechanisms.private_mean(total, Rng(3).child("noise", 1), **numbers) - 0.07
    assert torch.equal(again, noises[1]), "the same name, the same noise"


@pytest.mark.parametrize("size", [20_000, 83_902, 242_340])
def test_the_noise_grows_with_the_root_of_the_trained_entries(size: int) -> None:
    noise = mechanisms.gaussian(Rng(size), size, 0.25)
    assert noise.shape == (size,)
    assert float(noise.norm()) / 0.25 == pytest.approx(math.sqrt(size), rel=0.01)
    assert mechanisms.expected_norm(size, 0.25) == pytest.approx(0.25 * math.sqrt(size), rel=1 / size)


def test_the_expected_norm_at_known_dimensions() -> None:
    assert mechanisms.expected_norm(1, 2.0) == pytest.approx(2 * math.sqrt(2 / math.pi))
    assert mechanisms.expected_norm(2, 2.0) == pytest.approx(2 * math.sqrt(math.pi / 2))
    assert mechanisms.expected_norm(3, 2.0) == pytest.approx(2 * math.sqrt(8 / math.pi))
    assert mechanisms.expected_norm(11_227_812, 1.0) == pytest.approx(math.sqrt(11_227_812 - 0.5), rel=1e-7)


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


# Property 15: accounting


def test_kappa_of_one_participation() -> None:
    assert [kappa(rounds) for rounds in (1, 2, 3, 4, 8, 1600, 2048)] == [1, 2, 2, 3, 4, 11, 12]


def squares(rounds: int, chosen: tuple[int, ...]) -> int:
    """Sum over the complete nodes of (participations in it)^2, from the definition."""
    taken = np.isin(np.arange(rounds), chosen)
    levels = [taken[: rounds >> level << level].reshape(-1, 1 << level) for level in range(rounds.bit_length())]
    return sum(int((nodes.sum(1) ** 2).sum()) for nodes in levels)


@pytest.mark.parametrize("rounds", [*range(1, 12), 16, 19])
def test_kappa_is_the_most_over_all_allowed_participations(rounds: int) -> None:
    most: dict[tuple[int, int], int] = {}
    for k in range(1, 5):
        for chosen in itertools.combinations(range(rounds), k):
            gap = min((b - a for a, b in itertools.pairwise(chosen)), default=rounds)
            for key in itertools.product(range(k, 5), range(1, gap + 1)):
                most[key] = max(most.get(key, 0), squares(rounds, chosen))
    assert most == {key: kappa(rounds, *key) for key in most}
    assert kappa(rounds, rounds) == squares(rounds, tuple(range(rounds)))
    assert kappa(1600, 5, 3) > squares(1600, (0, 3, 6, 9, 12)), "as dense and as early as possible is not the worst"


def test_the_check_value_of_the_public_accounting_notebook() -> None:
    assert kappa(2000, 6, 313) == 79
    assert round(rho := accounting.zcdp(79, 7), 3) == 0.806
    assert round(accounting.sharper_epsilon(rho, 1e-10), 2) == 8.90
    numbers: dict[str, Any] = dict(rounds=2000, delta=1e-10, participations=6, separation=313)
    assert round(epsilon("dp_ftrl", "spaced", noise_multiplier=7, **numbers), 2) == 8.90


def test_the_table_of_tree_budgets() -> None:
    rows = [(1.13, 19.74, 18.71), (2.33, 8.50, 7.83), (4.03, 4.66, 4.19), (6.21, 2.95, 2.60), (8.83, 2.04, 1.77)]
    for nm, classic, sharper in rows:
        rho = accounting.zcdp(11, nm)
        assert round(accounting.classic_epsilon(rho, 1e-6), 2) == classic
        assert round(accounting.sharper_epsilon(rho, 1e-6), 2) == sharper
        for rounds in (1024, 1600, 2047):
            library = epsilon("dp_ftrl", "spaced", noise_multiplier=nm, rounds=rounds, delta=1e-6, participations=1)
            assert library == pytest.approx(accounting.sharper_epsilon(rho, 1e-6), rel=1e-9)


def test_dp_fedavg_with_poisson_sampling_three_ways() -> None:
    for nm, stated in [(0.7, 16.2), (1.0, 7.1), (1.13, 5.6), (1.5, 3.5), (2.33, 1.9), (4.03, 1.0)]:
        library = epsilon("dp_fedavg", "poisson", noise_multiplier=nm, **FEDAVG)
        assert round(library, 1) == stated
        divergences = [1500 * accounting.poisson_divergence(100 / 3400, nm, int(order)) for order in INTEGERS]
        assert library == pytest.approx(accounting.convert(INTEGERS, np.array(divergences), DELTA), rel=1e-9)
        tighter = epsilon("dp_fedavg", "poisson", noise_multiplier=nm, accountant="pld", **FEDAVG)
        assert 0.8 * library < tighter < library


def test_a_cohort_of_fixed_size_is_accounted_for_a_replaced_client() -> None:
    # With everybody in each cohort it is the plain Gaussian mechanism of sensitivity 2 C.
    everybody = epsilon("dp_fedavg", "fixed", noise_multiplier=8, **FEDAVG | {"cohort": 3400, "rounds": 10})
    rho = 10 * accounting.zcdp(4, 8)
    assert everybody == pytest.approx(accounting.convert(INTEGERS, INTEGERS * rho, DELTA), rel=1e-9)
    fixed, poisson = (epsilon("dp_fedavg", name, noise_multiplier=4.03, **FEDAVG) for name in ("fixed", "poisson"))
    assert fixed > 2 * poisson


def test_more_noise_and_fewer_rounds_cost_less_and_no_noise_is_not_private() -> None:
    numbers = FEDAVG | {"participations": 47, "separation": 34}
    for names in accounting.NEIGHBOURS:
        few, some, more = (epsilon(*names, noise_multiplier=nm, **numbers) for nm in (1, 2, 8))
        assert few > some > more > epsilon(*names, noise_multiplier=8, **numbers | {"rounds": 40}) > 0
        assert epsilon(*names, noise_multiplier=0, **numbers) == math.inf


@pytest.mark.parametrize(
    ("mechanism", "sampler", "changes", "message"),
    [
        ("dp_ftrl", "poisson", {}, "sampler: 'poisson' is not what the accounting of dp_ftrl assumes"),
        ("dp_fedavg", "spaced", {}, "sampler: 'spaced' .* sample by 'poisson'"),
        ("dp_fedavg", "shuffled", {}, "sampler: 'shuffled' is unknown"),
        ("dp_sgd", "poisson", {}, "mechanism: 'dp_sgd' is unknown"),
        ("dp_fedavg", "fixed", {"accountant": "pld"}, "accountant: 'pld' .* take 'rdp'"),
        ("dp_fedavg", "fixed", {"cohort": 99.5}, "cohort: 99.5 must be an integer"),
        ("dp_fedavg", "poisson", {"cohort": 3401}, "cohort: 3401 must be a number from 1e-09 to 3400"),
        ("dp_fedavg", "poisson", {"clients": None}, "clients: None must be an integer"),
        ("dp_fedavg", "poisson", {"delta": None}, "delta: None, but an epsilon means nothing without"),
        ("dp_fedavg", "poisson", {"delta": 0}, "delta: 0 must be a number"),
        ("dp_fedavg", "poisson", {"noise_multiplier": -1}, "noise_multiplier: -1 must be a number"),
        ("dp_fedavg", "poisson", {"rounds": 0}, "rounds: 0 must be an integer"),
        ("dp_ftrl", "spaced", {}, "participations: None must be an integer"),
        ("dp_ftrl", "spaced", {"participations": 2}, "separation: None must be an integer"),
    ],
)
def test_what_the_accounting_does_not_cover_is_refused(
    mechanism: str, sampler: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        epsilon(mechanism, sampler, **{"noise_multiplier": 1.0} | FEDAVG | changes)


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(RunError, match="'dp_accounting'; pip install 'fedlib\\[privacy\\]' for dp-accounting"):
        epsilon("dp_fedavg", "poisson", noise_multiplier=1.0, **FEDAVG)


@pytest.mark.parametrize(
    ("clients", "cohort", "rounds", "weight"), [(4, 1, 4, 3), (4, 2, 4, 2 + 2 + 4), (3, 3, 2, 2 + 4), (5, 1, 4, 3)]
)
def test_the_weight_of_a_turn_by_hand(clients: int, cohort: int, rounds: int, weight: int) -> None:
    """One turn in four rounds: leaf, pair, all. Two, in rounds 1 and 3: two leaves, two pairs, all twice."""
    assert queue_weight(clients, cohort, rounds) == weight


def test_the_weight_of_turns_by_brute_force_and_below_kappa() -> None:
    for clients, cohort, rounds in itertools.product((1, 2, 5, 7, 12), (1, 2, 3, 5), (1, 2, 3, 6, 11, 16, 20)):
        if cohort > clients:
            continue
        most = 0
        for place in range(clients):
            turns = [t for t in range(rounds) if (place - t * cohort) % clients < cohort]
            nodes = [(level, i) for level in range(rounds.bit_length()) for i in range(rounds >> level)]
            most = max(most, sum(sum(t >> level == i for t in turns) ** 2 for level, i in nodes))
        assert queue_weight(clients, cohort, rounds) == most
        times, apart = -(-rounds * cohort // clients), clients // cohort
        assert most <= kappa(rounds, times, apart)


def test_the_weight_of_many_clients_is_found_in_parts() -> None:
    assert queue_weight(30_000, 300, 1000) == queue_weight(100, 1, 1000)
