"""Tables and figures of FedCompress: what clusters save by each meter, and what happens to them round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import LogLocator

from fedlib import local, methods
from fedlib.data import foreign
from fedlib.exhibits import MARKERS, MEGABYTE, Exhibit, canvas, drawn, table
from fedlib.figures import provenance
from fedlib.measures import benchmark, model_ratio, traffic, traffic_ratio
from fedlib.methods import clusters
from fedlib.record import Record
from fedlib.rng import Rng
from fedlib.task import State, Task

METER = {"ours": "our bytes", "fixed": "fixed width", "zip": "compressed file"}
HISTORY: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "clusters": ("clusters of a tensor", lambda entry: entry["notes"]["clusters"]),
    "score": ("score (effective rank)", lambda entry: entry["notes"]["score"]),
    "validation": ("validation accuracy (%)", lambda entry: 100 * entry["notes"]["validation"]),
    "up": ("bytes of a mean upload", lambda entry: entry["uplink_bytes"] / max(1, len(entry["clients"]))),
    "down": ("bytes of a broadcast", lambda entry: entry["notes"]["sent_bits"]["ours"] / 8),
}


def ratio_table(records: Sequence[Record], against: str, name: str) -> Exhibit:
    """A row a task and method: accuracy and what it lost, CCR and MCR by each meter; mean and deviation over seeds."""
    rows: list[dict[str, Any]] = []
    numbers: list[dict[str, Any]] = []
    for group, label in dict.fromkeys((r["spec"]["group"], r["spec"]["label"]) for r in records):
        own = [r for r in records if (r["spec"]["group"], r["spec"]["label"]) == (group, label)]
        base = {r["spec"]["seed"]: r for r in records if (r["spec"]["group"], r["spec"]["label"]) == (group, against)}
        spec = own[0]["spec"]
        accuracy = [100 * r["final"]["accuracy"] for r in own]
        gaps = [a - 100 * base[r["spec"]["seed"]]["final"]["accuracy"] for a, r in zip(accuracy, own, strict=True)]
        row = {"data, network": f"{spec['data']}, {spec['model']}", "method": label, "accuracy (%)": spread(accuracy)}
        row["points lost"] = "–" if label == against else spread([-gap for gap in gaps])
        for meter, what in METER.items():
            pair = own if label == against else [*own, *base.values()]
            ccr = _only(traffic_ratio(pair, [label], [group], [against], meter))
            mcr = _only(model_ratio(pair, [label], [group], [against], meter))
            row[f"CCR, {what}"], row[f"MCR, {what}"] = spread(ccr, 2), spread(mcr, 2)
            numbers += [
                {"group": group, "method": label, "seed": r["spec"]["seed"], "meter": what, "CCR": c, "MCR": m}
                for r, c, m in zip(own, ccr, mcr, strict=True)
            ]
        rows.append(row)
    caption = (
        "Accuracy of the model that is broadcast after the last round. CCR: bytes of both directions, of all rounds "
        f"and clients, of {against} over those of the method; MCR: the same for the final model; by three meters. Mean "
        f"and sample deviation over seeds. {provenance(records)}"
    )
    shown = table(pd.DataFrame(rows), caption, name)
    return Exhibit(shown.body, shown.caption, pd.DataFrame(numbers), name)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def _only(values: Mapping[str, list[float]]) -> list[float]:
    (found,) = values.values()
    return found


def history_figure(records: Sequence[Record], quantities: Sequence[str], caption: str, name: str) -> Exhibit:
    """Quantities of HISTORY by round, a panel each: a line a method, mean over seeds, from lowest to highest a band."""
    frame = pd.DataFrame(
        {
            "method": r["spec"]["label"],
            "seed": r["spec"]["seed"],
            "round": entry["round"],
            "quantity": what,
            "value": HISTORY[what][1](entry),
        }
        for r in records
        for entry in r["rounds"]
        for what in quantities
    )
    figure, axes = canvas(len(quantities), 3.4, sharey=False)
    says = []
    for ax, what in zip(axes, quantities, strict=True):
        for index, label in enumerate(dict.fromkeys(frame["method"])):
            own = frame[(frame["quantity"] == what) & (frame["method"] == label)].groupby("round")["value"]
            ax.plot(own.mean(), label=label, color=f"C{index}", marker=MARKERS[index], markersize=5)
            ax.fill_between(own.mean().index, own.min(), own.max(), color=f"C{index}", alpha=0.15, linewidth=0)
            says.append(f"{label}, {HISTORY[what][0]}: {own.mean().iloc[0]:.3g} to {own.mean().iloc[-1]:.3g}")
        ax.set(title=HISTORY[what][0], xlabel="communication round")
        if what == "clusters":
            ax.yaxis.get_major_locator().set_params(integer=True)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    alt = f"Line charts by round, from the first to the last: {'; '.join(says)}."
    return drawn(
        figure, alt, f"{caption} Line: mean over seeds; band: lowest to highest. {provenance(records)}", frame, name
    )


def traffic_curves(records: Sequence[Record], name: str) -> Exhibit:
    """Accuracy against the megabytes of both directions so far; a panel a task, a line a method."""
    rows = []
    for r in records:
        sent = np.cumsum([entry["uplink_bytes"] + entry["downlink_bytes"] for entry in r["rounds"]]) / MEGABYTE
        for entry, megabytes in zip(r["rounds"], sent, strict=True):
            if entry["accuracy"] is not None:
                row = {"data": r["spec"]["data"], "method": r["spec"]["label"], "seed": r["spec"]["seed"]}
                row |= {"round": entry["round"], "megabytes": megabytes, "accuracy": 100 * entry["accuracy"]}
                rows.append(row)
    frame = pd.DataFrame(rows)
    panels, labels = (list(dict.fromkeys(frame[column])) for column in ("data", "method"))
    figure, axes = canvas(len(panels), 3.8)
    says = []
    for ax, panel in zip(axes, panels, strict=True):
        for index, label in enumerate(labels):
            own = frame[(frame["data"] == panel) & (frame["method"] == label)].groupby("round")
            x, y = own["megabytes"].mean(), own["accuracy"]
            ax.plot(x, y.mean(), label=label, color=f"C{index}", marker=MARKERS[index], markersize=5)
            ax.fill_between(x, y.min(), y.max(), color=f"C{index}", alpha=0.15, linewidth=0)
            says.append(f"{panel}, {label}: {y.mean().iloc[-1]:.1f} % after {x.iloc[-1]:.3g} MB")
        ax.set(title=panel, xlabel="MB in both directions so far, measured", xscale="log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "Accuracy against all that was sent, both ways. Line: mean over seeds; band: lowest to highest. "
        f"{provenance(records)}"
    )
    return drawn(figure, f"Line charts of accuracy against megabytes. {'; '.join(says)}.", caption, frame, name)


def frontier(records: Sequence[Record], name: str) -> Exhibit:
    """Accuracy against all bytes of a run: a point a method, bars from the lowest seed to the highest."""
    frame = pd.DataFrame(
        {
            "method": r["spec"]["label"],
            "seed": r["spec"]["seed"],
            "megabytes": traffic(r, "ours") / 8 / MEGABYTE,
            "accuracy": 100 * r["final"]["accuracy"],
        }
        for r in records
    )
    figure, (ax,) = canvas(height=4.0, width=6.6)
    for index, (label, part) in enumerate(frame.groupby("method", sort=False)):
        x, y = part["megabytes"].mean(), part["accuracy"]
        bars = [[y.mean() - y.min()], [y.max() - y.mean()]]
        style = {"fmt": MARKERS[index % len(MARKERS)], "color": f"C{index % 10}", "markersize": 8, "capsize": 3}
        ax.errorbar(x, y.mean(), bars, label=label, **style)
    ax.set(xlabel="MB of a run in both directions, measured", ylabel="test accuracy (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    means = frame.groupby("method", sort=False)[["megabytes", "accuracy"]].mean()
    says = "; ".join(
        f"{label}: {x:.2f} MB, {y:.1f} %" for label, (x, y) in zip(means.index, means.to_numpy(), strict=True)
    )
    caption = f"Accuracy against what a run sends, mean over seeds; up and to the left is better. {provenance(records)}"
    return drawn(figure, f"Scatter plot. {says}.", caption, frame, name)


def distillation_table(records: Sequence[Record], name: str) -> Exhibit:
    """A row a set of images and treatment of BatchNorm: loss of the last distillation, accuracy before and after it."""
    rows = []
    cases = dict.fromkeys(_images(r) for r in records)
    for kind, norms in cases:
        own = [r for r in records if _images(r) == (kind, norms)]
        last = [r["rounds"][-1]["notes"] for r in own]
        rows.append(
            {
                "images": "the clients' own" if kind == "clients" else kind,
                "BatchNorm": norms,
                "loss, first epoch": f"{np.mean([n['losses'][0] for n in last]):.4f}",
                "last epoch": f"{np.mean([n['losses'][-1] for n in last]):.4f}",
                "accuracy before (%)": spread([100 * n["before"] for n in last]),
                "after (%)": spread([100 * r["final"]["accuracy"] for r in own]),
                "seeds": len(own),
            }
        )
    caption = (
        "Distillation after the last round: its loss, and the test accuracy of the average before and after it. Mean "
        f"and sample deviation over seeds. {provenance(records)}"
    )
    return table(pd.DataFrame(rows), caption, name)


def _images(r: Record) -> tuple[str, str]:
    hyper = r["spec"]["hyper"]
    return hyper.get("foreign", "leaves"), hyper.get("norms", "train")


def contact_sheet(shape: tuple[int, int, int], name: str, each: int = 8) -> Exhibit:
    """A few images of every foreign kind, a row each."""
    figure, _ = canvas(1, 0.95 * len(foreign.KINDS), 0.9 * each)
    figure.clear()
    grid = figure.subplots(len(foreign.KINDS), each, squeeze=False)
    for row, kind in zip(grid, foreign.KINDS, strict=True):
        for ax, image in zip(row, foreign.images(kind, each, shape, 0), strict=True):
            ax.imshow(image[0].numpy(), cmap="gray", vmin=-2, vmax=2, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(kind, rotation=0, ha="right", va="center")
    _, height, width = shape
    caption = f"Images made on the spot, {height} x {width} pixels: the first {each} of each kind, seed 0."
    alt = f"Contact sheet of grey images, a row each: {', '.join(foreign.KINDS)}."
    return drawn(figure, alt, caption, pd.DataFrame({"kind": foreign.KINDS}), name)


def client_stages(spec: Any, task: Task, state: State, client: int = 0) -> list[tuple[str, State]]:
    """A client's tensors, by name of the moment: as received, after ordinary epochs, after clustered ones."""
    module, hyper = methods.METHODS[spec.method], methods.hyper(spec.method, spec.hyper)
    rng = Rng(spec.seed).child("client", 1, client)
    trainable, frozen = module.start(module.broadcast(state, hyper, task), hyper, task, rng)
    seen = [("as received", _copied(trainable))]
    for number, stage in enumerate(methods.stages(module, hyper, task)):
        methods.enter(module, number, trainable, frozen, hyper, stage, rng)
        local.train(module, trainable, frozen, task.shard(client), hyper, stage, local.staged(rng, number))
        seen.append(("after ordinary epochs" if not number else "after clustered epochs", _copied(trainable)))
    return seen


def _copied(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def weights_figure(stages: Sequence[tuple[str, State]], tensor: str, caption: str, name: str) -> Exhibit:
    """Histograms of one tensor's weights at several moments, with its centroids and what each of them holds."""
    figure, axes = canvas(len(stages), 3.4)
    frames, says = [], []
    for ax, (moment, state) in zip(axes, stages, strict=True):
        weights = state[tensor].flatten()
        ax.hist(weights.numpy(), bins=80, color="C0")
        mu = clusters.centroids(state).get(tensor)
        values = torch.unique(weights) if mu is None and weights.unique().numel() <= 256 else mu
        for value in [] if values is None else values.tolist():
            ax.axvline(value, color="C1", linewidth=1, linestyle="--")
        ax.set(title=moment, xlabel="weight")
        frames.append(pd.DataFrame({"moment": moment, "weight": weights.numpy()}))
        says.append(f"{moment}: {weights.unique().numel()} values, from {weights.min():.2f} to {weights.max():.2f}")
    axes[0].set_ylabel("weights")
    axes[0].set_yscale("log")
    return drawn(figure, f"Histograms of weights. {'; '.join(says)}.", caption, pd.concat(frames), name)


def inference_table(name: str) -> Exhibit:
    """A row a network, image shape and batch: time of each variant over that of the plain network, by the bench."""
    made = benchmark("inference")
    rows = [
        {"network": row["network"], "image": " x ".join(map(str, row["shape"])), "batch": row["batch"]}
        | {variant: f"{found['ratio']:.2f}" for variant, found in row["variants"].items()}
        for row in made["times"]
    ]
    caption = (
        "Time of a forward pass over that of the plain network (dense) in the same run; below 1 is faster. One thread, "
        f"medians; {made['cpu']}."
    )
    return table(pd.DataFrame(rows), caption, name)


def size_table(name: str) -> Exhibit:
    """A row a network: bytes of its file as float32, as int8, and as codebooks and coded indexes; time to load each."""
    made = benchmark("inference")
    rows = [
        {"network": row["network"], "image": " x ".join(map(str, row["shape"]))}
        | {f"{kind}, bytes": f"{found['bytes']:,}" for kind, found in row["files"].items()}
        | {f"{kind}, ms to load": f"{found['ms']:.1f}" for kind, found in row["files"].items()}
        for row in made["files"]
    ]
    caption = f"Files of a model with {made['clusters']} clusters, and the time to load them; {made['cpu']}."
    return table(pd.DataFrame(rows), caption, name)
