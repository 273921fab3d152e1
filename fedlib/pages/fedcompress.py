"""The page of FedCompress: what clusters save by each meter, and what happens to them round by round."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown

from fedlib.claims.benchmarks import Values, benchmark
from fedlib.claims.conditions import count_local_steps
from fedlib.claims.measures import model_ratio, traffic_ratio
from fedlib.claims.results import each, join_rounds, where
from fedlib.claims.tuning import searched
from fedlib.core.plan import Tensors
from fedlib.data import synthetic
from fedlib.methods.fedcompress import clustering
from fedlib.pages.client_diagnostics import CPU, follow_client
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, picture, spread, table
from fedlib.pages.figures import BAND, count_rounds, draw_panels, heat_map
from fedlib.pages.page import Page, mean, means, span, tell
from fedlib.pages.tables import Cells, average, deviate, message_table, name_setting, summarize
from fedlib.runs import build
from fedlib.runs.experiments import specs
from fedlib.wire import codebook

LABELS = ("fedavg", "fedzip", "client-only", "fedcompress")
COMPARED = (5, 8)  # first and last of the rounds by which kinds of distillation are compared
METER = {"ours": "our bytes", "fixed": "fixed width", "zip": "compressed file"}
HISTORY = {
    "clusters": "clusters of a tensor",
    "score": "score (effective rank)",
    "validation": "validation accuracy (%)",
    "up": "bytes of a mean upload",
    "down": "bytes of a broadcast",
}
ORDER = ("dense", "clustered", "looked up", "folded", "clustered, folded", "int8 linear", "clustered, int8 linear")
VARIANTS = (*ORDER, "int8", "clustered, int8")


def ratio_table(runs: pd.DataFrame, rounds: pd.DataFrame, against: str, name: str) -> Exhibit:
    """A row a data set and method: accuracy and what it lost, CCR and MCR by each meter; means over seeds."""
    base = where(runs, label=against).set_index(["group", "seed"])["accuracy"]
    lost = base.reindex(pd.MultiIndex.from_frame(runs[["group", "seed"]])).to_numpy() - runs["accuracy"]
    rows, numbers = [], []
    for (group, label), own in each(runs, "group", "label"):
        row = {"data": own["data"].iloc[0], "method": label, "accuracy (%)": spread(own["accuracy"])}
        row["points lost"] = "–" if label == against else spread(lost[own.index])
        for meter, what in METER.items():
            case = ([label], [group], [against], meter)
            ccr, mcr = _list(traffic_ratio(runs, rounds, *case)), _list(model_ratio(runs, *case))
            row[f"CCR, {what}"], row[f"MCR, {what}"] = f"{np.mean(ccr):.2f}", f"{np.mean(mcr):.2f}"
            values = {"group": group, "method": label, "seed": own["seed"], "meter": what, "CCR": ccr, "MCR": mcr}
            numbers.append(pd.DataFrame(values))
        rows.append(row)
    frame = pd.concat(numbers)
    caption = (
        "Accuracy of the model that is broadcast after the last round, mean and sample deviation over seeds. CCR: "
        f"bytes of both directions, of all rounds and clients, of {against} over those of the method; MCR: the same "
        "for the final model; by three meters, mean over seeds."
    )
    return table(pd.DataFrame(rows), caption, name, runs, frame)


def _list(values: Values) -> list[float]:
    return [value for by_seed in values.values() for value in by_seed.values()]


def history_figure(
    runs: pd.DataFrame, rounds: pd.DataFrame, quantities: Sequence[str], caption: str, name: str
) -> Exhibit:
    """Quantities of HISTORY by round, a panel each: a line a method."""
    frame = join_rounds(runs, rounds).rename(columns={"notes.clusters": "clusters", "notes.score": "score"})
    frame = frame.assign(validation=100 * frame["notes.validation"], up=frame["uplink_bytes"] / frame["uploads"])
    frame = frame.assign(down=frame["notes.sent_bits.ours"] / 8, order=range(len(frame)))
    points = frame.melt(["label", "seed", "round", "order"], list(quantities), "quantity")
    points = points.sort_values("order", kind="stable").drop(columns="order").rename(columns={"label": "method"})
    named = points.assign(panel=points["quantity"].map(HISTORY))
    figure, axes = draw_panels(named, "value", "round", "panel", "method", height=3.4, sharey=False)
    for ax in axes:
        ax.set(xlabel="communication round")
        if ax.get_title() == HISTORY["clusters"]:
            ax.yaxis.get_major_locator().set_params(integer=True)
    count_rounds(axes)
    add_legend(figure, axes)
    says = []
    for what, label in itertools.product(named["panel"].unique(), named["method"].unique()):
        means = where(named, panel=what, method=label).groupby("round")["value"].mean()
        says.append(f"{label}, {what}: {means.iloc[0]:.3g} to {means.iloc[-1]:.3g}")
    alt = f"Line charts by round, from the first to the last: {'; '.join(says)}."
    return picture(figure, alt, f"{caption} {BAND}", points, name, runs)


def compare_distillations(page: Page) -> pd.DataFrame:
    """The runs that distil, each with the means over rounds COMPARED (all rounds, where there are fewer) of the test
    accuracy before compression, after it, and of the points that it costs; of the loss in its first and last epoch."""
    runs = page.select("main", "distillation", "speech").query("label not in ['fedavg', 'fedzip', 'client-only']")
    frame = join_rounds(runs, page.rounds)
    there = frame["round"].between(*COMPARED)
    frame = frame[there] if there.any() else frame
    losses = frame["notes.losses"]
    frame = frame.assign(before=100 * frame["notes.before"], first=losses.str[0], last=losses.str[-1])
    frame = frame.rename(columns={"accuracy": "after"}).assign(cost=lambda f: f["before"] - f["after"])
    means = frame.groupby("run")[["before", "after", "cost", "first", "last"]].mean()
    epochs, images, batch = (runs[f"hyper.{name}"].astype(int) for name in ("distil_epochs", "images", "distil_batch"))
    kinds = name_setting(runs, "foreign", "leaves")
    return runs.assign(steps=epochs * (images // batch), foreign=kinds).join(means, on="run")


def distillation_table(runs: pd.DataFrame, name: str) -> Exhibit:
    """A row a data set, kind of images and length of distillation, of runs as of `compare_distillations`."""
    cells: Cells = {"loss, first epoch": average("first", ".4f"), "last epoch": average("last", ".4f")}
    cells |= {"accuracy before (%)": deviate("before"), "after (%)": deviate("after"), "cost": deviate("cost")}
    cells |= {"seeds": len}
    caption = (
        "Distillation on the server: its loss, the test accuracy of the average before it and of the clustered copy "
        f"after it, and the difference in points. Means over rounds {COMPARED[0]} to {COMPARED[1]}, then mean and "
        "sample deviation over seeds."
    )
    return summarize(runs, {"data": "data", "foreign": "images", "steps": "steps a round"}, cells, caption, name)


def tuning_map(page: Page) -> Exhibit | Markdown:
    """Validation accuracy by method and learning rate in the search for group main."""
    runs = searched(page.runs, "main")
    what = "Accuracy on training images that no client has, by method and learning rate, after the last round."
    return page.show(heat_map, runs, "label", "lr", "split", "rates", what)


def quote_results(page: Page) -> dict[str, str]:
    """Accuracies, rates, steps and ratios of the methods on digits, clusters and score by round, for the sentences."""
    runs = page.select("main")
    numbers = means(runs, LABELS, column="late_accuracy") | means(runs, LABELS, "{}-lr", "lr", "g")
    numbers |= means(runs.assign(steps=count_local_steps(runs)), LABELS, "{}-steps", "steps", ".0f")
    for label, meter in itertools.product(LABELS, METER):
        case = ([label], ["main"], ["fedavg"], meter)
        found = {"ccr": traffic_ratio(page.runs, page.rounds, *case), "mcr": model_ratio(page.runs, *case)}
        for key, values in found.items():
            numbers[f"{key}-{label}-{meter}"] = tell(np.mean(_list(values)) if values else np.nan, ".2f")
    rounds = join_rounds(where(runs, label="fedcompress"), page.rounds)
    last = where(rounds, round=rounds["round"].max())
    numbers |= {"clusters": span(last["notes.clusters"]), "score-last": mean(last, "notes.score")}
    for number in (1, 4):
        then = where(rounds, round=number)
        numbers |= {f"round-{number}": mean(then), f"score-{number}": mean(then, "notes.score")}
    return numbers


def quote_distillation(runs: pd.DataFrame) -> dict[str, str]:
    """Steps of distillation and points that it costs, of runs as of `compare_distillations`."""
    numbers: dict[str, str] = {}
    cases = (("main", "fedcompress"), ("distillation", "short"), ("speech", "voices"), ("speech", "leaves"))
    for group, label in cases:
        own = where(runs, group=group, label=label)
        numbers |= {f"{group}-{label}-{column}": mean(own, column) for column in ("cost", "before", "after")}
        numbers |= {f"{group}-{label}-steps": mean(own, "steps", ".0f")}
    return numbers


def look_inside(page: Page) -> tuple[Exhibit, Exhibit]:
    """Weights of a client in the first round, phase by phase, and the fields of its upload."""
    torch.set_num_threads(1)
    spec = next(s for s in specs("fedcompress", page.profile, "main_fedcompress_*") if s.seed == 0)
    job = build.job(spec, CPU)
    phases, upload = follow_client(job)
    caption = (
        "Weights of the second kernel of one client in round 1, and centroids (dashed); the vertical scale is "
        f"logarithmic. Profile {page.profile}; digits; client 0 of {spec.clients}; a single seed (0); cpu."
    )
    weights = weights_figure(phases, "conv2.weight", caption, "weights")
    return weights, message_table(upload, job.method.sections, "One upload of FedCompress, field by field.")


def weights_figure(stages: Sequence[tuple[str, Tensors]], tensor: str, caption: str, name: str) -> Exhibit:
    """Histograms of one tensor's weights at several moments, with the values that they have or are to take."""
    figure, axes = canvas(len(stages), 3.4)
    frames, says = [], []
    for ax, (moment, state) in zip(axes, stages, strict=True):
        weights = state[tensor].flatten()
        distinct = weights.unique()
        few = distinct if len(distinct) <= codebook.MOST else clustering.centroids(state).get(tensor, torch.empty(0))
        ax.hist(weights.numpy(), bins=80, color="C0")
        for value in few.tolist():
            ax.axvline(value, color="C1", linewidth=1, linestyle="--")
        ax.set(title=moment, xlabel="weight")
        for what, values in (("weight", weights), ("centroid", few)):
            frames.append(pd.DataFrame({"moment": moment, "what": what, "value": values.numpy()}))
        says.append(f"{moment}: {len(distinct)} values, from {weights.min():.2f} to {weights.max():.2f}")
    axes[0].set_ylabel("weights")
    axes[0].set_yscale("log")
    return picture(figure, f"Histograms of weights. {'; '.join(says)}.", caption, pd.concat(frames), name)


def contact_sheet(shape: tuple[int, int, int], name: str, each: int = 8) -> Exhibit:
    """A few images of every foreign kind, a row each; grey, as pixels from 0 to 255."""
    _, height, width = shape
    rows, frames = [], []
    for kind in synthetic.KINDS:
        images = synthetic.levels(kind, each, shape, 0)[:, 0]
        rows.append(np.concatenate(list(np.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=255)), axis=1))
        lines = pd.DataFrame(images.reshape(-1, width)).add_prefix("column ")
        frames.append(lines.assign(kind=kind, image=np.repeat(np.arange(each), height)))
    figure, (ax,) = canvas(height=4.2, width=7.2)
    ax.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set(xticks=[], yticks=[(height + 2) * (k + 0.5) for k in range(len(rows))], yticklabels=synthetic.KINDS)
    ax.grid(False)
    caption = f"Images made on the spot, {height} x {width} pixels: the first {each} of each kind, seed 0."
    alt = f"Contact sheet of grey images, a row each: {', '.join(synthetic.KINDS)}."
    return picture(figure, alt, caption, pd.concat(frames), name)


def inference_table(name: str) -> Exhibit:
    """A row a variant, a column a network, image shape and batch: time over that of the plain network, by the bench."""
    made = benchmark("inference")
    cases = {f"{_network(row)}, batch {row['batch']}": row["variants"] for row in made["times"]}
    rows = [{"variant": v} | {case: f"{row[v]['ratio']:.2f}" for case, row in cases.items()} for v in VARIANTS]
    times = "; ".join(f"{case} {row['dense']['ms']:.1f} ms" for case, row in cases.items())
    caption = (
        f"CPU time over that of the dense network in float32, one thread, median of {made['turns']} turns; "
        f"{made['clusters']} clusters, random weights. Dense: {times}. {made['cpu']}. "
        "The median is of the ratio within a turn; the scorecard divides median times, which differ by up to a tenth."
    )
    return table(pd.DataFrame(rows), caption, name)


def size_table(name: str) -> Exhibit:
    """A row a network and kind of file: bytes, their share of float32's, and time to load over that of float32's."""
    kinds = {"dense": "float32", "int8": "int8", "coded": "codebooks and coded indexes"}
    made = benchmark("inference")
    rows = [
        {"network": _network(row), "file": what, "bytes": f"{row['files'][kind]['bytes']:,}"}
        | {"share": f"{row['files'][kind]['bytes'] / row['files']['dense']['bytes']:.2f}"}
        | {"times float32's to load": f"{row['files'][kind]['ratio']:.2f}"}
        for row in made["files"]
        for kind, what in kinds.items()
    ]
    caption = (
        f"Files of a network with random weights in {made['clusters']} clusters, and time from the file to a network "
        f"that has its numbers. The first two are torch's, the last is as messages are. {made['cpu']}."
    )
    return table(pd.DataFrame(rows), caption, name)


def _network(row: dict[str, Any]) -> str:
    return f"{row['network']}, {'x'.join(map(str, row['shape']))}"
