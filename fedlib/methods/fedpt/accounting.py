"""What a run of private training spends: epsilon, by mechanism and sampler.

The noise multiplier nm is the noise's standard deviation in the sum of a cohort's updates, divided by the clipping norm
C. What a run spends is computed by the package dp-accounting; the short formulas below it check the package and serve
the book.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

from fedlib.errors import RunError, SpecError, require_name, require_number
from fedlib.methods.fedpt.tree_sensitivity import kappa

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
    if (mechanism, sampler) not in NEIGHBOURS:
        fitting = ", ".join(f"{name!r} ({SAMPLERS[name]})" for own, name in NEIGHBOURS if own == mechanism)
        raise SpecError(f"sampler: {sampler!r} is not what the accounting of {mechanism} assumes; sample by {fitting}")
    require_name("accountant", accountant, {"rdp", "pld"})
    if accountant == "pld" and sampler != "poisson":
        raise SpecError(f"accountant: 'pld' knows no event for the sampler {sampler!r}; take 'rdp'")
    if delta is None:
        raise SpecError("delta: None, but an epsilon means nothing without its delta; give one, say clients ** -1.1")
    require_number("delta", delta, 1e-300, 1)
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


def package(part: str = "") -> Any:
    """The package dp-accounting, or a part of it. RunError: it is missing."""
    try:
        return importlib.import_module(f"dp_accounting{part}")
    except ModuleNotFoundError as error:
        raise RunError(
            f"epsilon: no package {error.name!r}; pip install 'fedlib[privacy]' for dp-accounting"
        ) from error


# The formulas


def convert(orders: np.ndarray, divergences: np.ndarray, delta: float) -> float:
    """Epsilon from Rényi divergences at orders above 1 (Canonne, Kamath, Steinke 2020, proposition 12)."""
    bounds = divergences + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(bounds.min()))


def zcdp(kappa: int, noise_multiplier: float) -> float:
    """rho of zero-concentrated privacy; the Rényi divergence at order a is a rho (Bun, Steinke 2016)."""
    return kappa / (2 * noise_multiplier**2)


def classic_epsilon(rho: float, delta: float) -> float:
    """Epsilon of rho-zCDP by Bun and Steinke's proposition 1.3."""
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def sharper_epsilon(rho: float, delta: float) -> float:
    """Epsilon of rho-zCDP by `convert`."""
    return convert(ORDERS, ORDERS * rho, delta)


def poisson_divergence(rate: float, noise_multiplier: float, order: int) -> float:
    """Rényi divergence, of a whole order, of one round with Poisson sampling (Mironov, Talwar, Zhang 2019)."""
    k = np.arange(order + 1)
    logs = [math.lgamma(order + 1) - math.lgamma(j + 1) - math.lgamma(order - j + 1) for j in range(order + 1)]
    terms = logs + k * math.log(rate) + (order - k) * math.log1p(-rate) + k * (k - 1) / (2 * noise_multiplier**2)
    return float(np.logaddexp.reduce(terms)) / (order - 1)
