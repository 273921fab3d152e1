"""What the search for settings tried, and what it took: the same number of runs for each method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.results import FRESH, each, list_columns, where
from fedlib.pages.exhibit import Exhibit, table
from fedlib.pages.page import Page


def select_tuning(page: Page) -> pd.DataFrame:
    """All planned runs that search settings, also those that diverged and so have no record."""
    return page.planned[page.planned["group"].str.startswith("tune-")]


def find_setting(runs: pd.DataFrame) -> str:
    """The column beside lr that a method's tuning runs differ in: "momentum", or one of its settings."""
    names = (*list_columns(runs, "hyper."), "momentum")
    return next(name for name in names if runs[name].astype("str").nunique() > 1)


def take_tuned(runs: pd.DataFrame) -> pd.Series:
    """Of a method's tuning runs the most accurate; of equals the first."""
    return runs.iloc[int(runs["accuracy"].argmax())]


def list_edges(planned: pd.DataFrame) -> list[str]:
    """The methods of which a run at the least or the largest learning rate was taken."""
    edges = []
    for label, own in each(planned, "label"):
        done = where(own, state=FRESH)
        if len(done) and take_tuned(done)["lr"] in (own["lr"].min(), own["lr"].max()):
            edges.append(label)
    return edges


def tuning_table(planned: pd.DataFrame, name: str) -> Exhibit:
    """Final accuracy at each point of the methods' grids: a row a value of a method's own setting, a column a rate.

    A run without a fresh record is shown as one that diverged; a method without any is left out.
    """
    done, rows, numbers = where(planned, state=FRESH), [], []
    rates = sorted(planned["lr"].unique())
    for label, own in each(where(planned, label=set(done["label"])), "label"):
        setting, best = find_setting(own), take_tuned(where(own, state=FRESH))["run"]
        for value, part in each(own, setting):
            row: dict[str, Any] = {"method, its own setting": f"{label}, {setting.removeprefix('hyper.')} {value}"}
            row |= {f"lr {rate:g}": "" for rate in rates}
            for r in part.to_dict("records"):
                accuracy = r["accuracy"] if r["state"] == FRESH else np.nan
                cell = "–" if np.isnan(accuracy) else f"{accuracy:.1f}" + "*" * (r["run"] == best)
                row[f"lr {r['lr']:g}"] = cell
                point = {"method": label, "lr": r["lr"], "setting": setting, "value": value}
                numbers.append(point | {"accuracy": accuracy})
            rows.append(row)
    caption = (
        "Tuning: final test accuracy (%) at each learning rate (lr) and value of the method's own setting; * marks the "
        f"run taken{', – a run that diverged' * (len(done) < len(planned))}."
    )
    return table(pd.DataFrame(rows), caption, name, done, pd.DataFrame(numbers))
