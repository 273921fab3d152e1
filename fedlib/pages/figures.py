"""Figures and tables of the pages, each drawn from the tables of `fedlib.claims.results` alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedlib.claims.results import FRESH, NOT_RUN, each, join_rounds
from fedlib.pages.exhibit import MARKERS, Exhibit, add_legend, canvas, draw_band, drawn, scale_by_factors, table
from fedlib.wire import container

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
POINTS = ("label", "data", "split", "seed", "lr", "round", "accuracy", "loss", "reported", "bits")  # of a curve
BAND = "Line: mean over seeds; band: minimum to maximum over seeds."


def evaluate(runs: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """One row an evaluated round of these runs: POINTS and AXES; `reported` is the loss that clients note, if any."""
    frame = join_rounds(runs, rounds).rename(columns={"notes.loss": "reported"})
    columns = dict.fromkeys([*POINTS, "uplink_megabytes", "downlink_megabytes", "megabytes"])
    return frame[frame["accuracy"].notna()].reindex(columns=list(columns)).reset_index(drop=True)


def draw_panels(
    frame: pd.DataFrame,
    y: str,
    x: str,
    panel: str,
    case: str,
    at: str | None = None,
    order: Sequence[Any] = (),
    labels: Mapping[str, str] | None = None,
    height: float = 3.6,
    sharey: bool = True,
) -> tuple[Figure, Sequence[Any]]:
    """A panel a value of `panel`, with a band a value of `case`: column `y` against the mean of `x` at each `at`.

    at: `x` itself unless given; order: of the cases, by which they get their colours; labels: in place of their names.
    """
    panels, cases = list(frame[panel].unique()), list(frame[case].unique())
    order = list(order) or cases
    figure, axes = canvas(len(panels), height, sharey=sharey)
    for ax, title in zip(axes, panels, strict=True):
        for name in cases:
            groups = frame[(frame[panel] == title) & (frame[case] == name)].groupby(at or x)
            draw_band(ax, groups[x].mean(), groups[y], order.index(name), (labels or {}).get(name, str(name)))
        ax.set(title=title)
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
    labels = {}
    if frame.groupby(panel)["lr"].nunique().max() > 1:
        for label, own in each(frame[frame[panel] == frame[panel].iloc[0]], "label"):
            labels[label] = f"{label} (lr {', '.join(f'{lr:g}' for lr in own['lr'].unique())})"
    order = list((runs if among is None else among)["label"].unique())
    figure, axes = draw_panels(frame, quantity, against, panel, "label", at="round", order=order, labels=labels)
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
    ends = last.groupby([panel, "label"])[quantity].mean()
    alt = f"Line chart of {what} against {axis}. Mean at the end: " + "; ".join(
        f"{where}: {value:.3g}" for where, value in zip((", ".join(key) for key in ends.index), ends, strict=True)
    )
    caption = f"{what.capitalize()} against {axis}. {BAND}"
    return drawn(figure, alt, caption, frame, f"{quantity}-against-{against.replace('_', '-')}", runs)


def accuracy_by_setting(
    runs: pd.DataFrame,
    setting: str,
    axis: str,
    caption: str,
    name: str,
    by: str = "label",
    panel: str | None = None,
    scale: str = "linear",
) -> Exhibit:
    """Final accuracy against a column, `setting`: a line a value of column `by`, a panel a value of column `panel`.

    scale: "linear", "log", or "each" for values that stand side by side, such as names.
    """
    columns = {"panel": runs[panel] if panel else "", "case": runs[by], axis: runs[setting]}
    frame = pd.DataFrame(columns | {"seed": runs["seed"], "accuracy": runs["accuracy"]}).infer_objects()
    places = list(frame[axis].unique())
    at = frame.assign(position=frame[axis].map(places.index) if scale == "each" else frame[axis])
    figure, axes = draw_panels(at, "accuracy", "position", "panel", "case", height=4.0)
    for ax in axes:
        ax.set(xlabel=axis)
        if scale == "each":
            ax.set_xticks(range(len(places)), places)
            continue
        ax.set_xscale(scale)
        ordered = sorted(places)
        if scale == "log" and all(b > 1.4 * a for a, b in itertools.pairwise(ordered)):
            ax.set_xticks(ordered, [f"{place:g}" for place in ordered])
            ax.minorticks_off()
        elif scale == "log":
            ax.xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel(QUANTITIES["accuracy"])
    if frame["case"].nunique() > 1:
        add_legend(figure, axes)
    means = frame.groupby(["panel", "case", axis], sort=False)["accuracy"].mean().reset_index()
    says = "; ".join(f"{p} {case} {at}: {mean:.1f}".strip() for p, case, at, mean in means.itertuples(index=False))
    alt = f"Line chart of test accuracy against {axis}. Means: {says}."
    return drawn(figure, alt, f"{caption} {BAND}", frame, name, runs)


def setup_table(experiments: dict[str, Any], profile: str, theirs: str = "authors' scripts") -> Exhibit:
    """Every setting: the authors' value, the value of this profile, unit and source; then the methods' own settings.

    theirs: what profile `paper` stands for.
    """
    rows = []
    for name, setting in experiments["settings"].items():
        value, paper = setting.get(profile, "–"), setting.get("paper", "not stated")
        row = {"setting": name, theirs: paper, "here": value}
        rows.append(row | {"unit": setting["unit"], "source": setting["source"]})
    for label, method in experiments["methods"].items():
        if "paper" not in method:  # a check of this project's own, which the authors' scripts do not have
            continue
        settings = {name: method[name] for name in ("lr",) if name in method} | method["hyper"]
        text = ", ".join(f"{name} {value}" for name, value in settings.items())
        paper = method["paper"]
        rows.append({"setting": label, theirs: paper, "here": text, "unit": "", "source": method["source"]})
    return table(pd.DataFrame(rows), f"Set-up: {theirs} beside profile {profile}.", "setup")


def _case(name: str, values: list[float], what: str) -> str:
    spread = f" ({min(values):.2f} to {max(values):.2f})" if min(values) < max(values) else ""
    return f"{name}: {np.mean(values):.2f}{spread}, {len(values)} {what if len(values) > 1 else what.removesuffix('s')}"


def record_table(runs: pd.DataFrame, caption: str) -> Exhibit:
    """Every planned run with its record: state, day, seconds, device, versions, commit."""
    shown = runs.reindex(columns=["run", "state", "time", "seconds", "device", "torch", "commit", "code"])
    stale = ~shown["state"].isin([FRESH, NOT_RUN])
    shown["state"] = shown["state"].where(~stale, "STALE: " + shown["state"])
    for name, letters in (("time", 10), ("commit", 8), ("code", 8)):
        shown[name] = shown[name].astype("str").str[:letters].where(shown[name].notna())
    return table(shown.where(shown.notna(), "–").rename(columns={"time": "made"}), caption, "records")


def message_table(message: bytes, parts: Sequence[str], caption: str) -> Exhibit:
    """Every field of a message in the order of its bytes: where it starts, its length, its bytes, what they say."""
    sizes = container.section_sizes(message)
    fields = [("magic word", 3), ("format version", 1), ("length of the kind", 1), ("kind", message[4])]
    fields += [("fingerprint", 8), ("training samples", 4), ("number of sections", 1)]
    fields += [(f"length of section {index}", 4) for index in range(len(sizes))]
    fields += [*zip(parts, sizes, strict=True), ("checksum (CRC-32)", 4)]
    rows, start = [], 0
    for field, size in fields:
        held, says = message[start : start + size], "–"
        if field in ("magic word", "kind"):
            says = held.rstrip(b"\0").decode()
        elif field == "training samples" or field.split()[0] in ("format", "length", "number"):
            says = f"{int.from_bytes(held, 'little'):,}"
        shown = held[: 8 if size == 8 else 6].hex(" ") + (" …" if size > 8 else "")
        rows.append({"field": field, "from byte": f"{start:,}", "bytes": f"{size:,}", "in hex": shown, "says": says})
        start += size
    if start != len(message):
        raise ValueError(f"message of {len(message)} bytes, of which {start} are explained")
    return table(pd.DataFrame(rows), caption, "message")


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

    scale: of both axes, "linear" or "log"; "log y" is for the vertical one alone. runs: as in `exhibit.drawn`.
    """
    figure, axes = canvas(height=4.0)
    figure.set_figwidth(7.2)  # one panel over the page's width, with letters no larger than the text's
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
    return drawn(figure, alt, caption, frame, name, runs)


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
