"""Tables and figures of FedCompress: what clusters save by each meter, and what happens to them round by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from fedlib.claims.benchmarks import benchmark
from fedlib.claims.measures import model_ratio, traffic_ratio
from fedlib.core.client import staged, train
from fedlib.core.plan import State
from fedlib.core.task import Task
from fedlib.data import synthetic
from fedlib.methods import registry
from fedlib.methods.fedcompress import clustering
from fedlib.pages.exhibit import MARKERS, Exhibit, canvas, drawn, spread, table
from fedlib.pages.figures import provenance
from fedlib.rng import Rng
from fedlib.runs.record import Record
from fedlib.wire import codebook

METER = {"ours": "our bytes", "fixed": "fixed width", "zip": "compressed file"}
HISTORY: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    "clusters": ("clusters of a tensor", lambda entry: entry["notes"]["clusters"]),
    "score": ("score (effective rank)", lambda entry: entry["notes"]["score"]),
    "validation": ("validation accuracy (%)", lambda entry: 100 * entry["notes"]["validation"]),
    "up": ("bytes of a mean upload", lambda entry: entry["uplink_bytes"] / max(1, len(entry["clients"]))),
    "down": ("bytes of a broadcast", lambda entry: entry["notes"]["sent_bits"]["ours"] / 8),
}


def ratio_table(records: Sequence[Record], against: str, name: str) -> Exhibit:
    """A row a data set and method: accuracy and what it lost, CCR and MCR by each meter; means over seeds."""
    rows: list[dict[str, Any]] = []
    numbers: list[dict[str, Any]] = []
    for group, label in dict.fromkeys((r["spec"]["group"], r["spec"]["label"]) for r in records):
        own = [r for r in records if (r["spec"]["group"], r["spec"]["label"]) == (group, label)]
        base = {r["spec"]["seed"]: r for r in records if (r["spec"]["group"], r["spec"]["label"]) == (group, against)}
        accuracy = [100 * r["final"]["accuracy"] for r in own]
        gaps = [a - 100 * base[r["spec"]["seed"]]["final"]["accuracy"] for a, r in zip(accuracy, own, strict=True)]
        row = {"data": own[0]["spec"]["data"], "method": label, "accuracy (%)": spread(accuracy)}
        row["points lost"] = "–" if label == against else spread([-gap for gap in gaps])
        for meter, what in METER.items():
            pair = own if label == against else [*own, *base.values()]
            ccr = _only(traffic_ratio(pair, [label], [group], [against], meter))
            mcr = _only(model_ratio(pair, [label], [group], [against], meter))
            row[f"CCR, {what}"], row[f"MCR, {what}"] = f"{np.mean(ccr):.2f}", f"{np.mean(mcr):.2f}"
            numbers += [
                {"group": group, "method": label, "seed": r["spec"]["seed"], "meter": what, "CCR": c, "MCR": m}
                for r, c, m in zip(own, ccr, mcr, strict=True)
            ]
        rows.append(row)
    frame = pd.DataFrame(numbers)
    off = frame.groupby(["group", "method", "meter"])[["CCR", "MCR"]].std().max().max()
    several = f", whose deviation is {off:.2f} at most" if off >= 0 else ""  # of one seed it is no number
    caption = (
        "Accuracy of the model that is broadcast after the last round, mean and sample deviation over seeds. CCR: "
        f"bytes of both directions, of all rounds and clients, of {against} over those of the method; MCR: the same "
        f"for the final model; by three meters, mean over seeds{several}. {provenance(records)}"
    )
    shown = table(pd.DataFrame(rows), caption, name)
    return Exhibit(shown.body, shown.caption, frame, name)


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


def client_stages(spec: Any, task: Task, state: State, client: int = 0) -> list[tuple[str, State]]:
    """A client's tensors, by name of the moment: as received, after ordinary epochs, after clustered ones."""
    module, hyper = registry.METHODS[spec.method], registry.hyper(spec.method, spec.hyper)
    rng = Rng(spec.seed).child("client", 1, client)
    trainable, frozen = module.start(module.broadcast(state, hyper, task), hyper, task, rng)
    seen = [("as received", _copied(trainable))]
    for number, stage in enumerate(registry.stages(module, hyper, task)):
        registry.enter(module, number, trainable, frozen, hyper, stage, rng)
        train(module, trainable, frozen, task.shard(client), hyper, stage, staged(rng, number))
        seen.append(("after ordinary epochs" if not number else "after clustered epochs", _copied(trainable)))
    return seen


def _copied(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def weights_figure(stages: Sequence[tuple[str, State]], tensor: str, caption: str, name: str) -> Exhibit:
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
    return drawn(figure, f"Histograms of weights. {'; '.join(says)}.", caption, pd.concat(frames), name)


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
    return drawn(figure, alt, caption, pd.concat(frames), name)


ORDER = ("dense", "clustered", "looked up", "folded", "clustered, folded", "int8 linear", "clustered, int8 linear")
VARIANTS = (*ORDER, "int8", "clustered, int8")


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
