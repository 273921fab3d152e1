"""Accounting of private training, and the tree's sensitivity: property 15 of FedPT's specification."""

import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest

from fedlib.errors import RunError, SpecError
from fedlib.methods.fedpt import accounting
from fedlib.methods.fedpt.accounting import INTEGERS, epsilon, kappa, queue_weight
from fedlib.theory import fedpt as theory

DELTA = 3400**-1.1
FEDAVG: dict[str, Any] = dict(rounds=1500, delta=DELTA, clients=3400, cohort=100)


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
