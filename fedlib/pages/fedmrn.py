"""The page of FedMRN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

from fedlib.claims.results import each, where
from fedlib.pages.client_diagnostics import inside
from fedlib.pages.exhibit import Exhibit, spread
from fedlib.pages.figures import heat_map, lines
from fedlib.pages.page import NOT_RUN, Page, means
from fedlib.runs.experiments import specs

INSIDE = (
    "Digits, Dirichlet 0.3, 20 clients, 5 a round, uniform noise of magnitude 0.1, learning rate 1, a single seed "
    "(0), measured while this page was made."
)


def look_inside() -> tuple[Exhibit, Exhibit, dict[str, str]]:
    """Histograms of u / n, the share of ones by round, and numbers for the sentences on both."""
    chosen = specs("fedmrn", "lab", "noise_*_noise-uniform_magnitude-0.1_seed0")
    ratios, density = inside(chosen, np.linspace(-2, 2, 41))
    ratios["case"] = ratios["method"] + ", round " + ratios["round"].astype(str)
    fits, ends = [], []
    for (label, number), part in each(ratios, "method", "round"):
        fitting = part["u / n"].between(0 if label == "fedmrn-binary" else -1, 1)
        fits.append(f"{label}, round {number}: {100 * part.loc[fitting, 'share of entries'].sum():.0f} %")
    for label, part in each(density, "method"):
        first, last = part["share of ones"].iloc[[0, -1]]
        ends.append(f"{label}: {first:.2f} to {last:.2f}")
    histograms = lines(
        *(ratios, "u / n", "share of entries", "case"),
        "Histogram of u over n, symmetric about zero with a peak at zero and with large end bins that collect the "
        "clipped entries.",
        f"Ratio of update to noise at the end of local training; the end bins hold all beyond them. {INSIDE}",
        "ratios",
    )
    shares = lines(
        *(density, "round", "share of ones", "method"),
        "Share of ones in the masks by round: signed near one half throughout, binary about a quarter and falling.",
        f"Share of ones in the uploaded masks. {INSIDE}",
        "density",
    )
    return histograms, shares, {"fits": "; ".join(fits), "density": "; ".join(ends)}


def tuning_maps(page: Page) -> dict[str, Exhibit | Markdown]:
    """Validation accuracy by method and learning rate in the searches for groups fashion and wide."""
    maps = {}
    for group in ("fashion", "wide"):
        runs = page.select(f"tune-{group}")
        what = (
            "Accuracy on training images that no client has, by method and learning rate, in the search for group "
            f"{group}. An empty cell: the run diverged."
        )
        maps[group] = page.show(heat_map, runs, "label", "lr", "split", f"rates-{group}", what)
    return maps


def quote_methods(page: Page) -> dict[str, str]:
    """Accuracy and bits of the methods of groups fashion and wide, and the noise, for the sentences."""
    numbers: dict[str, str] = {}
    labels = (
        "fedavg",
        "fedmrn-binary",
        "fedmrn-signed",
        "small-signed",
        "after-signed",
        "signsgd",
        "topk",
        "terngrad",
        "eden",
    )
    for group in ("fashion", "wide"):
        own = page.select(group)
        own = own.assign(measured=8 * own["upload_bytes"] / own["weights"])
        numbers |= means(own, labels, f"{group}-{{}}", "late_accuracy")
        numbers |= means(own, labels, f"{group}-{{}}-bits", "measured", ".2f")
        numbers |= means(own, labels, f"{group}-{{}}-mean", "mean_accuracy")
        numbers |= means(where(own, split="labels-3"), labels, f"{group}-{{}}-few", "late_accuracy")
        for label in labels:
            rate = where(own, label=label)["lr"]
            numbers[f"{group}-{label}-lr"] = f"{rate.iloc[0]:g}" if len(rate) else NOT_RUN
        for mask in ("binary", "signed"):
            noise = where(own, label=f"fedmrn-{mask}")
            numbers[f"{group}-{mask}-magnitude"] = f"{noise['hyper.magnitude'].iloc[0]:g}" if len(noise) else NOT_RUN
    return numbers


def masking_map(page: Page) -> Exhibit | Markdown:
    """Accuracy by masking rule and learning rate."""
    what = "Final test accuracy by masking rule and learning rate, a panel a mask alphabet."
    return page.show(heat_map, page.select("psm"), "hyper.masking", "lr", "label", "masking", what)


def set_beside_wide(page: Page) -> pd.DataFrame:
    """The runs with error feedback, after those of group wide that are alike but for it."""
    feedback = page.select("feedback")
    wide = page.select("wide", split="dirichlet-0.3", label=list(feedback["label"]))
    return pd.concat([wide, feedback])


def quote_feedback(page: Page) -> dict[str, str]:
    """Points that error feedback gains, seed by seed."""
    numbers, runs = {}, set_beside_wide(page)
    for label in ("signsgd", "topk", "fedmrn-signed", "terngrad", "eden"):
        own = where(runs, label=label).pivot_table(index="seed", columns="group", values="accuracy")
        gains = (own["feedback"] - own["wide"]).dropna() if {"feedback", "wide"} <= set(own) else pd.Series(dtype=float)
        numbers[label] = spread(gains, "+.1f") if len(gains) else NOT_RUN
    return numbers


def quote_bytes(page: Page) -> dict[str, Any]:
    """Bytes of a mean upload of the scripts' network, and the share of its parts."""
    own = page.stand_in("bytes")
    dense, masked = (where(own, label=label).iloc[0] for label in ("fedavg", "fedmrn-binary"))
    return {
        "fedmrn-upload": f"{masked['upload_bytes']:,.0f}",
        "fedavg-upload": f"{dense['upload_bytes']:,.0f}",
        "fedmrn-ratio": round(float(dense["upload_bytes"] / masked["upload_bytes"]), 2),
        "fedmrn-both-ways": round(float(100 * masked["megabytes"] / dense["megabytes"]), 1),
        "fedmrn-full-share": round(float(100 * masked["part.full precision"] / masked["uplink_bytes"]), 1),
    }
