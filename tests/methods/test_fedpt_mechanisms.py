"""Clipping, noise and accounting of private training: properties 9 to 15 of FedPT's specification."""

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlib.errors import PayloadError, RunError, SpecError
from fedlib.methods.fedpt import accounting, mechanisms
from fedlib.methods.fedpt.accounting import INTEGERS, epsilon, kappa, queue_weight
from fedlib.methods.fedpt.mechanisms import ftrl_start, ftrl_step, tree_nodes, tree_noise
from fedlib.rng import Rng
from fedlib.theory import fedpt as theory

SHAPES = {"kernel": torch.Size((3, 4)), "bias": torch.Size((5,)), "scale": torch.Size(())}
SCALES = [10.0**exponent for exponent in range(-12, 13)]
SIZE = 200_000  # entries of a statistical test; five standard errors are allowed each time
DELTA = 3400**-1.1
FEDAVG: dict[str, Any] = dict(rounds=1500, delta=DELTA, clients=3400, cohort=100)


def update(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def assert_variance(draws: Tensor, variance: float) -> None:
    """Chi-square: the sum of squares over the variance has mean n and variance 2 n."""
    n = draws.numel()
    assert abs(float(draws.double().square().sum()) / variance - n) < 5 * math.sqrt(2 * n)
    assert abs(float(draws.double().mean())) < 5 * math.sqrt(variance / n)


def assert_uncorrelated(one: Tensor, other: Tensor) -> None:
    both = torch.corrcoef(torch.stack([one.double(), other.double()]))
    assert abs(float(both[0, 1])) < 5 / math.sqrt(one.numel())


# Properties 9 and 10: clipping, which bounds what a client can move


@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.0, *SCALES]), bound=st.floats(1e-6, 1e6))
def test_a_clipped_update_has_at_most_the_bound_and_its_old_direction(seed: int, scale: float, bound: float) -> None:
    """The norm is joint over all tensors."""
    plain = update(seed, scale)
    clipped, before = mechanisms.clip(plain, bound)
    assert before == pytest.approx(norm(plain), rel=1e-9)
    assert norm(clipped) <= bound * (1 + 1e-6)
    factor = 1 if before <= bound else bound / before
    torch.testing.assert_close(clipped, {name: plain[name] * factor for name in SHAPES}, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(PayloadError, match="norm"):
        mechanisms.clip({"a": torch.ones(2), "b": torch.tensor([0.0, bad])}, 1.0)


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


def test_flat_and_named_tensors_are_each_other_s_inverse() -> None:
    torch.testing.assert_close(mechanisms.unflatten(mechanisms.flatten(update(5)), SHAPES), update(5), rtol=0, atol=0)


# Property 13: the noise of the tree


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


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_without_noise_ftrl_is_momentum_sgd_to_the_last_bit(momentum: float) -> None:
    # Halves and small integers: every float operation is exact, whatever its order.
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(-8, 8, (50,), generator=generator).float()
    plain = start.clone().requires_grad_()
    sgd = torch.optim.SGD([plain], lr=0.25, momentum=momentum)
    state = ftrl_start(start)
    for _ in range(12):
        gradient = torch.randint(-8, 8, (50,), generator=generator).float()
        plain.grad = gradient.clone()
        sgd.step()
        state, point = ftrl_step(state, gradient, 0.0, lr=0.25, momentum=momentum)
        assert torch.equal(point, plain.detach())
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


# Property 15: the weight of a client in the tree, and what is spent


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
    assert round(theory.sharper_epsilon(rho, 1e-10), 2) == 8.90
    numbers: dict[str, Any] = dict(rounds=2000, delta=1e-10, participations=6, separation=313)
    assert round(epsilon("dp_ftrl", "spaced", noise_multiplier=7, **numbers), 2) == 8.90


def test_the_table_of_tree_budgets() -> None:
    rows = [(1.13, 19.74, 18.71), (2.33, 8.50, 7.83), (4.03, 4.66, 4.19), (6.21, 2.95, 2.60), (8.83, 2.04, 1.77)]
    for nm, classic, sharper in rows:
        rho = accounting.zcdp(11, nm)
        assert round(theory.classic_epsilon(rho, 1e-6), 2) == classic
        assert round(theory.sharper_epsilon(rho, 1e-6), 2) == sharper
        for rounds in (1024, 1600, 2047):
            library = epsilon("dp_ftrl", "spaced", noise_multiplier=nm, rounds=rounds, delta=1e-6, participations=1)
            assert library == pytest.approx(theory.sharper_epsilon(rho, 1e-6), rel=1e-9)


def test_dp_fedavg_with_poisson_sampling_three_ways() -> None:
    for nm, stated in [(0.7, 16.2), (1.0, 7.1), (1.13, 5.6), (1.5, 3.5), (2.33, 1.9), (4.03, 1.0)]:
        library = epsilon("dp_fedavg", "poisson", noise_multiplier=nm, **FEDAVG)
        assert round(library, 1) == stated
        divergences = [1500 * theory.poisson_divergence(100 / 3400, nm, int(order)) for order in INTEGERS]
        assert library == pytest.approx(theory.convert(INTEGERS, np.array(divergences), DELTA), rel=1e-9)
        tighter = epsilon("dp_fedavg", "poisson", noise_multiplier=nm, accountant="pld", **FEDAVG)
        assert 0.8 * library < tighter < library


def test_a_cohort_of_fixed_size_is_accounted_for_a_replaced_client() -> None:
    # With everybody in each cohort it is the plain Gaussian mechanism of sensitivity 2 C.
    everybody = epsilon("dp_fedavg", "fixed", noise_multiplier=8, **FEDAVG | {"cohort": 3400, "rounds": 10})
    rho = 10 * accounting.zcdp(4, 8)
    assert everybody == pytest.approx(theory.convert(INTEGERS, INTEGERS * rho, DELTA), rel=1e-9)
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
        ("dp_fedavg", "poisson", {"delta": 2}, "delta: 2 must be a number"),
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


def test_the_weight_of_turns_by_brute_force_and_below_kappa() -> None:
    for clients, cohort, rounds in itertools.product((1, 2, 3, 4, 5, 7, 12), (1, 2, 3, 5), (1, 2, 3, 4, 6, 11, 16, 20)):
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
