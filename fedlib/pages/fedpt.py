"""The page of FedPT: what each policy saves, what it costs in accuracy, and what freezing does under noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from fedlib.claims.benchmarks import benchmark
from fedlib.claims.measures import accuracy_gap
from fedlib.claims.results import DEFAULT, each, where
from fedlib.models import freezing
from fedlib.models.registry import build
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, drawn, table
from fedlib.pages.figures import accuracy_by_setting
from fedlib.pages.page import NOT_RUN, Page, mean
from fedlib.pages.tables import Cells, average, deviate, name_setting, summarize
from fedlib.rng import Rng
from fedlib.theory import fedpt as theory

BUDGET = ("mechanism", "clip_norm", "noise_multiplier", "epsilon")  # of what a record says of privacy
PERCENT = ("bytes each way", "products", "time of a step", "memory, SGD", "memory, Adam")
SHORT = {"bytes": PERCENT[0], "products": PERCENT[1], "time": PERCENT[2], "sgd": PERCENT[3], "adam": PERCENT[4]}
QUOTED = (
    ("emnist", "emnist/dense1"),
    ("emnist", "emnist/conv"),
    ("resnet18-gn", "cifar/s1234"),
    ("transformer", "so/blocks"),
)
WIDTHS = {"emnist-hidden8": 8, "emnist-narrow": 128, "emnist-hidden2048": 2048}  # hidden units
LAWS = {"he": "He's law", "glorot": "Glorot's law"}
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "yogi": "Yogi"}
FROZEN, WHOLE = "hidden layer frozen", "all trained"


def count_trained(runs: pd.DataFrame) -> pd.Series:
    """Entries of the tensors that travel: the method's own definition counts 32 bits for each."""
    return (runs["paper_bits"] / runs["uploads"] / 32).round().astype(int)


def compare_with_full(network: str) -> pd.DataFrame:
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
        frame = compare_with_full(network).iloc[1:]
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
    add_legend(figure, axes)
    alt = f"Bar charts of what is left in percent of full training. Bytes, time, memory with SGD: {'; '.join(says)}."
    made = benchmark("partial")
    caption = (
        "What is left of full training under each policy: bytes each way of the real messages, time of a local step, "
        f"most bytes in tensors during local training. One thread, medians of {made['turns']} turns; {made['cpu']}."
    )
    return drawn(figure, alt, caption, pd.concat(frames), name)


def savings_table(networks: list[str], name: str) -> Exhibit:
    """The numbers of `savings_figure`, measured beside counted: products, and bytes of tensors by a formula."""
    bench = benchmark("partial")
    frames = []
    for network in networks:
        states = [row["state_bytes"] for row in bench["rows"] if row["network"] == network]
        formula = {
            f"formula, {label}": [100 * state[key] / states[0][key] for state in states]
            for key, label in (("sgd", "SGD"), ("adam", "Adam"))
        }
        frames.append(compare_with_full(network).assign(network=network, **formula))
    columns = ["network", "frozen", *PERCENT[:3], "formula, SGD", "memory, SGD", "formula, Adam", "memory, Adam"]
    caption = (
        "The same in numbers, measured beside counted; percent of full training. Products: multiply-accumulates of "
        "training on one example, counted. Formula: bytes of parameters, gradients and the local optimizer, counted; "
        "memory: most bytes in tensors, measured. Random inputs, batches of 20 images or 10 texts; "
        f"{bench['cpu']}."
    )
    return table(pd.concat(frames)[columns].round(1), caption, name)


def policies_table(name: str) -> Exhibit:
    """What each policy freezes, by patterns of names."""
    rows = [
        {"policy": policy, "patterns of the frozen tensors' names": ", ".join(patterns) or "–"}
        for policy, patterns in freezing.POLICIES.items()
    ]
    caption = (
        "Policies by name: for the network for EMNIST (two convolutions, a hidden and an output layer), the ResNet for "
        "CIFAR-10, the Transformer for text. Also random/p, which trains whole tensors picked by a hash of their "
        "names, a share p of all entries at most."
    )
    return table(pd.DataFrame(rows), caption, name)


def policy_table(runs: pd.DataFrame, name: str) -> Exhibit:
    """A row a policy: entries trained, reduction, measured bytes of a message each way, accuracy and its spread."""
    trained = count_trained(runs)
    runs = runs.assign(trained=trained, share=100 * trained / runs["parameters"], times=runs["parameters"] / trained)
    runs = runs.assign(download=runs["downlink_bytes"] / runs["downloads"])
    first = runs[~runs["label"].duplicated()].set_index("label")

    def show(column: str, form: str) -> Any:
        return lambda own: f"{first.loc[own['label'].iloc[0], column]:{form}}"

    cells: Cells = {"trained": show("trained", ","), "share": lambda own: show("share", ".2f")(own) + " %"}
    cells |= {"reduction": show("times", ".2f"), "bytes down": show("download", ",.0f")}
    cells |= {"bytes up": show("upload_bytes", ",.0f"), "accuracy (%)": deviate("accuracy")}
    caption = "Messages as measured; accuracy after the last round, mean and sample deviation."
    return summarize(runs, {"label": "method"}, cells, caption, name)


def private_table(runs: pd.DataFrame, rounds: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """A row a mechanism, bound and noise: epsilon, accuracy, share of clipped updates, length of the mean's noise."""
    clipped = 100 * rounds.groupby("run")["notes.clipped"].mean()[runs["run"]].set_axis(runs.index)
    bound, noise = (runs[f"privacy.{field}"].astype(float) for field in ("clip_norm", "noise_multiplier"))
    sizes = zip(count_trained(runs), noise * bound / runs["cohort"], strict=True)
    runs = runs.assign(clipped=clipped, length=[theory.expected_norm(*size) for size in sizes])
    runs = runs.assign(epsilon=["none" if pd.isna(spent) else f"{spent:.2f}" for spent in runs["privacy.epsilon"]])
    by = {"label": "method", "privacy.clip_norm": "C", "privacy.noise_multiplier": "noise multiplier", "epsilon": "ε"}
    cells: Cells = {"accuracy (%)": deviate("accuracy"), "clipped": lambda own: f"{own['clipped'].mean():.0f} %"}
    cells |= {"length of the noise": average("length", ".2f")}
    deltas = ", ".join(f"{delta:g}" for delta in runs["privacy.delta"].unique())
    return summarize(runs, by, cells, f"{caption} δ = {deltas}; mean and sample deviation over seeds.", name)


def share_figure(runs: pd.DataFrame) -> Exhibit:
    """Accuracy against the share of the network of `none` that is trained and sent."""
    whole = where(runs, group="main", label="none")["parameters"].iloc[0]
    runs = runs.assign(share=100 * count_trained(runs) / whole)
    caption = "Accuracy against what is trained and sent. thin is a network of its own, placed by its size."
    axis = "entries that are sent, % of the network's"
    return accuracy_by_setting(runs, "share", axis, caption, "share", scale="log")


def scale_figure(runs: pd.DataFrame) -> Exhibit:
    """Accuracy by a factor on the frozen weights."""
    runs = runs.assign(factor=name_setting(runs, "scale", 1.0), last=runs["label"] != "dense1")
    runs = runs.sort_values(["last", "factor"], kind="stable")
    caption = "Accuracy when the frozen weights, drawn by Glorot's law, are multiplied by a factor."
    return accuracy_by_setting(runs, "factor", "factor on the frozen weights", caption, "scale", scale="log")


def width_figure(runs: pd.DataFrame) -> Exhibit:
    """Accuracy by the width of the hidden layer, trained and frozen."""
    runs = runs.assign(width=runs["model"].map(WIDTHS), policy=name_policy(runs), law=runs["hyper.law"].map(LAWS))
    caption = "Accuracy with the hidden layer trained and frozen, by its width and by the law of initial values."
    return accuracy_by_setting(runs, "width", "hidden units", caption, "width", by="policy", panel="law", scale="log")


def server_figure(runs: pd.DataFrame) -> Exhibit:
    """Accuracy by the server's optimizer and its learning rate."""
    settings = zip(
        name_setting(runs, "optimizer", "sgd"),
        name_setting(runs, "momentum", 0),
        name_setting(runs, "server_lr", 1),
        strict=True,
    )
    names = [f"{OPTIMIZERS[o]}{' with momentum' if momentum else ''}\n{lr:g}" for o, momentum, lr in settings]
    caption = "Accuracy by the server's optimizer, one learning rate each, not tuned."
    axis = "server's optimizer and its learning rate"
    return accuracy_by_setting(runs.assign(server=names), "server", axis, caption, "server", scale="each")


def noise_figure(runs: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """Accuracy by the noise multiplier, with everything trained and with the hidden layer frozen."""
    spent = zip(runs["privacy.noise_multiplier"], runs["privacy.epsilon"], strict=True)
    budgets = [f"{noise:g}\nno ε" if pd.isna(epsilon) else f"{noise:g}\nε {epsilon:.2g}" for noise, epsilon in spent]
    runs = runs.assign(budget=budgets, policy=name_policy(runs))
    return accuracy_by_setting(runs, "budget", "noise multiplier", caption, name, by="policy", scale="each")


def name_policy(runs: pd.DataFrame) -> pd.Series:
    """Whether the hidden layer is frozen, in words."""
    return name_setting(runs, "policy", DEFAULT).map(lambda policy: WHOLE if policy == DEFAULT else FROZEN)


def quote_policies(page: Page) -> dict[str, str]:
    """Accuracy and reduction of each policy, for the sentences."""
    numbers = {}
    for group, labels in (
        ("main", ("none", "dense1", "conv", "all-but-head", "random-2")),
        ("he", ("none-he", "dense1-he", "conv-he", "all-but-head-he")),
        ("thin", ("thin",)),
    ):
        for label in labels:
            own = page.select("main", label=label)
            numbers[label] = mean(page.select(group, label=label))
            own = own.assign(times=own["parameters"] / count_trained(own))
            numbers[f"{label}-times"] = mean(own, "times")
    failing = page.select("he", label="conv-he")["accuracy"]
    for key, value in (("low", failing.min()), ("high", failing.max())):
        numbers[f"conv-he-{key}"] = f"{value:.1f}" if len(failing) else NOT_RUN
    return numbers


def quote_resnet() -> dict[str, str]:
    """Parameters of the ResNet with all of its convolutions in blocks frozen."""
    module = build("resnet18-gn-100head", 3, 24, 10, Rng(0))
    shapes = {name: p.shape for name, p in module.named_parameters()}
    size = {name: shape.numel() for name, shape in shapes.items()}
    whole = sum(size.values())
    left = whole - sum(size[name] for name in freezing.frozen_names("cifar/s1234", shapes))
    return {"all": f"{whole:,}", "trained": f"{left:,}", "times": f"{whole / left:.2f}"}


def quote_savings() -> dict[str, str]:
    """What is left under the policies of the text, by the benchmark."""
    numbers = {}
    for network, policy in QUOTED:
        row = compare_with_full(network).set_index("frozen").loc[policy]
        for key, column in SHORT.items():
            numbers[f"{policy.partition('/')[2]}-{key}"] = f"{row[column]:.0f}"
    return numbers


def quote_settings(page: Page) -> dict[str, str]:
    """Numbers on learning rate, initial values, width and text, for the sentences."""
    numbers = {}
    for key, own in (("tuned", page.select("rates")), ("shared", page.select("rates", lr=0.1))):
        gaps = accuracy_gap(own, ["dense1"], ["rates"], ["none"])
        numbers[f"rates-gap-{key}"] = f"{-np.mean([*gaps.values()]):.1f}" if gaps else NOT_RUN
    for label in ("none", "dense1", "all-but-head"):
        for law in ("he", "glorot", "torch"):
            numbers[f"law-{label}-{law}"] = mean(page.select("laws", label=label, hyper={"law": law}))
        numbers[f"scale-{label}-4"] = mean(page.select("scale", label=label, hyper={"scale": 4}))
    for model, width in WIDTHS.items():
        for law, tail in (("glorot", ""), ("he", "-he")):
            own = page.select("width", model=model, label=["none" + tail, "dense1" + tail])
            numbers[f"width-{law}-{width}"] = _tell_gap(own, WHOLE, FROZEN, ".1f")
    return numbers | {f"text-{label}": mean(page.select("text", label=label)) for label in ("none", "ffn", "blocks")}


def quote_privacy(page: Page) -> dict[str, str]:
    """What freezing gains under noise, and what noise spends, for the sentences."""
    numbers = {}
    for group, noises in (("private", (0, 2, 4)), ("clipping", (4,)), ("tree", (0, 8))):
        for noise in noises:
            own = page.select(group, hyper={"noise_multiplier": noise})
            numbers[f"{group}-gap-{noise}"] = _tell_gap(own, FROZEN, WHOLE, "+.1f")
            if noise:
                spent = own["privacy.epsilon"].iloc[0] if len(own) else None
                numbers[f"{group}-epsilon-{noise}"] = f"{spent:.2g}" if spent else NOT_RUN
    strong = pd.concat([page.select("private", hyper={"noise_multiplier": 4}), page.select("clipping")])
    best = {}
    for label, key in (("private", "private-best"), ("private-dense1", "private-best-dense1")):
        bounds = [own for _, own in each(where(strong, label=label), "privacy.clip_norm")]
        best[label] = max(bounds, key=lambda own: own["accuracy"].mean(), default=strong.iloc[:0])
        numbers[key] = mean(best[label])
    gap = best["private-dense1"]["accuracy"].mean() - best["private"]["accuracy"].mean()
    return numbers | {"private-best-gap": f"{gap:+.1f}" if len(strong) else NOT_RUN}


def _tell_gap(runs: pd.DataFrame, first: str, second: str, form: str) -> str:
    """Mean accuracy under one policy less that under another."""
    means = {policy: own["accuracy"].mean() for policy, own in each(runs.assign(policy=name_policy(runs)), "policy")}
    return f"{means[first] - means[second]:{form}}" if first in means and second in means else NOT_RUN
