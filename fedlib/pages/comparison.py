"""Methods beside each other by what they cost: Pareto fronts, bytes to a target, and which methods go together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.benchmarks import benchmark
from fedlib.claims.results import FRESH, MEGABYTE, each, list_columns, where
from fedlib.claims.targets import reach
from fedlib.errors import SpecError
from fedlib.methods import registry
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, draw_point, drawn, scale_by_factors, spread, table
from fedlib.pages.tables import Cells, average, deviate, summarize
from fedlib.runs.spec import Spec

UP, BOTH = "uploaded", "both ways"
COSTS = {"label": "method", "split": "partition", "seed": "seed", "accuracy": "accuracy"}
COSTS |= {"uplink_megabytes": UP, "megabytes": BOTH}
PER_ROW = 5  # names in a legend


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (cost, gain) that no other beats: none costs as little or less and gains more, or costs less
    and gains as much. In ascending order of cost."""
    best, found = -np.inf, []
    for place in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[place][1] > best:
            best = points[place][1]
            found.append(place)
    return found


def list_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a run: method, partition, seed, accuracy (%), MB uploaded and both ways."""
    return runs[list(COSTS)].rename(columns=COSTS)


def name_front(runs: pd.DataFrame, way: str) -> list[str]:
    """The methods on the front of the mean accuracies over the mean MB of a way, in ascending order of MB."""
    means = list_costs(runs).groupby("method", sort=False)[[way, "accuracy"]].mean()
    return [str(means.index[i]) for i in find_front([tuple(point) for point in means.to_numpy()])]


def front_figure(runs: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """Final accuracy against MB, a panel for the way up and one for both; the front of the means drawn through them.

    One partition. Combinations have open marks.
    """
    frame = list_costs(runs)
    means = frame.groupby("method", sort=False)[["accuracy", UP, BOTH]].mean()
    combined = set(where(runs, group="combine")["label"])
    figure, axes = canvas(2, height=4.6)
    facts = []
    for ax, way in zip(axes, (UP, BOTH), strict=True):
        for index, (method, own) in enumerate(each(frame, "method")):
            draw_point(ax, own[way], own["accuracy"], index, method, filled=method not in combined)
        front = means.loc[name_front(runs, way)]
        ax.plot(front[way], front["accuracy"], color="grey", linewidth=1, zorder=0)
        for method, point in front.iterrows() if not combined else ():  # combinations have long names, and lie close
            place = (point[way], point["accuracy"])
            ax.annotate(method, place, (-4, 6), textcoords="offset points", ha="right", fontsize="small")
        ax.set(xlabel=f"MB of a run, {way} (logarithmic)")
        scale_by_factors(ax)
        ax.margins(x=0.2)  # room for names
        facts.append(f"On the front by MB {way}: {', '.join(map(str, front.index))}.")
    axes[0].set_ylabel("test accuracy (%)")
    add_legend(figure, axes, PER_ROW)
    alt = f"Two scatter plots of final test accuracy against megabytes sent. {' '.join(facts)}"
    how = "Mean over seeds; bars: minimum to maximum over seeds; the line joins what no other method beats."
    return drawn(figure, alt, f"{caption} {how}", frame, name, runs)


def result_table(runs: pd.DataFrame, caption: str, name: str, against: str = "fedavg") -> Exhibit:
    """A row a method: accuracy, also less that of `against` seed by seed, MB each way, and how many times less than
    `against` that is, with an asterisk on the front."""
    base = where(runs, label=against).set_index("seed")
    gap = runs["accuracy"] - base["accuracy"].reindex(runs["seed"]).to_numpy()

    def more(own: pd.DataFrame) -> str:
        return spread(own["gap"].dropna()) if own["label"].iloc[0] != against else "–"

    cells: Cells = {"accuracy (%)": deviate("accuracy"), f"over {against} (points)": more}
    for way, column in ((UP, "uplink_megabytes"), (BOTH, "megabytes")):
        front, dense = name_front(runs, way), base[column].mean()

        def less(own: pd.DataFrame, column: str = column, dense: float = dense, front: list[str] = front) -> str:
            return f"{dense / own[column].mean():.1f}" + "*" * (own["label"].iloc[0] in front)

        cells |= {f"MB {way}": average(column, ".2f"), f"times less {way}": less}
    caption = f"{caption} An asterisk: on the front."
    return summarize(runs.assign(gap=gap), {"label": "method"}, cells, caption, name, list_costs(runs))


def tuning_table(planned: pd.DataFrame, name: str) -> Exhibit:
    """Final accuracy at each point of the methods' grids: a row a value of a method's own setting, a column a rate.

    A run without a fresh record is shown as one that diverged; a method without any is left out.
    """
    rows, numbers = [], []
    done = where(planned, state=FRESH)
    rates = sorted(planned["lr"].unique())
    for label, own in each(where(planned, label=set(done["label"])), "label"):
        setting, best = find_setting(own), take_tuned(where(own, state=FRESH))["run"]
        for value, part in each(own, setting):
            row: dict[str, Any] = {"method, its own setting": f"{label}, {setting.removeprefix('hyper.')} {value}"}
            row |= {f"lr {rate:g}": "" for rate in rates}
            for r in part.to_dict("records"):
                accuracy = r["accuracy"] if r["state"] == FRESH else np.nan
                shown = "–" if np.isnan(accuracy) else f"{accuracy:.1f}" + "*" * (r["run"] == best)
                row[f"lr {r['lr']:g}"] = shown
                point = {"method": label, "lr": r["lr"], "setting": setting, "value": value}
                numbers.append(point | {"accuracy": accuracy})
            rows.append(row)
    caption = (
        "Tuning: final test accuracy (%) at each learning rate (lr) and value of the method's own setting; * marks the "
        f"run taken{', – a run that diverged' * (len(done) < len(planned))}."
    )
    return table(pd.DataFrame(rows), caption, name, done, pd.DataFrame(numbers))


def find_setting(runs: pd.DataFrame) -> str:
    """The column beside lr that a method's tuning runs differ in: "momentum", or one of its settings."""
    names = (*list_columns(runs, "hyper."), "momentum")
    return next(name for name in names if runs[name].astype("str").nunique() > 1)


def take_tuned(runs: pd.DataFrame) -> pd.Series:
    """Of a method's tuning runs the most accurate; of equals the first."""
    return runs.iloc[int(runs["accuracy"].argmax())]


def target_table(runs: pd.DataFrame, rounds: pd.DataFrame, targets: Sequence[float], name: str) -> Exhibit:
    """MB, uploaded and both ways, until a method first reaches each accuracy (%), at the rounds that were evaluated."""
    rows, numbers = [], []
    for label, own in each(runs, "label"):
        row: dict[str, Any] = {"method": label}
        for target in targets:
            spent = reach(own, rounds, target)
            missed = (~spent["ever"]).sum()
            note = f" ({missed} of {len(own)} missed it)" if missed else ""
            for way, column in ((UP, "megabytes"), (BOTH, "both ways")):
                shown = f"{'≥ ' if missed else ''}{spent[column].mean():.2f}"
                row[f"{target:g} %, {way}"] = "not reached" if missed == len(own) else shown + note * (way == UP)
                numbers.append(
                    pd.DataFrame(
                        {"method": label, "target": target, "seed": own["seed"], "way": way}
                        | {"reached": spent["ever"], "MB": spent[column]}
                    )
                )
        rows.append(row)
    caption = (
        "MB of all clients until the test accuracy was first reached, mean over seeds; one that missed it counts with "
        "its whole run, so that the mean is a lower bound (≥)."
    )
    return table(pd.DataFrame(rows), caption, name, runs, pd.concat(numbers, ignore_index=True))


def skew_table(runs: pd.DataFrame, plain: str, skewed: str, name: str) -> Exhibit:
    """A row a method: accuracy on two partitions, and what the skew costs, seed by seed."""

    def lose(own: pd.DataFrame) -> str:
        by_seed = own.pivot_table(index="seed", columns="split", values="accuracy")
        return spread(by_seed[plain] - by_seed[skewed])

    def show(own: pd.DataFrame, split: str) -> str:
        return spread(where(own, split=split)["accuracy"])

    cells: Cells = {split: functools.partial(show, split=split) for split in (plain, skewed)}
    caption = (
        f"Final test accuracy (%) with clients alike ({plain}) and skewed ({skewed}): mean ± sample deviation over "
        "seeds."
    )
    cells |= {"lost by the skew (points)": lose}
    return summarize(runs, {"label": "method"}, cells, caption, name, list_costs(runs))


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
    return {"least": 8, "most": 8} if "patience" in registry.METHODS[method].defaults() else {}
