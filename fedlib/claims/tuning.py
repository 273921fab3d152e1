"""Settings found by a search: which runs search for whom, what they found, and whether the reported runs use it.

A group `tune-G` or `tune-G-anything` searches for the runs of group G with the same labels. It evaluates on a share of
the training data that no client has (`validation`), by seeds that group G does not use.

A search is made for accuracy; or for bits, where a claim says that these are saved: what is judged was searched for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.results import LATE, each, where
from fedlib.claims.targets import DENSE, SHARE, reach
from fedlib.errors import SpecError
from fedlib.methods.registry import METHODS
from fedlib.runs.spec import TUNING

SEARCHED = ("accuracy", "bits")
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


def weigh(runs: pd.DataFrame, group: str, rounds: pd.DataFrame | None = None) -> pd.DataFrame:
    """The runs that search for a group and did not diverge, with what they are judged by, larger is better.

    Columns `reaches`, `saves` and `late_accuracy`, of which the first that differ decide. Without rounds the first two
    are 0: accuracy decides. With them a run `reaches` the target, `SHARE` of the best validation accuracy that FedAvg
    has in the search with that seed, and `saves` the less the more bits it uploads until then. FedAvg, which sets the
    target, is judged by its accuracy, and so is a run that misses it.
    """
    found = searched(runs, group).dropna(subset=LATE).assign(reaches=0.0, saves=0.0)
    if rounds is None or found.empty:
        return found
    dense = found["label"] == DENSE
    best = found["run"].map(rounds.groupby("run")["accuracy"].max()).where(dense)
    spent = reach(found, rounds, SHARE * best.groupby([found["split"], found["seed"]]).transform("max"))
    there = spent["ever"] & ~dense
    return found.assign(reaches=there.astype(float), saves=-spent["bits"].where(there, 0.0))


def take_winners(runs: pd.DataFrame, group: str, rounds: pd.DataFrame | None = None) -> pd.DataFrame:
    """What the search for a group found: a row for each method and each setting that its search varied.

    Columns: `label`, `axis` (the setting), `value`, `edge` (whether the value is the first or last of a grid of
    numbers), `runs` (how many the method's search has). The point with the best means over the search's seeds wins, by
    accuracy or, where rounds are given, by bits (see `weigh`); one at which a run diverged never does, and a method
    without a single finished point is left out. The least integer that a setting may be is no edge.
    """
    rows, weights = [], weigh(runs, group, rounds)
    for label, own in each(searched(runs, group), "label"):
        axes, means = name_axes(own), {}
        for place, point in each(own, *axes) if axes else ():
            if point[LATE].notna().all():
                means[place] = tuple(weights.loc[point.index, ["reaches", "saves", LATE]].mean())
        if not means:
            continue
        best = max(means, key=lambda place: means[place])
        for axis, value in zip(axes, best if len(axes) > 1 else [best], strict=True):
            grid = sorted(other for other in own[axis].unique() if isinstance(other, int | float))
            edge = value in grid[-1:] or (value in grid[:1] and not _is_least(own, axis, value))
            rows.append({"label": label, "axis": axis, "value": value, "edge": edge, "runs": len(own)})
    return pd.DataFrame(rows, columns=["label", "axis", "value", "edge", "runs"])


def _is_least(runs: pd.DataFrame, axis: str, value: Any) -> bool:
    """Whether a setting of the runs' method may not be less than this integer."""
    method = METHODS.get(runs["method"].iloc[0]) if "method" in runs and isinstance(value, int) else None
    fields = {f"hyper.{field.name}": field for field in dataclasses.fields(method)} if method else {}
    try:
        if axis in fields:
            fields[axis].metadata["check"](axis, value - 1)
    except SpecError:
        return True
    return False


def find_faults(runs: pd.DataFrame, group: str, rounds: pd.DataFrame | None = None) -> Iterator[str]:
    """What forbids a verdict on a group for whose methods a search was made: one line a fault. rounds: see `weigh`."""
    winners, reported, search = take_winners(runs, group, rounds), where(runs, group=group), searched(runs, group)
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
