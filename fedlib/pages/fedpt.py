"""The page of FedPT: what each policy saves, what it costs in accuracy, and what freezing does under noise."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import seaborn as sns

from fedlib.claims.benchmarks import benchmark
from fedlib.claims.results import DEFAULT, each, where
from fedlib.models import freezing
from fedlib.models.registry import build
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, picture, table
from fedlib.pages.figures import accuracy_by_setting
from fedlib.pages.page import Page, mean, means, tell
from fedlib.pages.tables import Cells, average, deviate, name_setting, summarize
from fedlib.rng import Rng
from fedlib.theory import fedpt as theory

MEASURED = {  # what is measured of a policy, by the names of `bench/partial.py`
    "bytes_up": "bytes each way",
    "macs_ratio": "products",
    "step_ratio": "time of a step",
    "peak_bytes.sgd": "memory, SGD",
    "peak_bytes.adam": "memory, Adam",
    "state_bytes.sgd": "formula, SGD",
    "state_bytes.adam": "formula, Adam",
}
SHORT = dict(zip(("bytes", "products", "time", "sgd", "adam"), MEASURED.values(), strict=False))
QUOTED = ("emnist/dense1", "emnist/conv", "cifar/s1234", "so/blocks")
WIDTHS = {"emnist-hidden8": 8, "emnist-narrow": 128, "emnist-hidden2048": 2048}  # hidden units
LAWS = {"he": "He's law", "glorot": "Glorot's law"}
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "yogi": "Yogi"}
FROZEN, WHOLE = "hidden layer frozen", "all trained"


def count_trained(runs: pd.DataFrame) -> pd.Series:
    """Entries of the tensors that travel: the method's own definition counts 32 bits for each."""
    return (runs["paper_bits"] / runs["uploads"] / 32).round().astype(int)


def compare_with_full() -> pd.DataFrame:
    """A row a network and policy, in percent of full training, as `bench/partial.py` has measured it."""
    rows = pd.json_normalize(benchmark("partial")["rows"])
    values = rows[list(MEASURED)].rename(columns=MEASURED)
    percent = 100 * (values / values.groupby(rows["network"]).transform("first"))
    return percent.assign(network=rows["network"], frozen=rows["policy"])


def savings_figure(networks: list[str], name: str) -> Exhibit:
    """A panel a network: what is left of bytes, time and memory under each policy."""
    frame = where(compare_with_full(), network=networks).query("frozen != 'none'")
    columns = [SHORT[key] for key in ("bytes", "time", "sgd", "adam")]
    figure, axes = canvas(len(networks), 3.8)
    for ax, (network, own) in zip(axes, each(frame, "network"), strict=True):
        short = own.assign(policy=own["frozen"].str.partition("/")[2])
        bars = short.melt("policy", columns, "what")
        sns.barplot(bars, x="policy", y="value", hue="what", palette="colorblind", saturation=1, ax=ax)
        ax.get_legend().remove()
        ax.axhline(100, color="0.3", linewidth=1)
        ax.set(title=network, xlabel="frozen", ylabel="% of full training")
    add_legend(figure, axes)
    told = frame[["frozen", *columns[:3]]].itertuples(index=False)
    says = "; ".join(f"{policy}: {size:.0f}, {time:.0f}, {memory:.0f}" for policy, size, time, memory in told)
    alt = f"Bar charts of what is left in percent of full training. Bytes, time, memory with SGD: {says}."
    made = benchmark("partial")
    caption = (
        "What is left of full training under each policy: bytes each way of the real messages, time of a local step, "
        f"most bytes in tensors during local training. One thread, medians of {made['turns']} turns; {made['cpu']}."
    )
    return picture(figure, alt, caption, frame[["frozen", *SHORT.values(), "network"]], name)


def savings_table(networks: list[str], name: str) -> Exhibit:
    """The numbers of `savings_figure`, measured beside counted: products, and bytes of tensors by a formula."""
    columns = ["network", "frozen", "bytes each way", "products", "time of a step"]
    columns += ["formula, SGD", "memory, SGD", "formula, Adam", "memory, Adam"]
    caption = (
        "The same in numbers, measured beside counted; percent of full training. Products: multiply-accumulates of "
        "training on one example, counted. Formula: bytes of parameters, gradients and the local optimizer, counted; "
        "memory: most bytes in tensors, measured. Random inputs, batches of 20 images or 10 texts; "
        f"{benchmark('partial')['cpu']}."
    )
    return table(where(compare_with_full(), network=networks)[columns].round(1), caption, name)


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

    def show(column: str, form: str) -> Callable[[pd.DataFrame], str]:
        return lambda own: f"{own[column].iloc[0]:{form}}"

    cells: Cells = {"trained": show("trained", ","), "share": lambda own: f"{own['share'].iloc[0]:.2f} %"}
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
    return accuracy_by_setting(runs, "share", axis, caption, "share")


def scale_figure(runs: pd.DataFrame) -> Exhibit:
    """Accuracy by a factor on the frozen weights."""
    runs = runs.assign(factor=name_setting(runs, "scale", 1.0), last=runs["label"] != "dense1")
    runs = runs.sort_values(["last", "factor"], kind="stable")
    caption = "Accuracy when the frozen weights, drawn by Glorot's law, are multiplied by a factor."
    return accuracy_by_setting(runs, "factor", "factor on the frozen weights", caption, "scale")


def width_figure(runs: pd.DataFrame) -> Exhibit:
    """Accuracy by the width of the hidden layer, trained and frozen."""
    runs = runs.assign(width=runs["model"].map(WIDTHS), policy=name_policy(runs), law=runs["hyper.law"].map(LAWS))
    caption = "Accuracy with the hidden layer trained and frozen, by its width and by the law of initial values."
    return accuracy_by_setting(runs, "width", "hidden units", caption, "width", by="policy", panel="law")


def server_figure(runs: pd.DataFrame) -> Exhibit:
    """Accuracy by the server's optimizer and its learning rate."""
    optimizer = name_setting(runs, "optimizer", "sgd").map(OPTIMIZERS)
    momentum = name_setting(runs, "momentum", 0).map(lambda value: " with momentum" if value else "")
    names = optimizer + momentum + name_setting(runs, "server_lr", 1).map("\n{:g}".format)
    caption = "Accuracy by the server's optimizer, one learning rate each, not tuned."
    axis = "server's optimizer and its learning rate"
    return accuracy_by_setting(runs.assign(server=names), "server", axis, caption, "server")


def noise_figure(runs: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """Accuracy by the noise multiplier, with everything trained and with the hidden layer frozen."""
    spent = zip(runs["privacy.noise_multiplier"], runs["privacy.epsilon"], strict=True)
    budgets = [f"{noise:g}\nno ε" if pd.isna(epsilon) else f"{noise:g}\nε {epsilon:.2g}" for noise, epsilon in spent]
    runs = runs.assign(budget=budgets, policy=name_policy(runs))
    return accuracy_by_setting(runs, "budget", "noise multiplier", caption, name, by="policy")


def name_policy(runs: pd.DataFrame) -> pd.Series:
    """Whether the hidden layer is frozen, in words."""
    return name_setting(runs, "policy", DEFAULT).map(lambda policy: WHOLE if policy == DEFAULT else FROZEN)


def quote_policies(page: Page) -> dict[str, str]:
    """Accuracy and reduction of each policy, for the sentences."""
    labels = ("none", "dense1", "conv", "all-but-head", "random-2")
    main = page.select("main")
    main = main.assign(times=main["parameters"] / count_trained(main))
    numbers = means(main, labels) | means(main, labels, "{}-times", "times") | means(page.select("thin"), ("thin",))
    numbers |= means(page.select("he"), ("none-he", "dense1-he", "conv-he", "all-but-head-he"))
    failing = page.select("he", label="conv-he")["accuracy"]
    for group in ("hidden512", "hidden512-he"):
        numbers[f"{group}-gap"] = _tell_gap(page.select(group), WHOLE, FROZEN, ".1f")
    sent = page.select("hidden512").groupby("label")["upload_bytes"].mean().reindex(["none", "dense1"])
    numbers["hidden512-times"] = tell(sent["none"] / sent["dense1"])
    return numbers | {"conv-he-low": tell(failing.min()), "conv-he-high": tell(failing.max())}


def quote_resnet() -> dict[str, str]:
    """Parameters of the ResNet with all of its convolutions in blocks frozen."""
    module = build("resnet18-gn-100head", 3, 24, 10, Rng(0))
    shapes = {name: p.shape for name, p in module.named_parameters()}
    whole = sum(shape.numel() for shape in shapes.values())
    left = whole - sum(shapes[name].numel() for name in freezing.frozen_names("cifar/s1234", shapes))
    return {"all": f"{whole:,}", "trained": f"{left:,}", "times": f"{whole / left:.2f}"}


def quote_savings() -> dict[str, str]:
    """What is left under the policies of the text, by the benchmark."""
    numbers, measured = {}, compare_with_full()
    for policy in QUOTED:
        row = where(measured, frozen=policy).iloc[0]
        for key, column in SHORT.items():
            numbers[f"{policy.partition('/')[2]}-{key}"] = f"{row[column]:.0f}"
    return numbers


def quote_settings(page: Page) -> dict[str, str]:
    """Numbers on learning rate, initial values, width and text, for the sentences."""
    numbers = {}
    for lr in (0.1, 0.3):
        numbers[f"rates-gap-{lr}"] = _tell_gap(page.select("rates", lr=lr), WHOLE, FROZEN, ".1f")
    labels = ("none", "dense1", "all-but-head")
    for law in ("he", "glorot", "torch"):
        numbers |= means(page.select("laws", hyper={"law": law}), labels, f"law-{{}}-{law}")
    numbers |= means(page.select("scale", hyper={"scale": 4}), labels, "scale-{}-4")
    for model, width in WIDTHS.items():
        for law, tail in (("glorot", ""), ("he", "-he")):
            own = page.select("width", model=model, label=["none" + tail, "dense1" + tail])
            numbers[f"width-{law}-{width}"] = _tell_gap(own, WHOLE, FROZEN, ".1f")
    return numbers | means(page.select("text"), ("none", "ffn", "blocks"), "text-{}")


def quote_privacy(page: Page) -> dict[str, str]:
    """What freezing gains under noise, and what noise spends, for the sentences."""
    numbers = {}
    for group, noises in (("private", (0, 2, 4)), ("clipping", (4,)), ("tree", (0, 8))):
        for noise in noises:
            own = page.select(group, hyper={"noise_multiplier": noise})
            numbers[f"{group}-gap-{noise}"] = _tell_gap(own, FROZEN, WHOLE, "+.1f")
            if noise:
                numbers[f"{group}-epsilon-{noise}"] = mean(own, "privacy.epsilon", ".2g")
    strong = pd.concat([page.select("private", hyper={"noise_multiplier": 4}), page.select("clipping")])
    bounds = strong.groupby(["label", "privacy.clip_norm"])["accuracy"].mean()
    best = bounds.groupby("label").max().reindex(["private", "private-dense1"])
    numbers |= {"private-best": tell(best["private"]), "private-best-dense1": tell(best["private-dense1"])}
    return numbers | {"private-best-gap": tell(best["private-dense1"] - best["private"], "+.1f")}


def _tell_gap(runs: pd.DataFrame, first: str, second: str, form: str) -> str:
    """Mean accuracy under one policy less that under another."""
    average = runs["accuracy"].groupby(name_policy(runs)).mean().reindex([first, second])
    return tell(average[first] - average[second], form)
