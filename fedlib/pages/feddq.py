"""Tables and figures of what is sent: until an accuracy is reached, in parts and directions, and by resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims import targets
from fedlib.claims.measures import last_bits, parameters
from fedlib.pages.exhibit import Exhibit, canvas, drawn, table
from fedlib.pages.figures import provenance
from fedlib.pages.tables import field
from fedlib.runs.record import Record


def quantizer_table(records: Sequence[Record], name: str) -> Exhibit:
    """A row a method, a column a quantizer: final accuracy, and bits an entry in the mean over the run."""
    rows = []
    for label in dict.fromkeys(r["spec"]["label"] for r in records):
        row: dict[str, Any] = {"method": label}
        for kind in dict.fromkeys(field(r, "hyper.quantizer") for r in records):
            own = [r for r in records if r["spec"]["label"] == label and field(r, "hyper.quantizer") == kind]
            accuracy = _spread([100 * r["final"]["accuracy"] for r in own]) if own else ""
            bits = [r["final"]["paper_bits"] / r["final"]["uploads"] / parameters(r) for r in own]
            shown = "affine_stochastic" if kind == "default" else kind
            row[shown] = f"{accuracy} % at {np.mean(bits):.2f} bits" if own else "–"
        rows.append(row)
    caption = (
        "Test accuracy after the last round, mean and sample deviation over seeds, and bits an entry by the released "
        f"code's count, mean over the run. {provenance(records)}"
    )
    return table(pd.DataFrame(rows), caption, name)


def downlink_table(records: Sequence[Record], name: str) -> Exhibit:
    """A row a method and resolution of the broadcast: accuracy, bytes of a mean upload and download."""
    rows = []
    for label, resolution in dict.fromkeys((r["spec"]["label"], field(r, "hyper.downlink")) for r in records):
        own = [r for r in records if (r["spec"]["label"], field(r, "hyper.downlink")) == (label, resolution)]
        row = {"method": label, "resolution of the download": "float32" if resolution == "default" else resolution}
        row["accuracy (%)"] = _spread([100 * r["final"]["accuracy"] for r in own])
        for way in ("uplink_bytes", "downlink_bytes"):
            row[way.replace("_", " ")] = _mean_bytes(own, lambda r, way=way: r["final"][way])
        first, last = (
            np.mean(
                [8 * r["rounds"][i]["downlink_bytes"] / len(r["rounds"][i]["clients"]) / parameters(r) for r in own]
            )
            for i in (0, -1)
        )
        row["bits a parameter down, first to last round"] = f"{first:.2f} to {last:.2f}"
        rows.append(row)
    return table(pd.DataFrame(rows), f"Bytes of a mean message in each direction. {provenance(records)}", name)


def sweep_figure(records: Sequence[Record], axis: str, guides: Mapping[str, float], name: str) -> Exhibit:
    """Final accuracy, and bits an entry in the last round and in the mean, against a hyper-parameter on a log axis.

    guides: values of it to be marked, by what they are.
    """
    short = axis.partition(".")[2]
    frame = pd.DataFrame(
        {
            short: field(r, axis),
            "seed": r["spec"]["seed"],
            "accuracy": 100 * r["final"]["accuracy"],
            "bits in the mean": r["final"]["paper_bits"] / r["final"]["uploads"] / parameters(r),
            "bits in the last round": last_bits(r),
        }
        for r in records
    )
    figure, _ = canvas(2, height=3.8)
    figure.clear()
    axes = figure.subplots(1, 2)  # which share no axis: their units differ
    for ax, columns in zip(axes, (["accuracy"], ["bits in the mean", "bits in the last round"]), strict=True):
        for index, column in enumerate(columns):
            part = frame.groupby(short)[column]
            ax.plot(part.mean().index, part.mean(), marker="os"[index], color=f"C{index}", label=column)
            ax.fill_between(part.mean().index, part.min(), part.max(), color=f"C{index}", alpha=0.15, linewidth=0)
        for index, (what, value) in enumerate(guides.items()):
            ax.axvline(value, color="black", linestyle=("--", ":")[index], label=f"guide {what}")
        ax.set(xscale="log", xlabel=short)
        values = sorted(set(frame[short]))
        ax.set_xticks(values, [f"{value:g}" for value in values], rotation=45)
        ax.minorticks_off()
    axes[0].set_ylabel("test accuracy (%)")
    axes[1].set_ylabel("bits an entry")
    axes[0].legend()
    axes[1].legend()
    means = frame.groupby(short)[["accuracy", "bits in the mean"]].mean()
    facts = "; ".join(
        f"{x:g}: {a:.1f} %, {b:.2f} bits" for x, (a, b) in zip(means.index, means.to_numpy(), strict=True)
    )
    marks = ", ".join(f"{what} {value:.3g}" for what, value in guides.items())
    alt = f"Two line charts, accuracy and bits an entry against {short}. {facts}. Guide values: {marks}."
    caption = (
        f"Accuracy after the last round and bits an entry against the {short}; line: mean over seeds, band: smallest "
        f"to largest seed; vertical lines: guide value {marks}. {provenance(records)}"
    )
    return drawn(figure, alt, caption, frame, name)


def target_table(records: Sequence[Record], caption: str, against: str) -> Exhibit:
    """A row a group, partition and method: what it takes to reach 99 % of FedAvg's best accuracy; saved over another.

    A method reaches the target when it does with every seed; otherwise the table says with how many.
    """
    rows, numbers = [], []
    cases = dict.fromkeys((r["spec"]["group"], r["spec"]["split"], r["spec"]["label"]) for r in records)
    for group, split, label in cases:

        def of(label: str, group: str = group, split: str = split) -> list[Record]:
            place = (group, split, label)
            found = [r for r in records if (r["spec"]["group"], r["spec"]["split"], r["spec"]["label"]) == place]
            return sorted(found, key=lambda r: r["spec"]["seed"])

        own = of(label)
        goals = [targets.target(records, r) for r in own]
        reached = [targets.reached(r, goal) for r, goal in zip(own, goals, strict=True)]
        row = {"group": group, "partition": split, "target (%)": f"{100 * np.mean(goals):.1f}", "method": label}
        for quantity, shown in (("rounds", "rounds"), ("bits", "Mbit"), ("megabytes", "MB measured")):
            values = [x.cost(quantity) / (1e6 if quantity == "bits" else 1) for x in reached]
            row[shown] = _spread(values) if all(x.ever for x in reached) else "not reached"
        missed = sum(not x.ever for x in reached)
        row["seeds that reach it"] = f"{len(own) - missed} of {len(own)}"
        others = [targets.reached(r, goal) for r, goal in zip(of(against), goals, strict=False)]
        for quantity in ("rounds", "bits"):
            saved = [targets.saving(a, b, quantity) for a, b in zip(reached, others, strict=False)]
            row[f"{quantity} saved over {against} (%)"] = _spread(saved, ",.0f") if saved and not missed else "–"
        rows.append(row)
        numbers += [
            {"group": group, "partition": split, "method": label, "seed": r["spec"]["seed"]} | x._asdict()
            for r, x in zip(own, reached, strict=True)
        ]
    shown_table = table(pd.DataFrame(rows), f"{caption} {provenance(records)}", "targets")
    return Exhibit(shown_table.body, shown_table.caption, pd.DataFrame(numbers), "targets")


def _spread(values: Sequence[float], form: str = ".3g") -> str:
    deviation = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{deviation}"


def wire_table(records: Sequence[Record], caption: str, name: str) -> Exhibit:
    """A row a method: bytes of a mean upload, by definition, as measured and in parts; and of a mean download."""
    rows = []
    parts = dict.fromkeys(part for r in records for part in r["final"]["uplink_parts"] if part != "container")
    for label in dict.fromkeys(r["spec"]["label"] for r in records):
        own = [r for r in records if r["spec"]["label"] == label]
        row: dict[str, Any] = {"method": label}
        row["payload, as the released code counts"] = _mean_bytes(own, lambda r: r["final"]["paper_bits"] / 8)
        row["measured"] = _mean_bytes(own, lambda r: r["final"]["uplink_bytes"])
        for part in (*parts, "container"):
            there = part in own[0]["final"]["uplink_parts"]
            row[part] = _mean_bytes(own, lambda r, part=part: r["final"]["uplink_parts"][part]) if there else "–"
        row["entropy of the levels"] = _mean_bytes(own, _entropy) if "other_bits" in own[0]["rounds"][0] else "–"
        row["download, measured"] = _mean_bytes(own, lambda r: r["final"]["downlink_bytes"])
        rows.append(row)
    return table(pd.DataFrame(rows), f"{caption} {provenance(records)}", name)


def _entropy(r: Record) -> float:
    return float(sum(entry["other_bits"]["entropy"] for entry in r["rounds"]) / 8)


def _mean_bytes(records: Sequence[Record], total: Any) -> str:
    return f"{np.mean([total(r) / r['final']['uploads'] for r in records]):,.0f}"
