"""Tables and heat maps that set many methods or settings side by side: a cell is a mean over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedlib.exhibits import Exhibit, canvas, drawn, table
from fedlib.figures import provenance
from fedlib.record import Record
from fedlib.score import best, upload_bytes
from fedlib.spec import Spec


def field(r: Record, name: str) -> Any:
    """A field of a record's spec; "hyper.x" is a field of its hyper-parameters, at its default where not given."""
    first, _, rest = name.partition(".")
    return r["spec"][first].get(rest, "default") if rest else r["spec"][first]


def method_table(records: Sequence[Record], name: str, columns: str = "split") -> Exhibit:
    """A row a method, a column a partition (or another field): accuracy at the best learning rate; measured upload."""
    chosen = best(records)
    labels = dict.fromkeys(r["spec"]["label"] for r in chosen)
    rows, numbers = [], []
    for label in labels:
        own = [r for r in chosen if r["spec"]["label"] == label]
        row = {"method": label}
        for value in dict.fromkeys(field(r, columns) for r in chosen):
            runs = [r for r in own if field(r, columns) == value]
            head = value if columns == "split" else f"{columns}: {value}"
            values = np.array([100 * r["final"]["accuracy"] for r in runs])
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            row[head] = f"{values.mean():.1f}{spread} (lr {runs[0]['spec']['lr']:g})" if runs else "–"
            numbers += [
                {"method": label, "column": head, "seed": r["spec"]["seed"], "lr": r["spec"]["lr"], "accuracy": v}
                for r, v in zip(runs, values, strict=True)
            ]
        weights = own[0]["parameters"]["weights"]
        row["bytes an upload"] = f"{np.mean([upload_bytes(r) for r in own]):,.0f}"
        row["bits a weight"] = f"{np.mean([8 * upload_bytes(r) / weights for r in own]):.2f}"
        paper = np.mean([r["final"]["paper_bits"] / r["final"]["uploads"] / weights for r in own])
        row["by definition"] = f"{paper:.2f}"
        rows.append(row)
    caption = (
        "Test accuracy (%) after the last round, mean and sample deviation over seeds, each method at the learning "
        "rate of the grid that serves it best there; bytes and bits of a mean upload, all its parts, as "
        f"measured, and the bits a weight that the method's definition counts. {provenance(records)}"
    )
    shown = table(pd.DataFrame(rows), caption, name)
    return Exhibit(shown.body, shown.caption, pd.DataFrame(numbers), name)


def heat_map(records: Sequence[Record], rows: str, columns: str, panels: str, name: str, what: str) -> Exhibit:
    """Mean final accuracy by three fields of the spec ("lr", "label", "hyper.magnitude" ...); a panel a value."""
    frame = pd.DataFrame(
        {
            rows: field(r, rows),
            columns: field(r, columns),
            panels: field(r, panels),
            "seed": r["spec"]["seed"],
            "accuracy": 100 * r["final"]["accuracy"],
        }
        for r in records
    )
    titles = list(dict.fromkeys(frame[panels]))
    names = list(dict.fromkeys(frame[rows]))
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
    figure.colorbar(image, ax=list(axes), label="test accuracy (%)")
    means = frame.groupby([panels, rows, columns], sort=False)["accuracy"].mean()
    spread = frame.groupby([panels, rows, columns])["accuracy"].std().mean()
    top = means.groupby(level=0, sort=False).idxmax()
    facts = "; ".join(f"{key[0]}: best {means[key]:.1f} % at {key[1]}, {key[2]}" for key in top)
    alt = f"Heat map of test accuracy by {rows} and {columns}, a panel a {panels}. {facts}."
    note = f" Mean over seeds in each cell; sample deviation of a cell over seeds: {spread:.1f} points in the mean."
    return drawn(figure, alt, f"{what}{note} {provenance(records)}", frame, name)


def group_table(specs: Sequence[Spec], caption: str) -> Exhibit:
    """A row a group of runs: what differs between groups, and how many runs there are."""
    rows = []
    for group in dict.fromkeys(s.group for s in specs):
        own = [s for s in specs if s.group == group]
        row: dict[str, Any] = {"group": group, "runs": len(own)}
        for name in ("data", "model", "clients", "cohort", "rounds", "epochs", "batch", "lr", "split"):
            row[name] = ", ".join(dict.fromkeys(f"{getattr(s, name)}" for s in own))
        rows.append(row)
    return table(pd.DataFrame(rows), caption, "groups")
