"""The page of sparse random networks: bits and sparsity of masks by round, their files, and what a coder may know."""

from __future__ import annotations

from typing import Any

import pandas as pd
from scipy.optimize import brentq

from fedlib.claims.results import join_rounds, where
from fedlib.methods.fedsparse.masks import bits_a_parameter
from fedlib.pages.exhibit import Exhibit
from fedlib.pages.figures import lines_by_round
from fedlib.pages.page import Page, mean, means, tell
from fedlib.pages.tables import Cells, average, gather_notes, name_setting, summarize

LAYERS = {"notes.density.1.weight": "first", "notes.density.3.weight": "second", "notes.density.5.weight": "last"}
CONV6 = 2_262_602  # parameters, counted from the layer shapes of FedPM's code
SWITCHES = ("", "-persistent", "-sgd", "-kaiming", "-entropy", "-pooled", "-code")


def density_figure(runs: pd.DataFrame, rounds: pd.DataFrame) -> Exhibit:
    """Mean keep-probability of each layer by round."""
    frame = gather_notes(runs, rounds, LAYERS)
    frame["case"] = frame["label"] + ", " + frame["of"] + " layer"
    order = {label: place for place, label in enumerate(runs["label"].unique())}
    frame = frame.sort_values("label", key=lambda labels: labels.map(order), kind="stable")
    alt = (
        "Mean keep-probability of each layer over rounds: FedPM's stay at one half or rise a little; with the "
        "penalty the first two layers fall, the second most, and the last stays near one half."
    )
    caption = "Mean keep-probability of each layer, IID."
    return lines_by_round(frame, "value", "mean probability", alt, caption, "density", runs)


def coding_figure(runs: pd.DataFrame, rounds: pd.DataFrame) -> Exhibit:
    """Measured bits a parameter by round, with and without the knowledge of theta."""
    frame = join_rounds(runs, rounds)
    knows = name_setting(frame, "coding", "nothing").replace({"global": "theta"})
    frame["case"] = frame["label"] + ", knowing " + knows
    y = "measured bits a parameter"
    alt = (
        "Measured bits a parameter over rounds. Knowing nothing, FedPM stays at one bit; knowing theta, both methods "
        "fall far below it."
    )
    caption = "Measured bits a parameter over rounds, with and without the knowledge of theta."
    return lines_by_round(frame, "measured_bits", y, alt, caption, "coding-rounds", runs)


def bits_table(runs: pd.DataFrame, name: str) -> Exhibit:
    """A row a method and coding: bits a parameter of the last round's uploads, by each definition and as measured."""
    official = runs["last.other_bits.official code"] / runs["last.uploads"] / runs["parameters"]
    runs = runs.assign(coding=name_setting(runs, "coding", "pooled"), official=official)
    cells: Cells = {
        "measured": average("last.measured_bits", ".4f"),
        "H(p1), by definition": average("last.bits", ".4f"),
        "official code": average("official", ".4f"),
        "seeds": len,
    }
    caption = "Bits a parameter of the last round's uploads. The masks of a method are the same in all its rows."
    return summarize(runs, {"label": "method", "coding": "coded by"}, cells, caption, name)


def storage_table(runs: pd.DataFrame, name: str) -> Exhibit:
    """A row a method and partition: bytes of the final model's file, beside the network as float32."""
    dense = 4 * runs["parameters"]
    runs = runs.assign(dense=dense, times=dense / runs["last.notes.model file"])
    cells: Cells = {"bytes of the file": average("last.notes.model file"), "as float32": average("dense")}
    cells |= {"times smaller": average("times", ".1f"), "accuracy (%)": average("accuracy", ".1f")}
    caption = (
        "Size of the final model: the seed of its weights and one mask, in a file that loads again. Accuracy: mean "
        "over five masks."
    )
    return summarize(runs, {"label": "method", "split": "partition"}, cells, caption, name)


def downlink_table(runs: pd.DataFrame, plain: pd.DataFrame, name: str) -> Exhibit:
    """A row a run with a coded broadcast: bits a parameter of the last one, beside the same run with float32."""
    both = runs.merge(plain, on=["label", "seed"], suffixes=("", " plain"))
    for tail in ("", " plain"):
        clients = both[f"cohort{tail}"] * both[f"parameters{tail}"]
        both[f"down{tail}"] = 8 * both[f"last.downlink_bytes{tail}"] / clients
    cells: Cells = {"float32": average("down plain", ".2f"), "levels, entropy-coded": average("down", ".2f")}
    caption = "Bits a parameter of the last round's broadcast, a single seed (0), measured."
    return summarize(both, {"label": "method"}, cells, caption, name)


def quote_classes(runs: pd.DataFrame) -> dict[str, str]:
    """Accuracy with and without the penalty, by partition of the digits."""
    labels = ("fedpm", "lam-1", "lam-10")
    return means(where(runs, split="iid"), labels, "{}-iid") | means(
        where(runs, split="labels-2"), labels, "{}-labels-2"
    )


def quote_switches(page: Page, digits: pd.DataFrame) -> dict[str, str]:
    """Bits and accuracy under each switch, and the memory of Bayesian aggregation, for the sentences."""
    labels = ("fedpm", "lam-10", "lam-100", *(f"lam-1{tail}" for tail in SWITCHES))
    numbers = means(digits, labels, "bits-{}", "last.bits", ".3f") | means(digits, labels, "accuracy-{}")
    density = where(digits, label="lam-1-pooled")["last.notes.density.1.weight"]
    numbers["pooled-dense"] = f"{(density > 0.5).sum()} of {len(density)}"
    for label in ("bayes-1", "bayes-5"):
        own = page.select("participation", label=label)
        evaluated = page.rounds[page.rounds["run"].isin(own["run"])].dropna(subset="accuracy")
        numbers[f"{label}-begin"] = mean(evaluated.drop_duplicates("run"), form=".0f")
        numbers[f"{label}-end"] = mean(own, form=".0f")
    return numbers


def quote_magnitudes(page: Page, digits: pd.DataFrame) -> dict[str, Any]:
    """What five magnitudes would mean in Conv6, and what is measured here."""

    def share(bits: float, most: float = 0.1) -> float:
        return float(brentq(lambda p: bits_a_parameter(p) - bits, 1e-12, most))

    finding = next((s.finding for s in page.scores if s.claim["id"] == "five-magnitudes"), None)
    ratios = {case: intervals[0].mean for case, intervals in finding.cases.items()} if finding else {}
    plain, strong = (where(digits, label=label)["last.bits"].mean() for label in ("fedpm", "lam-100"))
    return {
        "n": f"{CONV6:,}",
        "share": f"{share(1e-5):.2g}",
        "weights": f"{share(1e-5) * CONV6:.0f}",
        "float": f"{share(32e-5) * CONV6:.0f}",
        "fifth": f"{100 * share(0.2, 0.5):.1f}",
        "strong": tell(plain / strong),
        "measured": "; ".join(f"{case}: {value:.2f}" for case, value in ratios.items()) or "not measured at this scale",
    }
