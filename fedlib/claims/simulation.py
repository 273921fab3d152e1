"""How often the rules of `fedlib.claims.verdicts` err: verdicts on simulated values whose truth is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from fedlib.claims.verdicts import VERDICTS, Band, Evidence, judge, mean_interval


def simulate(values: pd.DataFrame, effect: float, rng: np.random.Generator) -> pd.DataFrame:
    """Normal values of the same cases and seeds whose true mean is `effect` in every case, with the given ones' spread.

    A value is the effect, plus what its seed does to all cases, plus what it does to this one; the deviations of both
    are those of `values`.
    """
    n, k = values.shape
    residuals = (values - values.mean()).to_numpy()
    seeds = residuals.mean(axis=1, keepdims=True)
    rest = rng.normal(0, np.sqrt(((residuals - seeds) ** 2).sum() / max(1, (n - 1) * (k - 1))), (n, k))
    shared = rng.normal(0, np.sqrt((seeds**2).sum() / (n - 1)), (n, 1))
    return pd.DataFrame(effect + shared + rest - rest.mean(axis=1, keepdims=True), values.index, values.columns)


def rate_of_verdicts(
    values: pd.DataFrame, quantifier: str, band: Band, effect: float, repetitions: int, rng: np.random.Generator
) -> dict[str, float]:
    """Percent of simulated repetitions that end with each verdict, where `effect` is true in every case."""
    counts = Counter(
        judge(quantifier, [Evidence(simulate(values, effect, rng), band)]).verdict for _ in range(repetitions)
    )
    return {verdict: 100 * counts[verdict] / repetitions for verdict in VERDICTS}


def coverage(values: pd.DataFrame, repetitions: int, rng: np.random.Generator) -> float:
    """Percent of simulated repetitions in which the interval of the mean over cases covers the truth."""
    covered = 0
    for _ in range(repetitions):
        interval = mean_interval(simulate(values, 0.0, rng).to_numpy().mean(axis=1).tolist())
        covered += interval.low <= 0 <= interval.high
    return 100 * covered / repetitions


def table(
    spread: Mapping[str, pd.DataFrame],
    criteria: Mapping[str, tuple[str, Band]],
    effects: Sequence[float],
    repetitions: int,
) -> pd.DataFrame:
    """A row for each claim and true effect: the percent of each verdict, and the coverage of the claim's interval.

    spread: the measured values of each claim, of two seeds at least; criteria: its quantifier and band.
    """
    rng = np.random.default_rng(20261130)
    rows = []
    for claim, values in spread.items():
        covered = coverage(values, repetitions, rng)
        for effect in effects:
            rates = rate_of_verdicts(values, *criteria[claim], effect, repetitions, rng)
            rows.append({"claim": claim, "cases": values.shape[1], "effect": effect, **rates, "coverage": covered})
    return pd.DataFrame(rows, columns=["claim", "cases", "effect", *VERDICTS, "coverage"])
