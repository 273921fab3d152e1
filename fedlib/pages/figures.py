"""Figures of the pages, each drawn from the tables of `fedlib.claims.results` alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from fedlib.claims.results import each, join_rounds, where
from fedlib.pages.exhibit import MARKERS, Exhibit, add_legend, canvas, draw_point, picture, scale_by_factors

QUANTITIES = {
    "accuracy": "test accuracy (%)",
    "bits": "bits a parameter, by definition",
    "reported": "training loss, reported by clients",
}
AXES = {
    "round": "communication round",
    "uplink_megabytes": "MB uploaded by all clients so far, measured",
    "megabytes": "MB in both directions so far, measured",
}
POINTS = ["label", "data", "split", "seed", "lr", "round", "accuracy", "loss", "reported", "bits"]  # of a curve
POINTS += ["uplink_megabytes", "downlink_megabytes", "megabytes"]
BITS = ("measured_bits", "bits", "measured bits a parameter and upload")
MEGABYTES = ("megabytes", "MB", "MB of a run in both directions, measured")
BAND = "Line: mean over seeds; band: minimum to maximum over seeds."


def evaluate(runs: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """One row an evaluated round of these runs: POINTS; `reported` is the loss that clients note, if any."""
    frame = join_rounds(runs, rounds).rename(columns={"notes.loss": "reported"})
    return frame[frame["accuracy"].notna()].reindex(columns=POINTS).reset_index(drop=True)


def draw_panels(
    frame: pd.DataFrame,
    y: str,
    x: str,
    panel: str,
    case: str,
    order: Sequence[Any] = (),
    height: float = 3.6,
    sharey: bool = True,
) -> tuple[Figure, Sequence[Any]]:
    """A panel a value of `panel`, in it a line a value of `case`: the mean of `y` against `x`, and a band of all of it.

    order: of the cases, by which they get their colours and markers.
    """
    cases = list(frame[case].unique())
    order = list(order) or cases
    style: dict[str, Any] = {"hue": case, "hue_order": cases, "style": case, "style_order": cases, "dashes": False}
    style |= {"markersize": 6, "markeredgewidth": 0}
    style["palette"] = {name: f"C{order.index(name) % 10}" for name in cases}
    style["markers"] = {name: MARKERS[order.index(name) % len(MARKERS)] for name in cases}
    figure, axes = canvas(frame[panel].nunique(), height, sharey=sharey)
    for ax, (title, own) in zip(axes, each(frame, panel), strict=True):
        how = "band" if own.groupby(case)[x].nunique().max() > 1 else "bars"  # a point has no band
        sns.lineplot(own, x=x, y=y, errorbar=("pi", 100), err_style=how, ax=ax, **style)
        ax.get_legend().remove()
        ax.set(title=title, xlabel="", ylabel="")
    return figure, axes


def count_rounds(axes: Sequence[Any]) -> None:
    """Whole numbers on the horizontal axes."""
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)


def accuracy_curves(
    runs: pd.DataFrame,
    rounds: pd.DataFrame,
    against: str = "round",
    quantity: str = "accuracy",
    among: pd.DataFrame | None = None,
    panel: str = "split",
) -> Exhibit:
    """Test accuracy (or another of QUANTITIES) against one of AXES: a line a method, a panel a split, or data set.

    among: runs in whose order methods get their colours, where several figures are to agree.
    """
    frame, axis, what = evaluate(runs, rounds), AXES[against], QUANTITIES[quantity]
    names = {label: label for label in (runs if among is None else among)["label"].unique()}
    if frame.groupby(panel)["lr"].nunique().max() > 1:
        for label, own in each(frame[frame[panel] == frame[panel].iloc[0]], "label"):
            names[label] = f"{label} (lr {', '.join(f'{lr:g}' for lr in own['lr'].unique())})"
    means = frame.groupby([panel, "label", "round"])[against].transform("mean")
    points = frame.assign(case=frame["label"].map(names)).assign(**{against: means})
    figure, axes = draw_panels(points, quantity, against, panel, "case", list(names.values()))
    for ax in axes:
        ax.set(xlabel=axis)
        if against != "round":
            scale_by_factors(ax)
    if against == "round":
        count_rounds(axes)
    axes[0].set_ylabel(what)
    if quantity == "reported":  # a loss falls by factors
        axes[0].set_yscale("log")
    add_legend(figure, axes)
    last = frame[frame["round"] == frame.groupby(["label", panel, "seed"])["round"].transform("max")]
    ends = last.groupby([panel, "label"])[quantity].mean().reset_index()
    says = "; ".join(f"{place}, {label}: {value:.3g}" for place, label, value in ends.itertuples(index=False))
    alt = f"Line chart of {what} against {axis}. Mean at the end: {says}"
    caption = f"{what.capitalize()} against {axis}. {BAND}"
    return picture(figure, alt, caption, frame, f"{quantity}-against-{against.replace('_', '-')}", runs)


def accuracy_by_setting(
    runs: pd.DataFrame,
    setting: str,
    axis: str,
    caption: str,
    name: str,
    by: str = "label",
    panel: str | None = None,
) -> Exhibit:
    """Final accuracy against a column, `setting`: a line a value of column `by`, a panel a value of column `panel`.

    The axis of numbers is logarithmic; names stand side by side.
    """
    columns = {"panel": runs[panel] if panel else "", "case": runs[by], axis: runs[setting]}
    frame = pd.DataFrame(columns | {"seed": runs["seed"], "accuracy": runs["accuracy"]}).infer_objects()
    figure, axes = draw_panels(frame, "accuracy", axis, "panel", "case", height=4.0)
    places = sorted(frame[axis].unique())
    for ax in axes:
        ax.set(xlabel=axis)
        if pd.api.types.is_numeric_dtype(frame[axis]):
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            if all(b > 1.4 * a for a, b in itertools.pairwise(places)):
                ax.set_xticks(places)
                ax.minorticks_off()
    axes[0].set_ylabel(QUANTITIES["accuracy"])
    if frame["case"].nunique() > 1:
        add_legend(figure, axes)
    means = frame.groupby(["panel", "case", axis], sort=False)["accuracy"].mean().reset_index()
    says = "; ".join(f"{p} {case} {at}: {mean:.1f}".strip() for p, case, at, mean in means.itertuples(index=False))
    alt = f"Line chart of test accuracy against {axis}. Means: {says}."
    return picture(figure, alt, f"{caption} {BAND}", frame, name, runs)


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    alt: str,
    caption: str,
    name: str,
    scale: str = "linear",
    runs: pd.DataFrame | None = None,
) -> Exhibit:
    """Column `y` against `x`, one line a value of `by`; column names are the axis labels.

    scale: of both axes, "linear" or "log"; "log y" is for the vertical one alone. runs: as in `exhibit.picture`.
    """
    figure, axes = canvas(height=4.0, width=6.6)  # over the page's width, with letters no larger than the text's
    for index, (label, part) in enumerate(frame.groupby(by, sort=False)):
        style = {"marker": MARKERS[index % len(MARKERS)], "linestyle": ("-", "--", "-.", ":")[index % 4]}
        every = max(1, len(part) // 12)
        axes[0].plot(part[x], part[y], color=f"C{index}", label=label, markevery=every, markersize=5, **style)
    axes[0].set(xlabel=x, ylabel=y, xscale="linear" if scale == "log y" else scale, yscale=scale.split()[0])
    if x == "round" and scale != "log":
        count_rounds(axes)
    if frame[by].nunique() <= 6:
        axes[0].legend()
    else:  # too many for a corner
        add_legend(figure, axes, columns=3)
    return picture(figure, alt, caption, frame, name, runs)


def lines_by_round(
    frame: pd.DataFrame,
    value: str,
    y: str,
    alt: str,
    caption: str,
    name: str,
    runs: pd.DataFrame,
    scale: str = "linear",
) -> Exhibit:
    """`lines` of a column of rounds in the mean over seeds, one line a value of their column `case`; y: its name."""
    means = frame.groupby(["case", "round"], sort=False)[value].mean().reset_index().rename(columns={value: y})
    return lines(means, "round", y, "case", alt, caption, name, scale, runs)


def heat_map(runs: pd.DataFrame, rows: str, columns: str, panels: str, name: str, what: str) -> Exhibit:
    """Mean final accuracy by three columns ("lr", "label", "hyper.magnitude" ...); a panel a value of the third."""
    frame = runs[[rows, columns, panels, "seed", "accuracy"]].infer_objects()
    size, cells = frame[[rows, columns, panels]].nunique(), frame.groupby([rows, columns, panels])["accuracy"]
    figure, axes = canvas(size[panels], height=0.36 * size[rows] + 1.5, width=0.5 * size[columns] + 1.3)
    low, high = cells.mean().min(), cells.mean().max()
    for ax, (title, own) in zip(axes, each(frame, panels), strict=True):
        grid = own.pivot_table(index=rows, columns=columns, values="accuracy", sort=False)
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
    on = "validation" if (runs["validation"] > 0).all() else "test"
    figure.colorbar(image, ax=list(axes), label=f"{on} accuracy (%)")
    means = frame.groupby([panels, rows, columns], sort=False)["accuracy"].mean()
    deviation, top = cells.std().mean(), means.groupby(level=0, sort=False).idxmax()
    facts = "; ".join(f"{key[0]}: best {means[key]:.1f} % at {key[1]}, {key[2]}" for key in top)
    by = [name.removeprefix("hyper.") for name in (rows, columns, panels)]
    alt = f"Heat map of accuracy by {by[0]} and {by[1]}, a panel for each {by[2]}. {facts}."
    spread = f"; sample deviation of a cell over seeds: {deviation:.1f} points in the mean"
    note = f"Mean over seeds in each cell{spread if deviation >= 0 else ''}."  # of one seed it is no number
    return picture(figure, alt, f"{what} {note}", frame, name, runs)


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
    facts = "; ".join(f"{', '.join(key)}: {x:.2f} {unit}, {y:.1f} %" for key, x, y in means.itertuples())
    caption = (
        f"Final test accuracy against {axis}, mean over all rounds and seeds; bars: minimum to maximum over seeds. "
        "Up and to the left is better."
    )
    return picture(figure, f"Scatter plot of accuracy against {unit}. {facts}.", caption, frame, name, runs)
