"""Whether runs could decide a claim: a condition that fails makes it *not tested*, and says why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.results import each, where
from fedlib.claims.tuning import find_faults
from fedlib.data.sets import ENTRIES

FACTOR = 4  # local steps a round may differ from the source's by so much


def count_local_steps(runs: pd.DataFrame) -> pd.Series:
    """Steps of a mean client in a round, for each run: epochs times batches of what a mean client trains on."""
    samples = np.array([ENTRIES[name].samples for name in runs["data"]], dtype=float)
    own = samples * (1 - runs["validation"].to_numpy()) * (1 - runs["held_out"].to_numpy()) / runs["clients"].to_numpy()
    return pd.Series(runs["epochs"].to_numpy() * np.ceil(own / runs["batch"].to_numpy()), index=runs.index)


def late_gain(runs: pd.DataFrame, rounds: pd.DataFrame) -> pd.Series:
    """Mean accuracy over the last third of the evaluated rounds less that over the third before it, points, by run.

    Missing where fewer than six rounds were evaluated.
    """
    gains = {}
    for run, own in each(rounds[rounds["run"].isin(runs["run"])].dropna(subset="accuracy"), "run"):
        third = len(own) // 3
        last, before = own["accuracy"].iloc[-third:], own["accuracy"].iloc[-2 * third : -third]
        gains[run] = last.mean() - before.mean() if third >= 2 else np.nan
    return runs["run"].map(gains)


def find_unmet(
    needs: Mapping[str, Any], given: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], planned: pd.DataFrame
) -> Iterator[str]:
    """What the runs of a claim lack, one line each; see `fedlib.claims.published.Needs` for the conditions.

    given: the claim's arguments; tables: `runs` of which none is missing, and `rounds`; planned: all runs, since of a
    search some may have diverged.
    """
    against, reference = given.get("against", []), needs["reference"]
    runs = where(tables["runs"], group=given["groups"], label=[*given["labels"], *against, reference])
    dense = where(runs, label=reference)
    if steps := needs["local_steps"]:
        for group, own in each(runs, "group"):
            mean = count_local_steps(own).mean()
            if not steps / FACTOR <= mean <= steps * FACTOR:
                yield f"{group}: {mean:.0f} local steps a round, the source has {steps}"
    if needs["plateau"] is not None:
        for group, own in each(dense, "group"):
            gain = late_gain(own, tables["rounds"]).mean()
            if not gain <= needs["plateau"]:
                more = "is evaluated too rarely to tell" if np.isnan(gain) else f"still gains {gain:.1f} points"
                yield f"{group}: in the last third {reference} {more}"
    if needs["room"] is not None:
        means = runs.groupby(["group", "label"])["late_accuracy"].mean().unstack()
        lead = (means[reference] - means.reindex(columns=against).mean(axis=1)).max()
        if not lead >= needs["room"]:
            yield f"{reference} leads the others by {lead:.1f} points only, so that all need the same rounds"
    for group in given["groups"]:
        yield from find_faults(planned, group, tables["rounds"] if needs["tuned"] == "bits" else None)
