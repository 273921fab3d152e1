"""Tables and heat maps that set many methods or settings side by side: a cell is a mean over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.results import DEFAULT, each, join_rounds, list_columns, where
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, draw_point, drawn, spread, table

Cells = dict[str, Callable[[pd.DataFrame], Any]]  # what a column shows of the runs of a row


def summarize(
    runs: pd.DataFrame,
    by: Mapping[str, str],
    cells: Cells,
    caption: str,
    name: str,
    numbers: pd.DataFrame | None = None,
) -> Exhibit:
    """A row for all runs that agree in the columns `by`, in order of appearance: their values, then the cells.

    by: the table's heads by the columns of `runs`. numbers: the CSV, where it says more than the cells.
    """
    rows = []
    for _, own in each(runs, *by):
        row = {head: own[column].iloc[0] for column, head in by.items()}
        rows.append(row | {head: cell(own) for head, cell in cells.items()})
    return table(pd.DataFrame(rows), caption, name, runs, numbers)


def average(column: str, form: str = ",.0f", times: float = 1) -> Callable[[pd.DataFrame], str]:
    """A cell: the mean of a column."""
    return lambda own: f"{times * own[column].mean():{form}}"


def deviate(column: str, form: str = ".1f") -> Callable[[pd.DataFrame], str]:
    """A cell: mean and sample deviation of a column."""
    return lambda own: spread(own[column], form)


def accuracy_table(runs: pd.DataFrame) -> Exhibit:
    """Final test accuracy per method, partition and rate: mean, sample deviation, and each seed's value."""
    cells: Cells = {
        "mean (%)": average("accuracy", ".2f"),
        "deviation": lambda own: f"{own['accuracy'].std():.2f}" if len(own) > 1 else "single seed",
        "each seed (%)": lambda own: ", ".join(f"{value:.2f}" for value in own.sort_values("seed")["accuracy"]),
    }
    runs = runs.assign(rate=[f"{lr:g}" for lr in runs["lr"]])
    by = {"label": "method", "split": "partition", "rate": "lr"}
    return summarize(runs, by, cells, "Test accuracy after the last round.", "accuracy")


def payload_table(runs: pd.DataFrame, expected: Mapping[str, Mapping[str, int]] | None = None) -> Exhibit:
    """Measured bytes of one mean upload, part by part, beside what the specification works out where it does."""
    rows = []
    for label, own in each(runs, "label"):
        first = own.iloc[0]
        for column in sorted(list_columns(own, "part."), key=lambda column: column == "part.container"):
            part = column.removeprefix("part.")
            worked = (expected or {}).get(label, {}).get(part)
            row = {"method": label, "part": part, "measured bytes": f"{first[column] / first['uploads']:,.0f}"}
            rows.append(row | {"worked out": "–" if worked is None else f"{worked:,}"})
        row = {"method": label, "part": "whole upload", "measured bytes": f"{first['upload_bytes']:,.0f}"}
        rows.append(row | {"worked out": "–"})
    caption = "Bytes of one upload, measured on the messages that were sent."
    return table(pd.DataFrame(rows), caption, "payload", runs)


def method_table(runs: pd.DataFrame, name: str, columns: str = "split") -> Exhibit:
    """A row a method, a column a partition (or another field): accuracy; measured upload."""
    several = runs["lr"].nunique() > 1
    tuned = "each method at the learning rate in brackets" if several else "one learning rate"
    heads = [value if columns == "split" else f"{columns}: {value}" for value in runs[columns]]
    chosen = runs.assign(column=heads, definition=runs["paper_bits"] / runs["uploads"] / runs["weights"])
    chosen = chosen.assign(measured=8 * chosen["upload_bytes"] / chosen["weights"])

    def show(head: str) -> Callable[[pd.DataFrame], str]:
        def cell(own: pd.DataFrame) -> str:
            there = where(own, column=head)
            rate = f" (lr {there['lr'].iloc[0]:g})" if several and len(there) else ""
            return f"{spread(there['accuracy'])}{rate}" if len(there) else "–"

        return cell

    cells = {head: show(head) for head in dict.fromkeys(heads)} | {"bytes an upload": average("upload_bytes")}
    cells |= {"bits a weight": average("measured", ".2f"), "by definition": average("definition", ".2f")}
    caption = (
        f"Test accuracy (%) after the last round, mean and sample deviation over seeds, {tuned}; bytes and bits of a "
        "mean upload, over all columns and with all its parts, as measured, and the bits a weight that the method's "
        "definition counts."
    )
    order = chosen.set_index("label", drop=False).loc[chosen["label"].unique()]
    numbers = order[["label", "column", "seed", "lr", "accuracy"]].rename(columns={"label": "method"})
    return summarize(chosen, {"label": "method"}, cells, caption, name, numbers)


def heat_map(runs: pd.DataFrame, rows: str, columns: str, panels: str, name: str, what: str) -> Exhibit:
    """Mean final accuracy by three columns ("lr", "label", "hyper.magnitude" ...); a panel a value of the third."""
    frame = runs[[rows, columns, panels, "seed", "accuracy"]].infer_objects()
    titles, names = list(frame[panels].unique()), list(frame[rows].unique())
    figure, axes = canvas(len(titles), height=0.36 * len(names) + 1.5, width=0.5 * frame[columns].nunique() + 1.3)
    low, high = (f(frame.groupby([rows, columns, panels])["accuracy"].mean()) for f in (min, max))
    for ax, title in zip(axes, titles, strict=True):
        grid = frame[frame[panels] == title].pivot_table(index=rows, columns=columns, values="accuracy", sort=False)
        image = ax.imshow(grid.to_numpy(), cmap="cividis", vmin=low, vmax=high, aspect="auto")
        for (i, j), value in np.ndenumerate(grid.to_numpy()):
            bright = value > low + 0.6 * (high - low)
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", color="black" if bright else "white", fontsize=9)
        ax.set(title=str(title), xlabel=columns.removeprefix("hyper."), xticks=range(grid.shape[1]))
        ax.set_xticklabels([f"{v:g}" if isinstance(v, float) else str(v) for v in grid.columns])
        ax.set_yticks(range(len(grid.index)), [str(v) for v in grid.index])
        ax.grid(False)
    if rows != "label":
        axes[0].set_ylabel(rows.removeprefix("hyper."))
    figure.colorbar(image, ax=list(axes), label="test accuracy (%)")
    means = frame.groupby([panels, rows, columns], sort=False)["accuracy"].mean()
    deviation = frame.groupby([rows, columns, panels])["accuracy"].std().mean()
    top = means.groupby(level=0, sort=False).idxmax()
    facts = "; ".join(f"{key[0]}: best {means[key]:.1f} % at {key[1]}, {key[2]}" for key in top)
    by = [name.removeprefix("hyper.") for name in (rows, columns, panels)]
    alt = f"Heat map of test accuracy by {by[0]} and {by[1]}, a panel for each {by[2]}. {facts}."
    note = f"Mean over seeds in each cell; sample deviation of a cell over seeds: {deviation:.1f} points in the mean."
    return drawn(figure, alt, f"{what} {note}", frame, name, runs)


def group_table(planned: pd.DataFrame, caption: str) -> Exhibit:
    """A row a group of runs: what differs between groups, and how many runs there are."""
    fields = ("data", "model", "clients", "cohort", "rounds", "epochs", "batch", "lr", "split")
    rows = [
        {"group": group, "runs": len(own)} | {name: ", ".join(map(str, own[name].unique())) for name in fields}
        for group, own in each(planned, "group")
    ]
    return table(pd.DataFrame(rows), caption, "groups")


BITS = ("measured_bits", "bits", "measured bits a parameter and upload")
MEGABYTES = ("megabytes", "MB", "MB of a run in both directions, measured")


def trade_off(runs: pd.DataFrame, name: str, dense: str = "fedavg", cost: tuple[str, str, str] = BITS) -> Exhibit:
    """Final accuracy against what it costs, BITS or MEGABYTES: a point a method, a panel a partition.

    dense: the method that is drawn as a line, since it costs too much for the axis.
    """
    column, unit, axis = cost
    names = {"label": "method", "split": "partition", "seed": "seed", column: unit, "accuracy": "accuracy"}
    frame = runs[list(names)].rename(columns=names)
    splits, methods = (list(frame[name].unique()) for name in ("partition", "method"))
    figure, axes = canvas(len(splits), height=4.2)
    for ax, split in zip(axes, splits, strict=True):
        for index, method in enumerate(methods):
            part = where(frame, partition=split, method=method)
            x, y = part[unit], part["accuracy"]
            if method == dense:
                ax.axhline(y.mean(), color="black", linestyle="--", label=f"{dense} ({x.mean():.0f} {unit})")
            elif len(part):
                draw_point(ax, x, y, index, method, filled=index < 10)
        ax.set(title=split, xlabel=axis)
        ax.set_xlim(0, 1.08 * frame.loc[frame["method"] != dense, unit].max())
    axes[0].set_ylabel("test accuracy (%)")
    add_legend(figure, axes, columns=6)
    means = frame.groupby(["partition", "method"], sort=False)[[unit, "accuracy"]].mean()
    facts = "; ".join(
        f"{', '.join(key)}: {x:.2f} {unit}, {y:.1f} %"
        for key, (x, y) in zip(means.index, means.to_numpy(), strict=True)
    )
    caption = (
        f"Final test accuracy against {axis}, mean over all rounds and seeds; bars: minimum to maximum over seeds. "
        "Up and to the left is better."
    )
    return drawn(figure, f"Scatter plot of accuracy against {unit}. {facts}.", caption, frame, name, runs)


def gather_notes(runs: pd.DataFrame, rounds: pd.DataFrame, notes: Mapping[str, str]) -> pd.DataFrame:
    """A row a round of each run and note, as `join_rounds` has it, the note's name as `of` and its value as `value`.

    notes: names by the columns of `rounds`.
    """
    frame = join_rounds(runs, rounds)
    there = [frame.assign(of=name, value=frame[column]) for column, name in notes.items() if column in frame]
    return pd.concat(there, ignore_index=True).dropna(subset="value")


def name_setting(runs: pd.DataFrame, setting: str, default: Any) -> pd.Series:
    """The values of a setting of the method, with a name for the default."""
    column = f"hyper.{setting}"
    if column not in runs:
        return pd.Series(default, index=runs.index)
    return runs[column].where(runs[column] != DEFAULT, default)
