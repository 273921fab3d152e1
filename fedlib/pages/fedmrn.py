"""The page of FedMRN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown

from fedlib.claims.measures import take_best
from fedlib.claims.results import each, where
from fedlib.pages.client_diagnostics import inside
from fedlib.pages.exhibit import Exhibit
from fedlib.pages.figures import heat_map, lines
from fedlib.pages.page import NOT_RUN, Page, means, tell
from fedlib.runs.experiments import specs

INSIDE = (
    "Digits, Dirichlet 0.3, 20 clients, 5 a round, uniform noise of magnitude 0.1, learning rate 0.3, a single seed "
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


def masking_map(page: Page, lr: float) -> Exhibit | Markdown:
    """Accuracy by masking rule and magnitude at one learning rate."""
    what = f"Final test accuracy at learning rate {lr:g} by masking rule and noise magnitude, a panel a mask alphabet."
    runs = page.select("psm", lr=lr)
    return page.show(heat_map, runs, "hyper.masking", "hyper.magnitude", "label", f"masking-{lr:g}", what)


def quote_methods(page: Page) -> dict[str, str]:
    """Accuracy and bits of the methods of group wide, each at its best rate, and the noise, for the sentences."""
    numbers: dict[str, str] = {}
    wide = page.select("wide")
    wide = wide.assign(measured=8 * wide["upload_bytes"] / wide["weights"])
    best, fast = take_best(wide), where(wide, lr=1.0, split="dirichlet-0.3")
    labels = ("fedavg", "fedmrn-binary", "fedmrn-signed", "small-signed", "after-signed", "terngrad", "eden")
    numbers |= means(best, labels, "wide-{}") | means(best, labels, "wide-{}-bits", "measured", ".2f")
    numbers |= means(fast, labels, "wide-{}-fast") | means(where(best, split="labels-3"), labels[:3], "wide-{}-few")
    for group in ("fashion", "wide"):
        for mask in ("binary", "signed"):
            own = page.select(group, label=f"fedmrn-{mask}")
            numbers[f"{group}-{mask}-magnitude"] = f"{own['hyper.magnitude'].iloc[0]:g}" if len(own) else NOT_RUN
    return numbers


def set_beside_wide(page: Page) -> pd.DataFrame:
    """The runs with error feedback, after those of group wide that are alike but for it."""
    feedback = page.select("feedback")
    wide = page.select("wide", split="dirichlet-0.3", label=list(feedback["label"]))
    return pd.concat([wide, feedback])


def quote_feedback(page: Page) -> dict[str, str]:
    """Points that error feedback gains, each at its best rate."""
    numbers, runs = {}, set_beside_wide(page)
    for label in ("signsgd", "topk", "fedmrn-signed", "terngrad", "eden"):
        best = take_best(where(runs, label=label))
        gap = where(best, group="feedback")["accuracy"].mean() - where(best, group="wide")["accuracy"].mean()
        numbers[label] = tell(gap, "+.1f")
    return numbers


def quote_bytes(page: Page) -> dict[str, Any]:
    """Bytes of a mean upload, the share of its parts, and gaps to FedAvg on the scripts' network."""
    dense, masked = (page.select("main", label=label).iloc[0] for label in ("fedavg", "fedmrn-binary"))
    gaps = next(s for s in page.scores if s.claim["id"] == "close-to-fedavg").means
    told = [f"{case}: {gap:+.1f} points" for case, gap in gaps.items() if ", main, " in case]
    return {
        "fedmrn-upload": f"{masked['upload_bytes']:,.0f}",
        "fedavg-upload": f"{dense['upload_bytes']:,.0f}",
        "fedmrn-ratio": round(float(dense["upload_bytes"] / masked["upload_bytes"]), 2),
        "fedmrn-both-ways": round(float(100 * masked["megabytes"] / dense["megabytes"]), 1),
        "fedmrn-full-share": round(float(100 * masked["part.full precision"] / masked["uplink_bytes"]), 1),
        "fedmrn-gaps": "; ".join(told) or "not measured at this scale",
    }
