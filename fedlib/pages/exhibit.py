"""What a notebook shows: a figure or table with its alt text, its caption, and its numbers as CSV."""

from __future__ import annotations

import base64
import html
import inspect
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

matplotlib.use("Agg")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Exhibit:
    """A figure or table that a notebook shows as it stands: image or HTML table, caption, and its numbers as CSV."""

    body: str  # HTML
    caption: str
    frame: pd.DataFrame
    name: str  # file name of the CSV, without extension

    def _repr_html_(self) -> str:
        points = base64.b64encode(self.frame.to_csv(index=False, lineterminator="\n").encode()).decode()
        link = f'<a download="{self.name}.csv" href="data:text/csv;base64,{points}">the numbers as CSV</a>'
        return (
            f'<figure class="exhibit">{self.body}<figcaption>{html.escape(self.caption)} ({link})</figcaption></figure>'
        )


def picture(
    figure: Figure, alt: str, caption: str, frame: pd.DataFrame, name: str, runs: pd.DataFrame | None = None
) -> Exhibit:
    """A matplotlib figure as an Exhibit: opaque PNG, readable in dark mode, with alt text.

    runs: those behind the figure, whose provenance ends the caption.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor="white", bbox_inches="tight", metadata={"Software": None})
    image = base64.b64encode(buffer.getvalue()).decode()
    body = f'<img src="data:image/png;base64,{image}" alt="{html.escape(alt)}">'
    return Exhibit(body, _complete(caption, runs), frame, name)


def table(
    frame: pd.DataFrame,
    caption: str,
    name: str,
    runs: pd.DataFrame | None = None,
    numbers: pd.DataFrame | None = None,
) -> Exhibit:
    """A table as an Exhibit. runs: as in `picture`; numbers: the CSV, where it says more than the cells."""
    body = frame.to_html(index=False, border=0, classes="table", justify="left", na_rep="–")
    scrolling = f'<div style="overflow-x: auto">{body}</div>'  # a wide one scrolls by itself
    return Exhibit(scrolling, _complete(caption, runs), frame if numbers is None else numbers, name)


def _complete(caption: str, runs: pd.DataFrame | None) -> str:
    return caption if runs is None else f"{caption} {provenance(runs)}"


def provenance(runs: pd.DataFrame) -> str:
    """The line that a caption ends with: scale, data set, seeds, device."""
    profiles, data, clients, cohorts, devices = (
        ", ".join(map(str, runs[name].dropna().unique())) for name in ("profile", "data", "clients", "cohort", "device")
    )
    seeds = sorted(runs["seed"].unique())
    note = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"a single seed ({seeds[0]})"
    return f"Profile {profiles}; {data}; {clients} clients, {cohorts} a round; {note}; {devices}."


def spread(values: Sequence[float] | pd.Series, form: str = ".1f") -> str:
    """Mean and sample deviation of values over seeds."""
    mean = f"{np.mean(values):{form}}"
    return f"{mean} ± {np.std(values, ddof=1):{form.lstrip('+')}}" if len(values) > 1 else mean


def canvas(
    columns: int = 1, height: float = 3.6, width: float | None = None, sharey: bool = True
) -> tuple[Figure, Sequence[Any]]:
    """One row of axes in the house style; height of the figure and width of a column in inches.

    Three columns and more are narrower by themselves: a page scales a wide figure down, and its letters with it.
    """
    width = width or (4.6 if columns < 3 else 3.2)
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.9)
    figure = Figure(figsize=(width * columns + 0.6, height), layout="constrained")
    axes = figure.subplots(1, columns, sharey=sharey, squeeze=False)[0]
    return figure, axes


def add_legend(figure: Figure, axes: Sequence[Any], columns: int = 4) -> None:
    """One legend for all panels, below them."""
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def draw_point(ax: Any, x: pd.Series, y: pd.Series, index: int, label: str, filled: bool = True) -> None:
    """A mark at the mean of x and y, with a bar from the minimum to the maximum of y."""
    style = {"fmt": MARKERS[index % len(MARKERS)], "color": f"C{index % 10}", "markersize": 7, "capsize": 3}
    bar = [[y.mean() - y.min()], [y.max() - y.mean()]]
    ax.errorbar(x.mean(), y.mean(), bar, label=label, markerfacecolor=None if filled else "none", **style)


def scale_by_factors(ax: Any) -> None:
    """A logarithmic horizontal axis with plain numbers."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


def source(*functions: Any) -> Markdown:
    """The code of functions as it runs, to stand beside their equations."""
    texts = (textwrap.dedent(inspect.getsource(function)).rstrip() for function in functions)
    return Markdown("```python\n" + "\n\n".join(texts) + "\n```")
