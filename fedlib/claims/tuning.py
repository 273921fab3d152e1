"""Settings found by a search: which runs search for whom, what they found, and whether the reported runs use it.

A group `tune-G` or `tune-G-anything` searches for the runs of group G with the same labels. It evaluates on a share of
the training data that no client has (`validation`), by seeds that group G does not use.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from fedlib.claims.results import each, where
from fedlib.runs.spec import TUNING

# What a search may vary beside a method's own settings.
SWEPT = ("lr", "epochs", "batch", "optimizer", "momentum", "persistent", "frozen")


def searched(runs: pd.DataFrame, group: str) -> pd.DataFrame:
    """The runs that search for settings of a group."""
    own = [name == TUNING + group or name.startswith(f"{TUNING}{group}-") for name in runs["group"]]
    return runs[np.array(own, dtype=bool)]


def name_axes(own: pd.DataFrame) -> list[str]:
    """The settings whose values differ among a method's searching runs."""
    settings = [str(name) for name in own if name in SWEPT or str(name).startswith("hyper.")]
    return [name for name in settings if own[name].map(repr).nunique() > 1]


def take_winners(runs: pd.DataFrame, group: str) -> pd.DataFrame:
    """What the search for a group found: a row for each method and each setting that its search varied.

    Columns: `label`, `axis` (the setting), `value`, `edge` (whether the value is the first or last of a grid of
    numbers), `runs` (how many the method's search has). The point with the best mean validation accuracy over the
    search's seeds wins; one at which a run diverged never does. A method without a single finished point is left out.
    """
    rows = []
    for label, own in each(searched(runs, group), "label"):
        axes = name_axes(own)
        means = [(point["accuracy"].mean(skipna=False), place) for place, point in each(own, *axes)] if axes else []
        finished = [(mean, place) for mean, place in means if not np.isnan(mean)]
        if not finished:
            continue
        best = max(finished, key=lambda pair: pair[0])[1]
        for axis, value in zip(axes, best if len(axes) > 1 else [best], strict=True):
            grid = sorted(other for other in own[axis].unique() if isinstance(other, int | float))
            edge = value in (grid[0], grid[-1]) if grid else False
            rows.append({"label": label, "axis": axis, "value": value, "edge": edge, "runs": len(own)})
    return pd.DataFrame(rows, columns=["label", "axis", "value", "edge", "runs"])


def find_faults(runs: pd.DataFrame, group: str) -> Iterator[str]:
    """What forbids a verdict on a group for whose methods a search was made: one line a fault."""
    winners, reported, search = take_winners(runs, group), where(runs, group=group), searched(runs, group)
    if len(search) and not (search["validation"] > 0).all():
        yield f"{group}: its search is judged by the test images; set validation"
    for label in sorted(set(reported["label"]) - set(winners["label"])) if len(search) else ():
        yield f"{group}: no search was made for {label}"
    for row in winners.to_dict("records"):
        label, axis, value = row["label"], row["axis"], row["value"]
        if not (where(reported, label=label)[axis] == value).all():
            yield f"{group}: {label} runs with another {axis} than its search found ({value})"
        if row["edge"]:
            yield f"{group}: {label}: {axis} {value} lies at an edge of its grid"
    if winners["runs"].nunique() > 1:
        least = min(winners.to_dict("records"), key=lambda row: row["runs"])
        yield f"{group}: budgets of the search differ: {least['label']} has {least['runs']} runs, another more"
    seeds = set(search["seed"]) & set(reported["seed"])
    if seeds:
        yield f"{group}: seed {min(seeds)} serves the search and the report"
