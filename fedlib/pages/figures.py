"""Figures and tables of the pages, each drawn from records alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator

from fedlib.claims.measures import upload_bytes
from fedlib.claims.score import Score
from fedlib.pages.exhibit import MARKERS, MEGABYTE, Exhibit, canvas, drawn, table
from fedlib.runs.record import Record
from fedlib.runs.spec import Spec
from fedlib.wire import container


def provenance(records: Sequence[Record]) -> str:
    """The line that every caption ends with: scale, data set, seeds, device."""

    def each(values: Any) -> str:
        return ", ".join(dict.fromkeys(str(v) for v in values))

    specs = [r["spec"] for r in records]
    seeds = sorted({s["seed"] for s in specs})
    note = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"a single seed ({seeds[0]})"
    return (
        f"Profile {each(s['profile'] for s in specs)}; {each(s['data'] for s in specs)}; "
        f"{each(s['clients'] for s in specs)} clients, {each(s['cohort'] for s in specs)} a round; {note}; "
        f"{each(r['made']['device'] for r in records)}."
    )


def long(records: Sequence[Record]) -> pd.DataFrame:
    """One row an evaluated round of each record: label, data, split, seed, lr, round, accuracy in %, loss, bytes so
    far, the bits a parameter of the round's mean upload, as the paper's definition counts them, and the training loss
    that clients reported, if they did."""
    rows = []
    for r in records:
        up = np.cumsum([entry["uplink_bytes"] for entry in r["rounds"]])
        down = np.cumsum([entry["downlink_bytes"] for entry in r["rounds"]])
        for entry, u, d in zip(r["rounds"], up, down, strict=True):
            if entry["accuracy"] is not None:
                row = {name: r["spec"][name] for name in ("label", "data", "split", "seed", "lr")}
                row |= {"round": entry["round"], "accuracy": 100 * entry["accuracy"], "loss": entry["loss"]}
                bits = entry["paper_bits"] / max(1, len(entry["clients"])) / sum(r["parameters"].values())
                row["reported"] = entry.get("notes", {}).get("loss", math.nan)
                row |= {"bits": bits, "uplink_megabytes": u / MEGABYTE, "downlink_megabytes": d / MEGABYTE}
                rows.append(row | {"megabytes": (u + d) / MEGABYTE})
    return pd.DataFrame(rows)


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


def accuracy_curves(
    records: Sequence[Record],
    against: str = "round",
    quantity: str = "accuracy",
    among: Sequence[Record] = (),
    panel: str = "split",
) -> Exhibit:
    """Test accuracy (or another of QUANTITIES) against one of AXES: a line a method, a panel a split, or data set.

    among: records in whose order methods get their colours, where several figures are to agree.
    """
    frame = long(records)
    splits = list(dict.fromkeys(frame[panel]))
    tuned = frame.groupby(panel)["lr"].nunique().max() > 1
    figure, axes = canvas(len(splits))
    labels = list(dict.fromkeys(frame["label"]))
    colours = list(dict.fromkeys(r["spec"]["label"] for r in among or records))
    axis = AXES[against]
    for ax, split in zip(axes, splits, strict=True):
        for label in labels:
            own = frame[(frame[panel] == split) & (frame["label"] == label)]
            rates, part = ", ".join(f"{lr:g}" for lr in dict.fromkeys(own["lr"])), own.groupby("round")
            index, mean, x = colours.index(label), part[quantity].mean(), part[against].mean()
            style = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
            ax.plot(x, mean, label=f"{label} (lr {rates})" if tuned else label, **style)
            ax.fill_between(
                x, part[quantity].min(), part[quantity].max(), color=style["color"], alpha=0.15, linewidth=0
            )
            if len(x) == 1:  # a band of no width
                ax.vlines(x, part[quantity].min(), part[quantity].max(), color=style["color"])
        ax.set(title=split, xlabel=axis)
        if against == "round":
            ax.xaxis.get_major_locator().set_params(integer=True)
        else:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
    axes[0].set_ylabel(QUANTITIES[quantity])
    if quantity == "reported":  # a loss falls by factors
        axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    last = frame[frame["round"] == frame.groupby(["label", panel, "seed"])["round"].transform("max")]
    ends = last.groupby([panel, "label"])[quantity].mean()
    alt = f"Line chart of {QUANTITIES[quantity]} against {axis}. Mean at the end: " + "; ".join(
        f"{where}: {value:.3g}" for where, value in zip((", ".join(key) for key in ends.index), ends, strict=True)
    )
    what = QUANTITIES[quantity].capitalize()
    caption = f"{what} against {axis}. Line: mean over seeds; band: smallest to largest seed. {provenance(records)}"
    return drawn(figure, alt, caption, frame, f"{quantity}-against-{against.replace('_', '-')}")


def accuracy_table(records: Sequence[Record]) -> Exhibit:
    """Final test accuracy per method and partition: mean, sample deviation, and each seed's value."""
    frame = pd.DataFrame(
        {
            "method": r["spec"]["label"],
            "partition": r["spec"]["split"],
            "lr": r["spec"]["lr"],
            "seed": r["spec"]["seed"],
            "accuracy": 100 * r["final"]["accuracy"],
        }
        for r in records
    )
    rows = []
    for (method, split, lr), part in frame.groupby(["method", "partition", "lr"], sort=False):
        seeds = ", ".join(f"{v:.2f}" for v in part.sort_values("seed")["accuracy"])
        spread = f"{part['accuracy'].std():.2f}" if len(part) > 1 else "single seed"
        mean = f"{part['accuracy'].mean():.2f}"
        rows.append(
            {
                "method": method,
                "partition": split,
                "lr": f"{lr:g}",
                "mean (%)": mean,
                "deviation": spread,
                "each seed (%)": seeds,
            }
        )
    caption = f"Test accuracy after the last round. {provenance(records)}"
    return table(pd.DataFrame(rows), caption, "accuracy")


def payload_table(records: Sequence[Record], expected: dict[str, dict[str, int]] | None = None) -> Exhibit:
    """Measured bytes of one mean upload, part by part, beside what the specification works out where it does."""
    rows = []
    for label in dict.fromkeys(r["spec"]["label"] for r in records):
        chosen = [r for r in records if r["spec"]["label"] == label]
        final = chosen[0]["final"]
        for part, total in final["uplink_parts"].items():
            bytes_ = total / final["uploads"]
            worked = (expected or {}).get(label, {}).get(part)
            rows.append({"method": label, "part": part, "measured bytes": f"{bytes_:,.0f}", "worked out": worked})
        mean = upload_bytes(chosen[0])
        rows.append({"method": label, "part": "whole upload", "measured bytes": f"{mean:,.0f}", "worked out": None})
    frame = pd.DataFrame(rows)
    frame["worked out"] = [f"{int(v):,}" if pd.notna(v) else "–" for v in frame["worked out"]]
    return table(
        frame, f"Bytes of one upload, measured on the messages that were sent. {provenance(records)}", "payload"
    )


def setup_table(experiments: dict[str, Any], profile: str, theirs: str = "authors' scripts") -> Exhibit:
    """Every setting: the authors' value, the value of this profile, unit and source; then the methods' own settings.

    theirs: what profile `paper` stands for.
    """
    rows = []
    for name, setting in experiments["settings"].items():
        value, paper = setting.get(profile, "–"), setting.get("paper", "not stated")
        rows.append(
            {
                "setting": name,
                theirs: paper,
                "here": value,
                "unit": setting["unit"],
                "source": setting["source"],
            }
        )
    for label, method in experiments["methods"].items():
        if "paper" not in method:  # a check of this project's own, which the authors' scripts do not have
            continue
        settings = {name: method[name] for name in ("lr",) if name in method} | method["hyper"]
        text = ", ".join(f"{name} {value}" for name, value in settings.items())
        paper = method["paper"]
        rows.append({"setting": label, theirs: paper, "here": text, "unit": "", "source": method["source"]})
    return table(pd.DataFrame(rows), f"Set-up: {theirs} beside profile {profile}.", "setup")


def score_table(results: Sequence[Score], caption: str) -> Exhibit:
    """One row a claim: what is said, where, our criterion, what was measured, the verdict."""
    rows = []
    for s in results:
        claim = s.claim
        cases = [_case(case, values, claim.get("values", "seeds")) for case, values in s.values.items() if values]
        low, high = claim.get("holds", (None, None))
        criterion = f"{low} to {high} {claim['unit']}" if low is not None else "–"
        rows.append(
            {
                "claim": claim["says"],
                "read in": claim["source"],
                "criterion": criterion,
                "measured": "; ".join(cases) or "–",
                "verdict": s.verdict.upper() if s.verdict == "does not hold" else s.verdict,
                "note": s.note or "–",
            }
        )
    return table(pd.DataFrame(rows), caption, "scorecard")


def _case(name: str, values: list[float], what: str) -> str:
    spread = f" ({min(values):.2f} to {max(values):.2f})" if min(values) < max(values) else ""
    return f"{name}: {np.mean(values):.2f}{spread}, {len(values)} {what if len(values) > 1 else what.removesuffix('s')}"


def record_table(found: Sequence[tuple[Spec, Record | None, str]], caption: str) -> Exhibit:
    """Every run with its record: state, day, seconds, device, versions, commit."""
    rows = []
    for spec, r, reason in found:
        made = r["made"] if r else {}
        rows.append(
            {
                "run": f"{spec.paper}/{spec.profile}/{spec.name}",
                "state": "fresh" if not reason else f"STALE: {reason}" if r else "not run",
                "made": made.get("time", "–")[:10],
                "seconds": made.get("seconds", "–"),
                "device": made.get("device", "–"),
                "torch": made.get("versions", {}).get("torch", "–"),
                "commit": made.get("commit", "–")[:8],
                "code": r["code"][:8] if r else "–",
            }
        )
    return table(pd.DataFrame(rows), caption, "records")


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
    frame: pd.DataFrame, x: str, y: str, by: str, alt: str, caption: str, name: str, scale: str = "linear"
) -> Exhibit:
    """Column `y` against `x`, one line a value of `by`; column names are the axis labels.

    scale: of both axes, "linear" or "log"; "log y" is for the vertical one alone.
    """
    figure, axes = canvas(height=4.0)
    figure.set_figwidth(7.2)  # one panel over the page's width, with letters no larger than the text's
    for index, (label, part) in enumerate(frame.groupby(by, sort=False)):
        style = {
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": ("-", "--", "-.", ":")[index % 4],
            "markersize": 5,
        }
        every = max(1, len(part) // 12)
        axes[0].plot(part[x], part[y], color=f"C{index}", label=label, markevery=every, **style)
    axes[0].set(xlabel=x, ylabel=y, xscale="linear" if scale == "log y" else scale, yscale=scale.split()[0])
    if x == "round" and scale != "log":
        axes[0].xaxis.get_major_locator().set_params(integer=True)
    if frame[by].nunique() <= 6:
        axes[0].legend()
    else:  # too many for a corner
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawn(figure, alt, caption, frame, name)
