"""What the search for settings tried, and what it took: the same number of runs for each method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.results import FRESH, each, where
from fedlib.claims.tuning import name_axes, searched, take_winners
from fedlib.pages.exhibit import Exhibit, table


def tuning_table(planned: pd.DataFrame, group: str, name: str) -> Exhibit:
    """Validation accuracy at each point that was tried for the methods of a group: a row a value of a method's own
    setting, and its learning rates in ascending order, with an asterisk at the point taken.

    planned: also the runs that diverged, and so have no record; they have a dash.
    """
    own, winners, rows, numbers = searched(planned, group), take_winners(planned, group), [], []
    for label, runs in each(own, "label"):
        taken = {r["axis"]: r["value"] for r in where(winners, label=label).to_dict("records")}
        axes = [axis for axis in name_axes(runs) if axis != "lr"]
        runs = runs.sort_values([*axes, "lr"])
        for _, part in each(runs, *axes) if axes else [((), runs)]:
            cells, setting = [], {axis.removeprefix("hyper."): part[axis].iloc[0] for axis in axes}
            for r in part.to_dict("records"):
                chosen = all(r[axis] == value for axis, value in taken.items())
                cell = "–" if np.isnan(r["late_accuracy"]) else f"{r['late_accuracy']:.1f}" + "*" * chosen
                cells.append(f"{r['lr']:g}: {cell}")
                numbers.append({"method": label, "lr": r["lr"]} | setting | {"accuracy": r["late_accuracy"]})
            told = ", ".join(f"{name} {value}" for name, value in setting.items())
            row: dict[str, Any] = {"method": label, "runs": len(runs), "its own setting": told or "–"}
            rows.append(row | {"learning rate: accuracy (%)": ", ".join(cells)})
    caption = (
        "What was searched: accuracy on images that no client trains on, in the mean over the last quarter of the "
        "rounds; an asterisk: taken; a dash: diverged."
    )
    return table(pd.DataFrame(rows), caption, name, where(own, state=FRESH), pd.DataFrame(numbers))


def list_edges(planned: pd.DataFrame, group: str) -> list[str]:
    """Methods for which the search took the first or the last value of a grid, with the setting and this value."""
    edges = where(take_winners(planned, group), edge=True)
    return [f"{r['label']} ({r['axis'].removeprefix('hyper.')} {r['value']:g})" for r in edges.to_dict("records")]
