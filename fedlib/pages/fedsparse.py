"""The page of sparse random networks: bits and sparsity of masks by round, their files, and what a coder may know."""

from __future__ import annotations

from typing import Any

import pandas as pd
from scipy.optimize import brentq

from fedlib.claims.conditions import count_local_steps
from fedlib.claims.results import each, where
from fedlib.claims.score import measure
from fedlib.claims.verdicts import mean_interval
from fedlib.methods.fedsparse.masks import bits_a_parameter
from fedlib.pages import scorecard
from fedlib.pages.exhibit import Exhibit
from fedlib.pages.figures import lines_by_round
from fedlib.pages.page import NOT_RUN, Page, mean, means
from fedlib.pages.tables import Cells, average, deviate, gather_notes, summarize

LAYERS = {"notes.density.1.weight": "first", "notes.density.3.weight": "second", "notes.density.5.weight": "last"}
CONV6 = 2_262_602  # parameters, counted from the layer shapes of FedPM's code
LABELS = ("fedpm", "lam-1", "lam-10", "lam-30")
SWITCHES = ("", "-persistent", "-kaiming", "-code")


def density_figure(runs: pd.DataFrame, rounds: pd.DataFrame) -> Exhibit:
    """Mean keep-probability of each layer by round."""
    frame = gather_notes(runs, rounds, LAYERS)
    frame["case"] = frame["label"] + ", " + frame["of"] + " layer"
    order = {label: place for place, label in enumerate(runs["label"].unique())}
    frame = frame.sort_values("label", key=lambda labels: labels.map(order), kind="stable")
    ends = frame[frame["round"] == frame["round"].max()].groupby("case", sort=False)["value"].mean()
    alt = f"Mean keep-probability of each layer over rounds. At the end: {'; '.join(map(_pair, ends.items()))}."
    caption = "Mean keep-probability of each layer, IID."
    return lines_by_round(frame, "value", "mean probability", alt, caption, "density", runs)


def _pair(item: tuple[Any, float]) -> str:
    return f"{item[0]}: {item[1]:.2f}"


def steps_table(runs: pd.DataFrame, name: str) -> Exhibit:
    """A row a method and number of local steps a round: bits of the last round, and accuracy."""
    runs = runs.assign(steps=count_local_steps(runs).astype(int)).sort_values(["label", "steps"], kind="stable")
    cells: Cells = {"bits, last round": deviate("last.bits", ".3f"), "accuracy (%)": deviate("late_accuracy")}
    cells |= {"seeds": len}
    caption = "Bits a parameter of the last round's uploads by definition, mean and sample deviation over seeds."
    return summarize(
        runs, {"label": "method", "steps": "local steps a round", "clients": "clients"}, cells, caption, name
    )


def switches_table(runs: pd.DataFrame, name: str) -> Exhibit:
    """A row a switch: bits of the last round, and accuracy."""
    cells: Cells = {"bits, last round": deviate("last.bits", ".3f"), "accuracy (%)": deviate("accuracy"), "seeds": len}
    runs = runs.assign(steps=count_local_steps(runs).astype(int))
    by = {"label": "method", "steps": "local steps a round", "rounds": "rounds"}
    caption = "Bits a parameter of the last round's uploads by definition, and test accuracy after it."
    return summarize(runs, by, cells, caption, name)


def coding_table(runs: pd.DataFrame, name: str) -> Exhibit:
    """A row a method: bits a parameter of the last round's messages, by definition and as coded by what is known."""
    official = runs["last.other_bits.official code"] / runs["last.uploads"] / runs["parameters"]
    down = 8 * runs["last.downlink_bytes"] / (runs["cohort"] * runs["parameters"])
    runs = runs.assign(official=official, down=down)
    cells: Cells = {
        "H(p1), by definition": average("last.bits", ".3f"),
        "official code": average("official", ".3f"),
        "coded against theta, measured": average("last.measured_bits", ".3f"),
        "broadcast of theta, measured": average("down", ".2f"),
    }
    caption = "Bits a parameter of one message in the last round."
    return summarize(runs, {"label": "method", "rounds": "rounds"}, cells, caption, name)


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


def quote_cases(page: Page) -> dict[str, str]:
    """Of each method and group: accuracy and bits, and how they differ from FedPM's, with intervals over seeds."""
    numbers: dict[str, str] = {}
    tables = {"runs": page.select("main", "skewed"), "rounds": page.rounds}
    for group in ("main", "skewed"):
        own = page.select(group)
        numbers |= means(own, LABELS, f"{group}-{{}}", "late_accuracy")
        numbers |= means(own, LABELS, f"{group}-{{}}-bits", "last.bits", ".3f")
        given = {"labels": list(LABELS[1:]), "groups": [group], "against": ["fedpm"]}
        for word, what in (("times", "bits_ratio"), ("points", "accuracy_gap")):
            found = {case.split(", ")[0]: values for case, values in measure(what, given, tables).items()}
            for label in LABELS[1:]:
                told = scorecard.tell(mean_interval(list(found[label].values()))) if label in found else NOT_RUN
                numbers[f"{group}-{label}-{word}"] = told
    return numbers


def quote_switches(page: Page) -> dict[str, str]:
    """Bits under each switch and number of local steps, for the sentences."""
    labels = [f"lam-1{tail}" for tail in SWITCHES]
    numbers = means(page.select("switches"), labels, "switches-{}", "last.bits", ".3f")
    steps = page.select("steps")
    steps = steps.assign(steps=count_local_steps(steps)) if len(steps) else steps
    for label in ("lam-1", "lam-10"):
        numbers |= {f"steps-{label}-{few}": NOT_RUN for few in (5, 47)}
        for few, own in each(where(steps, label=label), "steps") if len(steps) else ():
            numbers[f"steps-{label}-{few:.0f}"] = mean(own, "last.bits", ".3f")
    for label, own in each(page.select("coding"), "label"):
        numbers[f"known-{label}"] = mean(own, "last.measured_bits", ".3f")
    return {f"known-{label}": NOT_RUN for label in ("fedpm", "lam-10")} | numbers


def quote_magnitudes() -> dict[str, str]:
    """What five magnitudes would mean in Conv6."""

    def share(bits: float, most: float = 0.1) -> float:
        return float(brentq(lambda p: bits_a_parameter(p) - bits, 1e-12, most))

    return {
        "n": f"{CONV6:,}",
        "share": f"{share(1e-5):.2g}",
        "weights": f"{share(1e-5) * CONV6:.0f}",
        "float": f"{share(32e-5) * CONV6:.0f}",
        "fifth": f"{100 * share(0.2, 0.5):.1f}",
    }
