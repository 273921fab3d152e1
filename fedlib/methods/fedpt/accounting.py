"""What a run of private training spends: epsilon, by mechanism and sampler.

The noise multiplier nm is the noise's standard deviation in the sum of a cohort's updates, divided by the clipping norm
C. What a run spends is computed by the package dp-accounting.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import numpy as np

from fedlib.errors import RunError, SpecError, require_name, require_number

# What may differ between two neighbouring sets of clients, by mechanism and sampler, in the accountant's word.
NEIGHBOURS = {
    ("dp_fedavg", "poisson"): "ADD_OR_REMOVE_ONE",
    ("dp_fedavg", "fixed"): "REPLACE_ONE",
    ("dp_ftrl", "spaced"): "REPLACE_SPECIAL",  # by a client whose updates are zero
}
SAMPLERS = {
    "poisson": "each client by itself with probability cohort / clients",
    "fixed": "exactly `cohort` distinct clients, anew each round",
    "spaced": "a client at most `participations` times, at least `separation` rounds apart",
}
INTEGERS = np.array([*range(2, 64), *range(64, 257, 16)], dtype=np.float64)  # Rényi orders; others may not converge
ORDERS = 1 + np.geomspace(0.015, 1e4, 4001)  # for divergences that are linear in the order
NEVER = 2**40  # a round after all others
Nodes = dict[tuple[int, int], np.ndarray]


def epsilon(
    mechanism: str,
    sampler: str,
    *,
    noise_multiplier: float,
    rounds: int,
    delta: float | None,
    clients: int | None = None,
    cohort: float | None = None,
    participations: int | None = None,
    separation: int | None = None,
    weight: int | None = None,
    accountant: str = "rdp",
) -> float:
    """Epsilon at `delta`, an upper bound, between the neighbours that NEIGHBOURS names. It never depends on the model.

    Mechanisms: "dp_fedavg" (`private_mean`) and "dp_ftrl" (one tree, not restarted); samplers: see SAMPLERS.
    weight: kappa of the tree, where it is known exactly, in place of participations and separation.
    Accountants: "rdp", and "pld", tighter, for Poisson sampling only. "fixed": replacing a client moves the sum by 2 C.
    SpecError: a sampler for which the mechanism's accounting does not hold, a number missing or out of range.
    RunError: the package dp-accounting is missing.
    """
    require_name("mechanism", mechanism, {name for name, _ in NEIGHBOURS})
    require_name("sampler", sampler, SAMPLERS)
    require_sampler("sampler", mechanism, sampler)
    require_name("accountant", accountant, {"rdp", "pld"})
    if accountant == "pld" and sampler != "poisson":
        raise SpecError(f"accountant: 'pld' knows no event for the sampler {sampler!r}; take 'rdp'")
    require_delta("delta", delta)
    require_number("noise_multiplier", noise_multiplier, 0, 1e6)
    require_number("rounds", rounds, 1, 1e6, integer=True)
    if mechanism == "dp_fedavg":
        require_number("clients", clients, 1, 1e12, integer=True)
        require_number("cohort", cohort, 1e-9, float(clients or 0), integer=sampler == "fixed")
    elif weight is not None:
        require_number("weight", weight, 1, 1e15, integer=True)
    else:
        require_number("participations", participations, 1, 1e9, integer=True)
        if participations != 1:
            require_number("separation", separation, 1, 1e9, integer=True)
    if noise_multiplier == 0:
        return math.inf
    dp, library = package(), package(f".{accountant}")
    orders, times = (INTEGERS, rounds) if mechanism == "dp_fedavg" else (ORDERS, 1)
    if sampler == "poisson":
        event = dp.PoissonSampledDpEvent((cohort or 0) / (clients or 1), dp.GaussianDpEvent(noise_multiplier))
    elif sampler == "fixed":
        # The event takes the noise relative to the sensitivity, and that is 2 C when a client is replaced.
        event = dp.SampledWithoutReplacementDpEvent(clients, cohort, dp.GaussianDpEvent(noise_multiplier / 2))
    elif participations == 1:
        event = dp.SingleEpochTreeAggregationDpEvent(noise_multiplier, rounds)
    else:  # the library has no event for this
        weight = weight or kappa(rounds, participations or 1, separation or 1)
        event = dp.ZCDpEvent(zcdp(weight, noise_multiplier))
    relation = dp.NeighboringRelation[NEIGHBOURS[mechanism, sampler]]
    spent = library.RdpAccountant(orders, relation) if accountant == "rdp" else library.PLDAccountant(relation)
    return float(spent.compose(event, times).get_epsilon(delta))


def require_sampler(field: str, mechanism: str, sampler: str) -> None:
    """SpecError: the mechanism's accounting does not hold for the sampler."""
    if (mechanism, sampler) not in NEIGHBOURS:
        fitting = ", ".join(f"{name!r} ({SAMPLERS[name]})" for own, name in NEIGHBOURS if own == mechanism)
        raise SpecError(f"{field}: {sampler!r} is not what the accounting of {mechanism} assumes; sample by {fitting}")


def require_delta(field: str, delta: float | None) -> None:
    """SpecError: none, or one out of range."""
    if not delta:
        raise SpecError(
            f"{field}: {delta}, but an epsilon means nothing without its delta; give one, say clients ** -1.1"
        )
    require_number(field, delta, 1e-300, 1)


def package(part: str = "") -> Any:
    """The package dp-accounting, or a part of it. RunError: it is missing."""
    try:
        return importlib.import_module(f"dp_accounting{part}")
    except ModuleNotFoundError as error:
        raise RunError(
            f"epsilon: no package {error.name!r}; pip install 'fedlib[privacy]' for dp-accounting"
        ) from error


def zcdp(kappa: int, noise_multiplier: float) -> float:
    """rho of zero-concentrated privacy; the Rényi divergence at order a is a rho (Bun, Steinke 2016)."""
    return kappa / (2 * noise_multiplier**2)


# The most that one client can weigh in a binary tree over rounds, the noise of DP-FTRL (Kairouz et al. 2021)


@functools.lru_cache(maxsize=64)
def kappa(rounds: int, participations: int = 1, separation: int = 1) -> int:
    """Squared sensitivity of the tree over C^2: the largest possible sum, over its complete nodes, of (a client's
    participations there)^2, if it takes part at most so often and at least `separation` rounds apart.

    Exact. It takes seconds where a client may take part in every tenth of 1600 rounds, and far longer at a smaller
    separation. For one participation it is floor(log2 rounds) + 1.
    """
    if separation == 1 and participations >= rounds:  # in every round
        return sum((rounds >> level) << 2 * level for level in range(rounds.bit_length()))
    # By participations n in a node and value v there: the first round, from the node's start, in which the client may
    # take part afterwards, at the place a if it might not before round a. `first` is for nodes that begin with round 0.
    node: Nodes = {(0, 0): np.arange(2), (1, 1): np.array([separation, NEVER])}
    first: Nodes = {key: value[:1] for key, value in node.items()}
    nodes, size = [node], 1
    while 2 * size <= rounds:
        first = _join(first, node, size, size, participations, 1)
        if 4 * size <= rounds:
            longer = {key: np.append(value, np.full(size, NEVER)) for key, value in node.items()}
            node = _join({**longer, (0, 0): np.arange(2 * size + 1)}, node, size, size, participations, 1)
        nodes.append(node)
        size *= 2
    done = size
    for level in reversed(range(len(nodes) - 1)):
        if rounds >> level & 1:
            first = _join(first, nodes[level], done, 2**level, participations, 0)
            done += 2**level
    return max(value for _, value in first)


def queue_weight(clients: int, cohort: int, rounds: int) -> int:
    """As `kappa`, for clients that take turns in a fixed order, `cohort` a round: the most that any place weighs."""
    most = 0
    for places in np.array_split(np.arange(clients), -(-clients * rounds // 10**7)):
        takes_part = (places[:, None] - cohort * np.arange(rounds)) % clients < cohort
        weight = np.zeros(len(places), dtype=np.int64)
        for level in range(rounds.bit_length()):
            nodes = takes_part[:, : rounds >> level << level].reshape(len(places), -1, 1 << level)
            weight += np.square(nodes.sum(axis=2)).sum(axis=1)
        most = max(most, int(weight.max()))
    return most


def _join(left: Nodes, right: Nodes, offset: int, size: int, most: int, closes: int) -> Nodes:
    """Both side by side; if it closes, as children of one node."""
    found: Nodes = {}
    for (n, v), free in left.items():
        options = [(n, v, free)]
        start = (free - offset).clip(0, size)
        options += [(n + m, v + w, then[start] + offset) for (m, w), then in right.items() if 0 < m <= most - n]
        for m, w, then in options:
            key = m, w + closes * m * m
            found[key] = np.minimum(found.get(key, NEVER), then)
    kept: Nodes = {}
    best: dict[int, Any] = {}
    for n, v in sorted(found, reverse=True):  # a higher value first; a lower one only where it leaves more room
        if np.any(found[n, v] < best.get(n, NEVER)):
            kept[n, v] = found[n, v]
            best[n] = np.minimum(best.get(n, NEVER), found[n, v])
    return kept
