"""Tables and heat maps that set many methods or settings side by side: a cell is a mean over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.measures import best, last_bits, model_bytes, parameters, traffic, upload_bytes
from fedlib.pages.exhibit import MARKERS, MEGABYTE, Exhibit, canvas, drawn, spread, table
from fedlib.pages.figures import provenance
from fedlib.runs.record import Record
from fedlib.runs.spec import Spec


def field(r: Record, name: str) -> Any:
    """A field of a record's spec; "hyper.x" is a field of its hyper-parameters, at its default where not given."""
    first, _, rest = name.partition(".")
    return r["spec"][first].get(rest, "default") if rest else r["spec"][first]


def method_table(records: Sequence[Record], name: str, columns: str = "split") -> Exhibit:
    """A row a method, a column a partition (or another field): accuracy at the best learning rate; measured upload."""
    chosen = best(records)
    labels = dict.fromkeys(r["spec"]["label"] for r in chosen)
    several = len({r["spec"]["lr"] for r in records}) > 1
    tuned = "each method at the learning rate of the grid that serves it best there" if several else "one learning rate"
    rows, numbers = [], []
    for label in labels:
        own = [r for r in chosen if r["spec"]["label"] == label]
        row = {"method": label}
        for value in dict.fromkeys(field(r, columns) for r in chosen):
            runs = [r for r in own if field(r, columns) == value]
            head = value if columns == "split" else f"{columns}: {value}"
            values = [100 * r["final"]["accuracy"] for r in runs]
            rate = f" (lr {runs[0]['spec']['lr']:g})" if several and runs else ""
            row[head] = f"{spread(values)}{rate}" if runs else "–"
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
        f"Test accuracy (%) after the last round, mean and sample deviation over seeds, {tuned}; bytes and bits of a "
        "mean upload, over all columns and with all its parts, as measured, and the bits a weight that the method's "
        f"definition counts. {provenance(records)}"
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
    if rows != "label":
        axes[0].set_ylabel(rows.removeprefix("hyper."))
    figure.colorbar(image, ax=list(axes), label="test accuracy (%)")
    means = frame.groupby([panels, rows, columns], sort=False)["accuracy"].mean()
    spread = frame.groupby([panels, rows, columns])["accuracy"].std().mean()
    top = means.groupby(level=0, sort=False).idxmax()
    facts = "; ".join(f"{key[0]}: best {means[key]:.1f} % at {key[1]}, {key[2]}" for key in top)
    by = [name.removeprefix("hyper.") for name in (rows, columns, panels)]
    alt = f"Heat map of test accuracy by {by[0]} and {by[1]}, a panel for each {by[2]}. {facts}."
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


BITS = ("bits", "measured bits a parameter and upload", lambda r: 8 * upload_bytes(r) / parameters(r))
MEGABYTES = ("MB", "MB of a run in both directions, measured", lambda r: traffic(r, "ours") / 8 / MEGABYTE)


def trade_off(
    records: Sequence[Record], name: str, dense: str = "fedavg", cost: tuple[str, str, Any] = BITS
) -> Exhibit:
    """Final accuracy against what it costs, BITS or MEGABYTES: a point a method, a panel a partition.

    dense: the method that is drawn as a line, since it costs too much for the axis.
    """
    unit, axis, measure = cost
    frame = pd.DataFrame(
        {
            "method": r["spec"]["label"],
            "partition": r["spec"]["split"],
            "seed": r["spec"]["seed"],
            unit: measure(r),
            "accuracy": 100 * r["final"]["accuracy"],
        }
        for r in records
    )
    splits, methods = (list(dict.fromkeys(frame[column])) for column in ("partition", "method"))
    figure, axes = canvas(len(splits), height=4.2)
    for ax, split in zip(axes, splits, strict=True):
        for index, method in enumerate(methods):
            part = frame[(frame["partition"] == split) & (frame["method"] == method)]
            x, y = part[unit], part["accuracy"]
            if method == dense:
                ax.axhline(y.mean(), color="black", linestyle="--", label=f"{dense} ({x.mean():.0f} {unit})")
                continue
            ax.errorbar(
                *(x.mean(), y.mean(), [[y.mean() - y.min()], [y.max() - y.mean()]]),
                **dict(
                    fmt=MARKERS[index % len(MARKERS)], color=f"C{index % 10}", markersize=8, capsize=3, label=method
                ),
                markerfacecolor="none" if index >= 10 else None,
            )
        ax.set(title=split, xlabel=axis)
        ax.set_xlim(0, 1.08 * frame.loc[frame["method"] != dense, unit].max())
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    means = frame.groupby(["partition", "method"], sort=False)[[unit, "accuracy"]].mean()
    facts = "; ".join(
        f"{', '.join(key)}: {x:.2f} {unit}, {y:.1f} %"
        for key, (x, y) in zip(means.index, means.to_numpy(), strict=True)
    )
    caption = (
        f"Final test accuracy against {axis}, mean over all rounds and seeds; bars from the smallest seed "
        f"to the largest. Up and to the left is better. {provenance(records)}"
    )
    return drawn(figure, f"Scatter plot of accuracy against {unit}. {facts}.", caption, frame, name)


def bits_table(records: Sequence[Record], caption: str, name: str) -> Exhibit:
    """A row a method and coding: bits a parameter of the last round's uploads, by each definition and as measured."""
    rows = []
    keys = dict.fromkeys((r["spec"]["label"], field(r, "hyper.coding")) for r in records)
    for label, coding in keys:
        own = [r for r in records if r["spec"]["label"] == label and field(r, "hyper.coding") == coding]

        def mean(measure: Any, own: list[Record] = own) -> str:
            return f"{np.mean([measure(r) for r in own]):.4f}"

        rows.append(
            {
                "method": label,
                "coded by": "pooled" if coding == "default" else coding,
                "measured": mean(lambda r: 8 * _each(r, "uplink_bytes")),
                "H(p1), by definition": mean(last_bits),
                "official code": mean(lambda r: r["rounds"][-1]["other_bits"]["official code"] / _uploads(r)),
                "seeds": len(own),
            }
        )
    return table(pd.DataFrame(rows), f"{caption} {provenance(records)}", name)


def _uploads(r: Record) -> float:
    """Parameters of all uploads of the last round together."""
    return float(len(r["rounds"][-1]["clients"]) * parameters(r))


def _each(r: Record, entry: str) -> float:
    return float(r["rounds"][-1][entry] / _uploads(r))


def storage_table(records: Sequence[Record], name: str) -> Exhibit:
    """A row a method and partition: bytes of the final model's file, beside the network as float32."""
    rows = []
    for label, split in dict.fromkeys((r["spec"]["label"], r["spec"]["split"]) for r in records):
        own = [r for r in records if (r["spec"]["label"], r["spec"]["split"]) == (label, split)]
        sizes, dense = [model_bytes(r) for r in own], 4 * parameters(own[0])
        row = {"method": label, "partition": split, "bytes of the file": f"{np.mean(sizes):,.0f}"}
        row |= {"as float32": f"{dense:,}", "times smaller": f"{np.mean([dense / size for size in sizes]):.1f}"}
        rows.append(row | {"accuracy (%)": f"{100 * np.mean([r['final']['accuracy'] for r in own]):.1f}"})
    caption = (
        "Size of the final model: the seed of its weights and one mask, in a file that loads again. Accuracy: mean "
        "over five masks."
    )
    caption = f"{caption} {provenance(records)}"
    return table(pd.DataFrame(rows), caption, name)


def by_round(records: Sequence[Record], value: Any, by: Any) -> pd.DataFrame:
    """A row a round and case, mean over seeds: `value(record, entry)` for each round's entry, `by(record)` its case."""
    rows = [{"case": by(r), "round": e["round"], "value": value(r, e)} for r in records for e in r["rounds"]]
    return pd.DataFrame(rows).groupby(["case", "round"], sort=False)["value"].mean().reset_index()
