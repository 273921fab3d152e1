"""Methods beside each other by what they cost: Pareto fronts, bytes to a target, and which methods go together."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator

from fedlib.claims.benchmarks import benchmark
from fedlib.claims.targets import reached
from fedlib.errors import SpecError
from fedlib.methods import registry
from fedlib.pages.exhibit import MARKERS, MEGABYTE, Exhibit, canvas, drawn, spread, table
from fedlib.pages.figures import provenance
from fedlib.pages.tables import field
from fedlib.runs.record import Record
from fedlib.runs.spec import Spec

UP, BOTH = "uploaded", "both ways"
PER_ROW = 5  # names in a legend


def megabytes(r: Record, way: str, rounds: int | None = None) -> float:
    """Of all messages of a run, or of its first rounds, measured."""
    sent = sum(e["uplink_bytes"] + (e["downlink_bytes"] if way == BOTH else 0) for e in r["rounds"][:rounds])
    return float(sent) / MEGABYTE


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (cost, gain) that no other beats: none costs as little or less and gains more, or costs less
    and gains as much. In ascending order of cost."""
    best, found = -np.inf, []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            best = points[place][1]
            found.append(place)
    return found


def frame_of(records: Sequence[Record]) -> pd.DataFrame:
    """A row a run: method, partition, seed, accuracy (%), MB uploaded and both ways."""
    return pd.DataFrame(
        {
            "method": r["spec"]["label"],
            "partition": r["spec"]["split"],
            "seed": r["spec"]["seed"],
            "accuracy": 100 * r["final"]["accuracy"],
            UP: megabytes(r, UP),
            BOTH: megabytes(r, BOTH),
        }
        for r in records
    )


def front_figure(records: Sequence[Record], caption: str, name: str) -> Exhibit:
    """Final accuracy against MB, a panel for the way up and one for both; the front of the means drawn through them.

    One partition; bars from the lowest seed to the highest. Combinations have open marks.
    """
    frame = frame_of(records)
    names = list(dict.fromkeys(frame["method"]))
    joined = {r["spec"]["label"] for r in records if r["spec"]["group"] == "combine"}
    figure, axes = canvas(2, height=4.6)
    facts = []
    for ax, way in zip(axes, (UP, BOTH), strict=True):
        means = []
        for index, method in enumerate(names):
            own = frame[frame["method"] == method]
            x, y = own[way].mean(), own["accuracy"].mean()
            means.append((float(x), float(y)))
            style = dict(fmt=MARKERS[index % len(MARKERS)], color=f"C{index % 10}", markersize=7, capsize=2)
            fill = "none" if method in joined else None
            bars = [[y - own["accuracy"].min()], [own["accuracy"].max() - y]]
            ax.errorbar(x, y, bars, label=method, markerfacecolor=fill, **style)
        on = front(means)
        ax.plot(*zip(*(means[i] for i in on), strict=True), color="grey", linewidth=1, zorder=0)
        for i in on if not joined else ():  # combinations have long names, and lie close together
            ax.annotate(names[i], means[i], (-4, 6), textcoords="offset points", ha="right", fontsize="small")
        ax.set(xscale="log", xlabel=f"MB of a run, {way} (logarithmic)")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.margins(x=0.2)  # room for names
        facts.append(f"On the front by MB {way}: {', '.join(names[i] for i in on)}.")
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=PER_ROW)
    alt = f"Two scatter plots of final test accuracy against megabytes sent. {' '.join(facts)}"
    how = "Mean over seeds, bars from the lowest to the highest; the line joins what no other method beats."
    return drawn(figure, alt, f"{caption} {how} {provenance(records)}", frame, name)


def result_table(records: Sequence[Record], caption: str, name: str, against: str = "fedavg") -> Exhibit:
    """A row a method: accuracy, also less that of `against` seed by seed, MB each way, and how many times less than
    `against` that is, with an asterisk on the front."""
    frame, rows = frame_of(records), []
    names = list(dict.fromkeys(frame["method"]))
    means = frame.groupby("method")[["accuracy", UP, BOTH]].mean()
    accuracies = frame.pivot_table(index="seed", columns="method", values="accuracy")
    on = {w: {names[i] for i in front([tuple(means.loc[n, [w, "accuracy"]]) for n in names])} for w in (UP, BOTH)}
    for method in names:
        own = accuracies[method].dropna()
        more = spread(list((own - accuracies[against]).dropna())) if method != against else "–"
        row: dict[str, Any] = {"method": method, "accuracy (%)": spread(list(own)), f"over {against} (points)": more}
        for way in (UP, BOTH):
            row[f"MB {way}"] = f"{means.loc[method, way]:.2f}"
            less = f"{means.loc[against, way] / means.loc[method, way]:.1f}"
            row[f"times less {way}"] = less + "*" * (method in on[way])
        rows.append(row)
    shown = table(pd.DataFrame(rows), f"{caption} An asterisk: on the front. {provenance(records)}", name)
    return Exhibit(shown.body, shown.caption, frame, name)


def tuning_table(runs: Sequence[tuple[Spec, Record | None]], name: str) -> Exhibit:
    """Final accuracy at each point of the methods' grids: a row a value of a method's own setting, a column a rate.

    A run without a record is shown as one that diverged; a method without any is left out.
    """
    rows, numbers = [], []
    records = [r for _, r in runs if r]
    rates = sorted({spec.lr for spec, _ in runs})
    for label in dict.fromkeys(r["spec"]["label"] for r in records):
        own = [r or {"spec": spec.as_dict()} for spec, r in runs if spec.label == label]
        setting = own_setting(own)
        top = tuned([r for r in own if "final" in r])
        for value in dict.fromkeys(field(r, setting) for r in own):
            row: dict[str, Any] = {"method, its own setting": f"{label}, {setting.removeprefix('hyper.')} {value}"}
            row |= {f"lr {rate:g}": "" for rate in rates}
            for r in (r for r in own if field(r, setting) == value):
                rate, accuracy = r["spec"]["lr"], 100 * r["final"]["accuracy"] if "final" in r else np.nan
                row[f"lr {rate:g}"] = "–" if np.isnan(accuracy) else f"{accuracy:.1f}" + "*" * (r is top)
                numbers.append({"method": label, "lr": rate, "setting": setting, "value": value, "accuracy": accuracy})
            rows.append(row)
    caption = (
        "Tuning: final test accuracy (%) at each learning rate (lr) and value of the method's own setting; * marks the "
        f"run taken{', – a run that diverged' * (len(records) < len(runs))}. {provenance(records)}"
    )
    shown = table(pd.DataFrame(rows), caption, name)
    return Exhibit(shown.body, shown.caption, pd.DataFrame(numbers), name)


def own_setting(records: Sequence[Record]) -> str:
    """The field beside lr that a method's tuning runs differ in: "momentum", or one of its hyper-parameters."""
    found = [f"hyper.{key}" for r in records for key in r["spec"]["hyper"]] + ["momentum"]
    return next(key for key in dict.fromkeys(found) if len({str(field(r, key)) for r in records}) > 1)


def tuned(records: Sequence[Record]) -> Record:
    """Of a method's tuning runs the most accurate; of equals the first."""
    return max(records, key=lambda r: r["final"]["accuracy"])


def target_table(records: Sequence[Record], targets: Sequence[float], name: str) -> Exhibit:
    """MB, uploaded and both ways, until a method first reaches each accuracy (%), at the rounds that were evaluated."""
    rows, numbers = [], []
    for label in dict.fromkeys(r["spec"]["label"] for r in records):
        row: dict[str, Any] = {"method": label}
        own = [r for r in records if r["spec"]["label"] == label]
        for target in targets:
            found = [reached(r, target / 100) for r in own]
            missed = sum(not f.ever for f in found)
            note = f" ({missed} of {len(found)} missed it)" if missed else ""
            values = {"method": label, "target": target}
            for way in (UP, BOTH):
                sent = [megabytes(r, way, f.rounds) for r, f in zip(own, found, strict=True)]
                shown = f"{'≥ ' if missed else ''}{statistics.fmean(sent):.2f}"
                row[f"{target:g} %, {way}"] = "not reached" if missed == len(found) else shown + note * (way == UP)
                numbers += [
                    {**values, "seed": r["spec"]["seed"], "way": way, "reached": f.ever, "MB": mb}
                    for r, f, mb in zip(own, found, sent, strict=True)
                ]
        rows.append(row)
    caption = (
        "MB of all clients until the test accuracy was first reached, mean over seeds; one that missed it counts with "
        f"its whole run, so that the mean is a lower bound (≥). {provenance(records)}"
    )
    made = table(pd.DataFrame(rows), caption, name)
    return Exhibit(made.body, made.caption, pd.DataFrame(numbers), name)


def skew_table(records: Sequence[Record], plain: str, skewed: str, name: str) -> Exhibit:
    """A row a method: accuracy on two partitions, and what the skew costs, seed by seed."""
    rows, frame = [], frame_of(records)
    for label in dict.fromkeys(frame["method"]):
        own = frame[frame["method"] == label].pivot_table(index="seed", columns="partition", values="accuracy")
        gap = list(own[plain] - own[skewed])
        row = {"method": label, plain: spread(list(own[plain])), skewed: spread(list(own[skewed]))}
        rows.append(row | {"lost by the skew (points)": spread(gap)})
    caption = (
        f"Final test accuracy (%) with clients alike ({plain}) and skewed ({skewed}): mean ± sample deviation over "
        f"seeds. {provenance(records)}"
    )
    shown = table(pd.DataFrame(rows), caption, name)
    return Exhibit(shown.body, shown.caption, frame, name)


def work_table(name: str) -> Exhibit:
    """A client's time and memory under each method, over FedAvg's, from the benchmark."""
    found = benchmark("compare")
    rows = [
        {
            "method": row["method"],
            "time, fedavg = 1": f"{row['time_ratio']:.2f}",
            "peak memory, fedavg = 1": f"{row['memory_ratio']:.2f}",
            "time (ms)": f"{row['ms']:.0f}",
            "peak memory (MB)": f"{row['peak_bytes'] / MEGABYTE:.1f}",
        }
        for row in found["rows"]
    ]
    caption = (
        "A client's round, from the bytes that it receives to those that it sends. Times are medians over "
        f"{found['turns']} turns, ratios medians of each turn's ratio. {found['samples']} images; "
        f"{found['cpu']}, one thread."
    )
    return table(pd.DataFrame(rows), caption, name)


WITH: dict[str, dict[str, Any]] = {
    "a part frozen": {"frozen": "emnist/dense1", "model": "emnist-narrow"},
    "sent down by FedDQ": {
        "downlink": {"method": "feddq", "hyper": {"schedule": "fixed", "width": 8, "quantizer": "affine_nearest"}}
    },
    "sent down by FedCompress": {
        "downlink": {"method": "fedcompress", "hyper": {"least": 16, "most": 16, "layers": "all"}}
    },
    "error feedback": {"feedback": True},
}


def pair_table(like: Spec, names: Sequence[str], name: str) -> Exhibit:
    """A row a method, a column what it may be combined with: "yes", or why the specification is refused."""
    rows = []
    for method in names:
        own = dataclasses.replace(like, method=method, hyper=_hyper(method))
        rows.append({"method": method} | {with_: _refusal(own, change) or "yes" for with_, change in WITH.items()})
    caption = "Which combinations a specification may ask for; else why it is refused."
    return table(pd.DataFrame(rows), caption, name)


def _refusal(own: Spec, change: dict[str, Any]) -> str:
    try:
        dataclasses.replace(own, **change)
    except SpecError as error:
        return str(error).partition(": ")[2].partition(";")[0]  # without field and remedy
    return ""


def _hyper(method: str) -> dict[str, Any]:
    """Settings with which a method can be built without held-out samples."""
    fields = {f.name for f in dataclasses.fields(registry.METHODS[method].Hyper)}
    return {"least": 8, "most": 8} if "patience" in fields else {}
