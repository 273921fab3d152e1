"""The plot of the last lab: accuracy against bytes, and which methods nobody beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import seaborn as sns

from fedlib.own.results import Run
from fedlib.pages.exhibit import Exhibit, add_legend, canvas, picture


def pareto(results: Mapping[str, Run], front: Sequence[bool]) -> Exhibit:
    """A point a method, those of the Pareto front joined. front: of each method, whether it lies on it."""
    frame = pd.DataFrame(
        {
            "method": list(results),
            "uplink (kB)": [run.uplink_bytes / 1000 for run in results.values()],
            "accuracy (%)": [100 * run.accuracy for run in results.values()],
            "on the front": list(front),
        }
    )
    figure, axes = canvas(height=4.4, width=6.6)
    on = frame[frame["on the front"]].sort_values("uplink (kB)")
    axes[0].plot(on["uplink (kB)"], on["accuracy (%)"], color="0.6", zorder=1, label="Pareto front")
    style = {"hue": "method", "style": "method", "s": 80, "linewidth": 0, "zorder": 2}
    sns.scatterplot(frame, x="uplink (kB)", y="accuracy (%)", ax=axes[0], **style)
    axes[0].get_legend().remove()
    axes[0].set(xlabel="bytes uploaded in all rounds (kB)", ylabel="test accuracy (%)", xscale="log")
    add_legend(figure, axes)
    said = (f"{r['method']} {r['uplink (kB)']:.0f} kB, {r['accuracy (%)']:.1f} %" for _, r in frame.iterrows())
    alt = f"Accuracy against uploaded bytes: {'; '.join(said)}. On the front: {', '.join(on['method'])}."
    return picture(figure, alt, "One seed, ten rounds on digits: a sketch, not a result.", frame, "pareto")
