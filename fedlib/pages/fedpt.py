"""The page of FedPT: what each policy saves, what it costs in accuracy, and what freezing does under noise."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import seaborn as sns
from IPython.display import Markdown

from fedlib.claims import results
from fedlib.claims.benchmarks import benchmark
from fedlib.claims.results import DEFAULT, each, where
from fedlib.models import freezing
from fedlib.models.registry import build
from fedlib.pages import scorecard
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, picture, table
from fedlib.pages.figures import accuracy_by_setting, heat_map
from fedlib.pages.page import NOT_RUN, Page, mean, means, tell
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
    cells |= {"bytes up": show("upload_bytes", ",.0f"), "accuracy (%)": deviate("late_accuracy")}
    cells |= {"seeds": len}
    caption = (
        "Messages as measured; accuracy in the mean over the last quarter of the rounds, mean and sample deviation "
        "over seeds. The reduction is that of a method's own network."
    )
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


def noise_figure(runs: pd.DataFrame, caption: str, name: str) -> Exhibit:
    """Accuracy by the noise multiplier, with everything trained and with the hidden layer frozen."""
    spent = zip(runs["privacy.noise_multiplier"], runs["privacy.epsilon"], strict=True)
    budgets = [f"{noise:g}\nno ε" if pd.isna(epsilon) else f"{noise:g}\nε {epsilon:.2g}" for noise, epsilon in spent]
    runs = runs.assign(budget=budgets, policy=name_policy(runs))
    return accuracy_by_setting(runs, "budget", "noise multiplier", caption, name, by="policy")


def name_policy(runs: pd.DataFrame) -> pd.Series:
    """Whether the hidden layer is frozen, in words."""
    return name_setting(runs, "policy", DEFAULT).map(lambda policy: WHOLE if policy == DEFAULT else FROZEN)


def search_map(page: Page, groups: list[str], column: str, panel: str, name: str, what: str) -> Exhibit | Markdown:
    """Validation accuracy by method and the setting searched for; a cell of which one run diverged stays empty."""
    tried = where(page.planned, group=groups)
    lost = tried.loc[tried["state"] == results.NOT_RUN, ["label", column]].apply(tuple, axis=1)
    kept = [point not in set(lost) for point in zip(tried["label"], tried[column], strict=True)] if len(tried) else []
    what = f"Accuracy on training images that no client has, {what}. Empty: not tried, or a run diverged."
    return page.show(heat_map, tried[kept], "label", column, panel, name, what)


def quote_policies(page: Page) -> dict[str, str]:
    """Accuracy, rate and reduction of each policy, for the sentences."""
    labels = ("none", "dense1", "conv", "thin")
    runs = page.select("main", "conv", "thin")
    runs = runs.assign(times=count_trained(where(runs, label="none")).mean() / count_trained(runs))
    numbers = means(runs, labels, column="late_accuracy") | means(runs, labels, "{}-times", "times")
    numbers |= means(runs, labels, "{}-lr", "lr", "g")
    sent = page.select("main").groupby("label")["upload_bytes"].mean().reindex(["none", "dense1"])
    return numbers | {"upload-times": tell(sent["none"] / sent["dense1"])}


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


def quote_laws(page: Page) -> dict[str, str]:
    """The best accuracy of each policy and law over the learning rates, and where it lies, for the sentences."""
    runs, numbers = page.select("laws"), {}
    for label in ("none", "dense1", "all-but-head"):
        for law in ("he", "glorot"):
            by_rate = where(runs, label=label, hyper={"law": law}).groupby("lr")["accuracy"].mean()
            numbers[f"law-{label}-{law}"] = tell(by_rate.max())
            numbers[f"law-{label}-{law}-lr"] = f"{by_rate.idxmax():g}" if len(by_rate) else NOT_RUN
    return numbers


def quote_privacy(page: Page) -> dict[str, str]:
    """What freezing gains at each amount of noise, what that spends, and the bounds that were found."""
    numbers: dict[str, str] = {}
    cases = next((s.finding.cases for s in page.scores if s.claim["id"] == "private-utility" and s.finding), {})
    for group in ("noise-1", "noise-2"):
        own = page.select(group)
        gaps = [scorecard.tell(intervals[0]) for case, intervals in cases.items() if f", {group}, " in case]
        numbers |= {
            f"{group}-gap": gaps[0] if gaps else NOT_RUN,
            f"{group}-epsilon": mean(own, "privacy.epsilon", ".2g"),
        }
        for label in ("private", "private-dense1"):
            numbers |= means(own, (label,), f"{group}-{{}}")
            numbers |= means(own, (label,), f"{group}-{{}}-bound", "privacy.clip_norm", "g")
    return numbers
