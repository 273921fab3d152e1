"""Tables and numbers on what it takes to reach an accuracy, for the pages of FedDQ and compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from fedlib.claims.results import each, where
from fedlib.claims.targets import PLACE, reach, save, set_targets
from fedlib.claims.verdicts import mean_interval
from fedlib.pages import scorecard
from fedlib.pages.comparison import BOTH, UP
from fedlib.pages.exhibit import Exhibit, spread, table
from fedlib.pages.page import NOT_RUN, Page

RIVALS = {  # of FedDQ, by the group of runs in which it meets them
    "main": ("ascending", "ascending-norm", "ascending-buckets", "fixed"),
    "given": ("fixed-8", "feddq-guide"),
}


def cost_table(runs: pd.DataFrame, rounds: pd.DataFrame, goals: Sequence[float], name: str) -> Exhibit:
    """MB, uploaded and both ways, until a method first reaches each accuracy (%), at the rounds that were evaluated."""
    rows, numbers = [], []
    for label, own in each(runs, "label"):
        row: dict[str, Any] = {"method": label}
        for goal in goals:
            spent = reach(own, rounds, goal)
            missed = (~spent["ever"]).sum()
            note = f" ({missed} of {len(own)} missed it)" if missed else ""
            for way, column in ((UP, "megabytes"), (BOTH, "both ways")):
                cell = f"{'≥ ' if missed else ''}{spent[column].mean():.2f}"
                row[f"{goal:g} %, {way}"] = "not reached" if missed == len(own) else cell + note * (way == UP)
                numbers.append(
                    pd.DataFrame(
                        {"method": label, "target": goal, "seed": own["seed"], "way": way}
                        | {"reached": spent["ever"], "MB": spent[column]}
                    )
                )
        rows.append(row)
    caption = (
        "MB of all clients until the test accuracy was first reached, mean over seeds; one that missed it counts with "
        "its whole run, so that the mean is a lower bound (≥)."
    )
    return table(pd.DataFrame(rows), caption, name, runs, pd.concat(numbers, ignore_index=True))


def saving_table(runs: pd.DataFrame, rounds: pd.DataFrame, caption: str, against: str) -> Exhibit:
    """A row a group, partition and method: what it takes to reach 99 % of FedAvg's best accuracy; saved over another.

    A method reaches the target when it does with every seed; otherwise the table says with how many.
    """
    spent = list_spent(runs, rounds)
    saved = {quantity: list_savings(spent, against, quantity) for quantity in ("rounds", "bits")}
    rows, numbers = [], []
    for (group, split, label), own in each(spent, "group", "split", "label"):
        reached = own["ever"].sum()
        row = {"group": group, "partition": split, "target (%)": f"{own['target'].mean():.1f}", "method": label}
        for column, head, unit in (("rounds", "rounds", 1), ("bits", "Mbit", 1e6), ("megabytes", "MB measured", 1)):
            row[head] = spread(own[column] / unit, ".3g") if reached == len(own) else "not reached"
        row["seeds that reach it"] = f"{reached} of {len(own)}"
        for quantity, values in saved.items():
            there = values[own.index].dropna()
            cell = spread(there, ",.0f") if len(there) and reached == len(own) else "–"
            row[f"{quantity} saved over {against} (%)"] = cell
        rows.append(row)
        numbers.append(own.sort_values("seed"))
    columns = ["group", "split", "label", "seed", "ever", "rounds", "bits", "megabytes"]
    points = pd.concat(numbers)[columns].rename(columns={"split": "partition", "label": "method"})
    return table(pd.DataFrame(rows), caption, "targets", runs, points)


def list_spent(runs: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """A row a run: group, split, label, seed, its target, and the columns of `reach`."""
    goals = set_targets(runs, rounds)
    frame = runs[["group", "split", "label", "seed"]].assign(target=goals)
    return frame.join(reach(runs, rounds, goals))


def list_savings(spent: pd.DataFrame, against: str, quantity: str) -> pd.Series:
    """Percent that each run saves over the run of another label with its group, partition and seed; NaN without one."""
    other = where(spent, label=against).set_index(PLACE)
    theirs = other.reindex(pd.MultiIndex.from_frame(spent[PLACE]))
    return pd.Series(save(spent, theirs, quantity), spent.index)


def quote_savings(page: Page) -> dict[str, str]:
    """Percent of each other method's bits and rounds that FedDQ saves until the target, with its interval."""
    spent = list_spent(page.select("main", "given"), page.rounds)
    numbers: dict[str, str] = {}
    for group, others in RIVALS.items():
        for other in others:
            for quantity in ("bits", "rounds"):
                mine = where(spent, group=group, label="feddq")
                values = list_savings(spent, other, quantity)[mine.index].dropna()
                told = scorecard.tell(mean_interval(list(values))) if len(values) > 1 else NOT_RUN
                numbers[f"{group}-saves-{quantity}-{other}"] = told
    return numbers
