"""The page of FedDQ: ranges and widths by round, what is sent until an accuracy is reached, parts and directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
from IPython.display import Markdown

from fedlib.claims.results import each, join_rounds, list_columns, where
from fedlib.claims.targets import DENSE
from fedlib.claims.tuning import take_winners, weigh
from fedlib.pages.client_diagnostics import gradient_noise
from fedlib.pages.exhibit import Exhibit, add_legend, picture, spread, table
from fedlib.pages.figures import BAND, draw_panels, lines_by_round
from fedlib.pages.page import ABSENT, NOT_RUN, Page, means
from fedlib.pages.tables import Cells, average, deviate, gather_notes, name_setting, summarize, tell_each
from fedlib.runs.experiments import specs

LAYERS = {  # of the networks, by the number in the names of their tensors
    "vanilla": {"0": "first convolution", "3": "second convolution", "7": "hidden layer", "9": "output layer"},
    "mlp": {"1": "hidden layer", "3": "output layer"},
}
QUOTED = {  # columns of runs, and their form in a sentence
    "bits": ("bits", ".2f"),
    "accuracy": ("late_accuracy", ".1f"),
    "coded": ("coded", ".2f"),
    "start": ("first.bits", ".2f"),
    "last": ("last.bits", ".2f"),
}


def name_tensor(model: str, tensor: str) -> str:
    """A tensor in words."""
    index, kind = tensor.split(".")
    return LAYERS[model][index] + (", bias" if kind == "bias" else "")


def follow_tensors(runs: pd.DataFrame, rounds: pd.DataFrame, note: str) -> pd.DataFrame:
    """A row a round, run and tensor: what FedDQ notes of it (`ranges` or `widths`) as `value`, its name as `tensor`."""
    prefix = f"notes.{note}."
    there = list_columns(rounds[rounds["run"].isin(runs["run"])], prefix)
    names = (name.removeprefix(prefix) for name in there)
    tensors = sorted(names, key=lambda name: ("bias" in name, int(name.partition(".")[0])))
    frame = gather_notes(runs, rounds, {prefix + name: name for name in tensors})
    return frame.assign(tensor=[name_tensor(*pair) for pair in zip(frame["model"], frame["of"], strict=True)])


def range_figure(runs: pd.DataFrame, rounds: pd.DataFrame) -> Exhibit:
    """Range of each weight tensor's update by round."""
    frame = follow_tensors(runs, rounds, "ranges").rename(columns={"tensor": "case"})
    frame = frame[~frame["case"].str.contains("bias")]
    alt = "Range of each weight tensor's update over rounds: a fall in the first rounds, then a slow one."
    caption = "Range of the updates of FedDQ, each weight tensor, mean over clients and seeds."
    return lines_by_round(frame, "value", "range", alt, caption, "ranges", runs, "log y")


def signal_figure(runs: pd.DataFrame, rounds: pd.DataFrame) -> Exhibit:
    """Ranges of the weight tensors and the root of the training loss, both relative to the first round."""
    ranges = follow_tensors(runs, rounds, "ranges")
    ranges = ranges[~ranges["tensor"].str.contains("bias")].assign(case="range, " + ranges["tensor"])
    loss = gather_notes(runs, rounds, {"notes.loss": "loss"}).assign(case="square root of the training loss")
    loss["value"] **= 0.5
    frame = pd.concat([ranges, loss], ignore_index=True)
    frame["value"] /= frame.groupby(["run", "case"])["value"].transform("first")
    y = "relative to the first round"
    alt = "Ranges and the square root of the training loss, each relative to the first round."
    caption = (
        "Ranges beside the square root of the training loss, by which AdaQuantFL sets its levels, both relative to the "
        "first round."
    )
    return lines_by_round(frame, "value", y, alt, caption, "range-and-loss", runs, "log y")


def width_figure(runs: pd.DataFrame, rounds: pd.DataFrame) -> Exhibit:
    """Bits an entry by round, by the released code's count."""
    frame = join_rounds(runs, rounds).rename(columns={"label": "case"})
    alt = "Bits an entry over rounds: FedDQ descends, AdaQuantFL ascends, a fixed width stays."
    caption = "Bits an entry over rounds, mean over entries, clients and seeds."
    return lines_by_round(frame, "bits", "bits an entry", alt, caption, "bits-over-rounds", runs)


def entropy_figure(runs: pd.DataFrame, rounds: pd.DataFrame) -> Exhibit:
    """What an ideal entropy coder would take for the levels, by round."""
    frame = join_rounds(runs, rounds).rename(columns={"label": "case"})
    frame = frame.assign(entropy=frame["other_bits.entropy"] / frame["uploads"] / frame["parameters"])
    y = "entropy of the levels, bits an entry"
    alt = "Empirical entropy of the levels over rounds, for each schedule."
    caption = "Empirical entropy of the levels, a histogram a tensor, mean over clients and seeds."
    return lines_by_round(frame, "entropy", y, alt, caption, "entropy-over-rounds", runs)


def quantizer_table(runs: pd.DataFrame, name: str) -> Exhibit:
    """A row a method, a column a quantizer: final accuracy, and bits an entry in the mean over the run."""
    runs = runs.assign(quantizer=name_setting(runs, "quantizer", "affine_stochastic"))

    def tell_run(own: pd.DataFrame) -> str:
        return f"{spread(own['accuracy'], '.3g')} % at {own['bits'].mean():.2f} bits"

    caption = (
        "Test accuracy after the last round, mean and sample deviation over seeds, and bits an entry by the released "
        "code's count, mean over the run."
    )
    return summarize(runs, {"label": "method"}, tell_each(runs, "quantizer", tell_run), caption, name)


def downlink_table(runs: pd.DataFrame, name: str) -> Exhibit:
    """A row a method and resolution of the broadcast: accuracy, bytes of a mean upload and download."""
    down = {
        when: 8 * runs[f"{when}.downlink_bytes"] / runs[f"{when}.uploads"] / runs["parameters"]
        for when in ("first", "last")
    }
    resolution = name_setting(runs, "downlink", 0).replace({0: "float32"})
    runs = runs.assign(resolution=resolution, begin=down["first"], end=down["last"])
    sizes = {f"{way} of a message": runs[f"{way}_bytes"] / runs["uploads"] for way in ("uplink", "downlink")}
    runs = runs.assign(**sizes)
    cells: Cells = {"accuracy (%)": deviate("accuracy", ".3g")}
    cells |= {f"{way} bytes": average(f"{way} of a message") for way in ("uplink", "downlink")}
    cells |= {
        "bits a parameter down, first to last round": lambda own: (
            f"{own['begin'].mean():.2f} to {own['end'].mean():.2f}"
        )
    }
    by = {"label": "method", "resolution": "resolution of the download"}
    return summarize(runs, by, cells, "Bytes of a mean message in each direction.", name)


def wire_table(runs: pd.DataFrame, rounds: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """A row a method: bytes of a mean upload, by definition, as measured and in parts; and of a mean download."""
    totals = {"payload, as the released code counts": runs["paper_bits"] / 8, "measured": runs["uplink_bytes"]}
    for column in sorted(list_columns(runs, "part."), key=lambda column: column == "part.container"):
        totals[column.removeprefix("part.")] = runs[column]
    entropy = rounds.groupby("run")["other_bits.entropy"].sum(min_count=1) / 8
    totals["entropy of the levels"] = runs["run"].map(entropy)
    totals["download, measured"] = runs["downlink_bytes"]
    sizes = {what: total / runs["uploads"] for what, total in totals.items()}
    cells: Cells = {what: average(what) for what in sizes}
    return summarize(runs.assign(**sizes), {"label": "method"}, cells, caption, name)


def sweep_figure(runs: pd.DataFrame, setting: str, guides: Mapping[str, float], name: str) -> Exhibit:
    """Final accuracy, and bits an entry in the last round and in the mean, against a setting on a logarithmic axis.

    guides: values of it to be marked, by what they are.
    """
    short = setting.removeprefix("hyper.")
    shown = {setting: short, "seed": "seed", "accuracy": "accuracy"}
    shown |= {"bits": "bits in the mean", "last.bits": "bits in the last round"}
    frame = runs[list(shown)].rename(columns=shown).infer_objects()
    points = frame.melt([short, "seed"], var_name="what")
    points["unit"] = points["what"].map(lambda what: "test accuracy (%)" if what == "accuracy" else "bits an entry")
    figure, axes = draw_panels(points, "value", short, "unit", "what", height=3.8, sharey=False)
    values = sorted(set(frame[short]))
    for ax in axes:
        for index, (what, value) in enumerate(guides.items()):
            ax.axvline(value, color="black", linestyle=("--", ":")[index], label=f"guide {what}")
        ax.set(xscale="log", xlabel=short, ylabel=ax.get_title(), title="")
        ax.set_xticks(values, [f"{value:g}" for value in values], rotation=45)
        ax.minorticks_off()
    add_legend(figure, axes)
    means = frame.groupby(short)[["accuracy", "bits in the mean"]].mean()
    facts = "; ".join(
        f"{x:g}: {a:.1f} %, {b:.2f} bits" for x, (a, b) in zip(means.index, means.to_numpy(), strict=True)
    )
    marks = ", ".join(f"{what} {value:.3g}" for what, value in guides.items())
    alt = f"Two line charts, accuracy and bits an entry against {short}. {facts}. Guide values: {marks}."
    caption = (
        f"Accuracy after the last round and bits an entry against the {short}. {BAND} Vertical lines: guide value "
        f"{marks}."
    )
    return picture(figure, alt, caption, frame, name, runs)


def guide_values(page: Page, last: int) -> dict[str, float]:
    """The guide value of the resolution before round 1 and before round `last`, measured on the run of the search."""
    spec = specs("feddq", page.profile, "tune-main-resolution*")[0]
    noise = gradient_noise(replace(spec, rounds=last), last)
    return {f"before round {r}": guide for r, guide in zip(noise["round"], noise["guide"], strict=True)}


def show_sweep(page: Page, last: int) -> Exhibit | Markdown:
    """The search for the resolution, with the guide values before round 1 and before round `last`."""
    runs = page.select("tune-main-resolution")
    return sweep_figure(runs, "hyper.resolution", guide_values(page, last), "resolution") if len(runs) else ABSENT


def search_table(page: Page, name: str) -> Exhibit | Markdown:
    """What the search for group main tried: bits an entry until the target, and accuracy at the end."""
    runs = weigh(page.planned, "main", page.rounds)
    if not len(runs):
        return ABSENT
    winners = take_winners(page.planned, "main", page.rounds).set_index("label")
    rows = []
    for label, own in each(runs, "label"):
        axis, best = winners.loc[label, ["axis", "value"]]
        for run in own.to_dict("records"):
            spent = -run["saves"] / run["parameters"] / run["cohort"]
            reached = f"{spent:.1f}" if run["reaches"] else "–" if label == DENSE else "not reached"
            row = {"method": label, "setting": axis.removeprefix("hyper."), "value": f"{run[axis]:g}"}
            row |= {"bits an entry until the target": reached, "accuracy (%)": f"{run['late_accuracy']:.1f}"}
            rows.append(row | {"taken": "taken" if run[axis] == best else ""})
    caption = (
        "The search: training images that no client has, one seed; accuracy in the mean over the last quarter of the "
        "rounds. FedAvg is judged by it; the others by the bits, over all of a client's rounds, until 99 % of its best."
    )
    return table(pd.DataFrame(rows), caption, name, runs)


def quote_results(page: Page) -> dict[str, Any]:
    """Settings, accuracies and bits an entry of the methods of groups main and given, and what the quantizers do."""
    numbers: dict[str, Any] = {}
    coded = page.runs["last.other_bits.entropy"] / page.runs["last.uploads"] / page.runs["parameters"]
    runs = page.runs.assign(coded=coded)
    labels = ("fedavg", "feddq", "feddq-guide", "ascending", "ascending-norm", "ascending-buckets", "fixed", "fixed-8")
    for group in ("main", "given"):
        own = where(runs, group=group)
        for key, (column, form) in QUOTED.items():
            numbers |= means(own, labels, f"{group}-{{}}-{key}", column, form)
        for label in labels:
            for setting in ("resolution", "first", "width"):
                values = where(own, label=label).get(f"hyper.{setting}", pd.Series(dtype=object)).drop_duplicates()
                numbers[f"{group}-{label}-{setting}"] = f"{values.iloc[0]:g}" if is_number(values) else NOT_RUN
    for kind in ("affine_stochastic", "affine_nearest", "symmetric_nearest"):
        own = page.select("quantizers", hyper={"quantizer": kind})
        numbers |= means(own, ("fixed-1", "fixed-2"), f"{kind.replace('_', '-')}-{{}}")
    return numbers


def is_number(values: pd.Series) -> bool:
    """Whether all runs have one and the same number here."""
    return len(values) == 1 and isinstance(values.iloc[0], int | float)


def quote_ranges(page: Page) -> dict[str, str]:
    """How far the range of FedDQ's updates falls in group main, mean over weight tensors, seeds and clients."""
    runs = page.select("main", label="feddq")
    frame = follow_tensors(runs, page.rounds, "ranges")
    frame = frame[~frame["tensor"].str.contains("bias")]
    table = frame.pivot_table(index="round", columns=["seed", "tensor"], values="value")
    third = len(table) // 3
    falls = {"second": table.iloc[1] / table.iloc[0], "last": table.iloc[-1] / table.iloc[0]}
    if third:
        falls["thirds"] = table.iloc[-third:].mean() / table.iloc[:third].mean()
    return {
        f"range-{name}": f"{falls[name].mean():.2f}" if name in falls else NOT_RUN
        for name in ("second", "last", "thirds")
    }
