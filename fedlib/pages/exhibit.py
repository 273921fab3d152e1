"""What a notebook shows: a figure or table with its alt text, its caption, and its numbers as CSV."""

from __future__ import annotations

import base64
import html
import inspect
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Markdown
from matplotlib.figure import Figure

matplotlib.use("Agg")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MEGABYTE = 1e6


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


def drawn(figure: Figure, alt: str, caption: str, frame: pd.DataFrame, name: str) -> Exhibit:
    """A matplotlib figure as an Exhibit: opaque PNG, readable in dark mode, with alt text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor="white", bbox_inches="tight", metadata={"Software": None})
    image = base64.b64encode(buffer.getvalue()).decode()
    return Exhibit(f'<img src="data:image/png;base64,{image}" alt="{html.escape(alt)}">', caption, frame, name)


def table(frame: pd.DataFrame, caption: str, name: str) -> Exhibit:
    body = frame.to_html(index=False, border=0, classes="table", justify="left", na_rep="–")
    return Exhibit(f'<div style="overflow-x: auto">{body}</div>', caption, frame, name)  # a wide one scrolls by itself


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


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


def source(*functions: Any) -> Markdown:
    """The code of functions as it runs, to stand beside their equations."""
    return Markdown("```python\n" + "\n\n".join(inspect.getsource(f).rstrip() for f in functions) + "\n```")
