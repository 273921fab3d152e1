"""Tables and figures of partial training: what each policy saves, and what it costs in accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.benchmarks import benchmark
from fedlib.claims.measures import parameters, upload_bytes
from fedlib.methods.fedpt import mechanisms
from fedlib.pages.exhibit import MARKERS, Exhibit, canvas, drawn, spread, table
from fedlib.pages.figures import provenance
from fedlib.runs.record import Record

BUDGET = ("mechanism", "clip_norm", "noise_multiplier", "epsilon")  # of what a record says of privacy
PERCENT = ("bytes each way", "products", "time of a step", "memory, SGD", "memory, Adam")


def trained(r: Record) -> int:
    """Entries of the tensors that travel: the method's own definition counts 32 bits for each."""
    return round(r["final"]["paper_bits"] / r["final"]["uploads"] / 32)


def relative(network: str) -> pd.DataFrame:
    """A row a policy of a network, in percent of full training, as `bench/partial.py` has measured it."""
    rows = [r for r in benchmark("partial")["rows"] if r["network"] == network]
    full = rows[0]

    def percent(row: dict[str, Any]) -> dict[str, Any]:
        values = (
            row["bytes_up"] / full["bytes_up"],
            row["macs_ratio"],
            row["step_ratio"],
            row["peak_bytes"]["sgd"] / full["peak_bytes"]["sgd"],
            row["peak_bytes"]["adam"] / full["peak_bytes"]["adam"],
        )
        return {"frozen": row["policy"]} | {name: 100 * v for name, v in zip(PERCENT, values, strict=True)}

    return pd.DataFrame(percent(row) for row in rows)


def savings_figure(networks: Sequence[str], name: str) -> Exhibit:
    """A panel a network: what is left of bytes, time and memory under each policy."""
    shown = [PERCENT[0], PERCENT[2], PERCENT[3], PERCENT[4]]
    figure, axes = canvas(len(networks), 3.8)
    frames, says = [], []
    for ax, network in zip(axes, networks, strict=True):
        frame = relative(network).iloc[1:]
        places = np.arange(len(frame))
        for index, column in enumerate(shown):
            ax.bar(places + (index - 1.5) * 0.2, frame[column], 0.2, label=column, color=f"C{index}")
        ax.axhline(100, color="0.3", linewidth=1)
        short = [policy.partition("/")[2] for policy in frame["frozen"]]
        ax.set(title=network, xlabel="frozen")
        ax.set_xticks(places, short)
        frames.append(frame.assign(network=network))
        says += [
            f"{row.iloc[0]}: {row[shown[0]]:.0f}, {row[shown[1]]:.0f}, {row[shown[2]]:.0f}"
            for _, row in frame.iterrows()
        ]
    axes[0].set_ylabel("% of full training")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    alt = f"Bar charts of what is left in percent of full training. Bytes, time, memory with SGD: {'; '.join(says)}."
    made = benchmark("partial")
    caption = (
        "What is left of full training under each policy: bytes each way of the real messages, time of a local step, "
        f"most bytes in tensors during local training. One thread, medians of {made['turns']} turns; {made['cpu']}."
    )
    return drawn(figure, alt, caption, pd.concat(frames), name)


def policy_table(records: Sequence[Record], name: str) -> Exhibit:
    """A row a policy: entries trained, reduction, measured bytes of a message each way, accuracy and its spread."""
    rows = []
    for label in dict.fromkeys(r["spec"]["label"] for r in records):
        own = [r for r in records if r["spec"]["label"] == label]
        first = own[0]
        clients = sum(len(entry["clients"]) + len(entry["refused"]) for entry in first["rounds"])
        accuracy = [100 * r["final"]["accuracy"] for r in own]
        rows.append(
            {
                "method": label,
                "trained": f"{trained(first):,}",
                "share": f"{100 * trained(first) / parameters(first):.2f} %",
                "reduction": f"{parameters(first) / trained(first):.2f}",
                "bytes down": f"{first['final']['downlink_bytes'] / clients:,.0f}",
                "bytes up": f"{upload_bytes(first):,.0f}",
                "accuracy (%)": spread(accuracy),
            }
        )
    caption = f"Messages as measured; accuracy after the last round, mean and sample deviation. {provenance(records)}"
    return table(pd.DataFrame(rows), caption, name)


def spread_figure(
    records: Sequence[Record],
    x: Callable[[Record], Any],
    axis: str,
    caption: str,
    name: str,
    by: Callable[[Record], str] = lambda r: str(r["spec"]["label"]),
    panel: Callable[[Record], str] = lambda r: "",
    scale: str = "linear",
) -> Exhibit:
    """Final accuracy against a setting: mean over seeds, and a band from the lowest to the highest of them.

    scale: "linear", "log", or "each" for values that stand side by side, such as names.
    """
    frame = pd.DataFrame(
        {
            "panel": panel(r),
            "case": by(r),
            axis: x(r),
            "seed": r["spec"]["seed"],
            "accuracy": 100 * r["final"]["accuracy"],
        }
        for r in records
    )
    panels, cases, places = (list(dict.fromkeys(frame[column])) for column in ("panel", "case", axis))
    figure, axes = canvas(len(panels), 4.0)
    for ax, title in zip(axes, panels, strict=True):
        for index, case in enumerate(cases):
            own = frame[(frame["panel"] == title) & (frame["case"] == case)].groupby(axis, sort=False)["accuracy"]
            at = [places.index(value) for value in own.mean().index] if scale == "each" else own.mean().index
            style = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
            ax.plot(at, own.mean(), label=case, **style)
            ax.fill_between(at, own.min(), own.max(), color=style["color"], alpha=0.15, linewidth=0)
            if len(at) == 1:  # a band of no width
                ax.vlines(at, own.min(), own.max(), color=style["color"])
        ax.set(title=title, xlabel=axis)
        if scale == "each":
            ax.set_xticks(range(len(places)), places)
        else:
            ax.set_xscale(scale)
            ordered = sorted(places)
            if scale == "log" and all(b > 1.4 * a for a, b in itertools.pairwise(ordered)):
                ax.set_xticks(ordered, [f"{place:g}" for place in ordered])
                ax.minorticks_off()
            elif scale == "log":
                ax.xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("test accuracy (%)")
    if len(cases) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    means = frame.groupby(["panel", "case", axis], sort=False)["accuracy"].mean().reset_index()
    says = "; ".join(f"{p} {case} {at}: {mean:.1f}".strip() for p, case, at, mean in means.itertuples(index=False))
    alt = f"Line chart of test accuracy against {axis}. Means: {says}."
    return drawn(figure, alt, f"{caption} Mean, lowest and highest of the seeds. {provenance(records)}", frame, name)


def private_table(records: Sequence[Record], caption: str, name: str) -> Exhibit:
    """A row a mechanism, bound and noise: epsilon, accuracy, share of clipped updates, length of the mean's noise."""
    rows = []
    cases = dict.fromkeys((r["spec"]["label"], *(r["final"]["privacy"][key] for key in BUDGET)) for r in records)
    for case in cases:
        own = [r for r in records if (r["spec"]["label"], *(r["final"]["privacy"][key] for key in BUDGET)) == case]
        label, _, bound, noise, epsilon = case
        accuracy = [100 * r["final"]["accuracy"] for r in own]
        shares = [np.mean([entry["notes"]["clipped"] for entry in r["rounds"]]) for r in own]
        length = mechanisms.expected_norm(trained(own[0]), noise * bound / own[0]["spec"]["cohort"])
        rows.append(
            {
                "method": label,
                "C": bound,
                "noise multiplier": noise,
                "ε": "none" if epsilon is None else f"{epsilon:.2f}",
                "accuracy (%)": spread(accuracy),
                "clipped": f"{100 * np.mean(shares):.0f} %",
                "length of the noise": f"{length:.2f}",
            }
        )
    deltas = ", ".join(f"{delta:g}" for delta in dict.fromkeys(r["final"]["privacy"]["delta"] for r in records))
    caption = f"{caption} δ = {deltas}; mean and sample deviation over seeds. {provenance(records)}"
    return table(pd.DataFrame(rows), caption, name)
