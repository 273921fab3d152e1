"""Who holds what: pictures and tables of partitions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm

from fedlib.data.partition import Partition
from fedlib.pages.exhibit import Exhibit, canvas, picture, table


def partition_picture(counts: dict[str, np.ndarray], classes: Sequence[str], provenance: str) -> Exhibit:
    """Images of each class that each client holds: per partition an array [clients, classes], as a shaded grid."""
    figure, axes = canvas(len(counts))
    top = max(grid.max() for grid in counts.values())  # shades by the root of a count, so that small ones show
    for ax, (title, grid) in zip(axes, counts.items(), strict=True):
        image = ax.imshow(grid.T, aspect="auto", cmap="cividis", norm=PowerNorm(0.5, 0, top), interpolation="nearest")
        ax.set(title=title, xlabel="client", yticks=range(len(classes)))
        ax.set_yticklabels(classes)
        ax.grid(False)
    figure.colorbar(image, ax=list(axes), label="training images")
    rows = [
        {"partition": title, "client": client, "class": classes[c], "images": int(grid[client, c])}
        for title, grid in counts.items()
        for client, c in np.ndindex(grid.shape)
    ]
    facts = "; ".join(
        f"{title}: {grid.sum(1).min()} to {grid.sum(1).max()} images a client, "
        f"{(grid > 0).sum(1).min()} to {(grid > 0).sum(1).max()} classes"
        for title, grid in counts.items()
    )
    alt = f"Grids of classes by clients, shaded by the number of images. {facts}."
    return picture(figure, alt, f"Who holds what. {facts}. {provenance}", pd.DataFrame(rows), "partition")


def client_table(dealt: dict[str, Partition], labels: np.ndarray, batch: int, caption: str) -> Exhibit:
    """Per partition: images, classes and batches of the smallest, the median and the largest client, and the hash."""
    rows = []
    for title, partition in dealt.items():
        shards = [partition.indices(k) for k in range(partition.clients)]
        images, classes = [len(shard) for shard in shards], [len(np.unique(labels[shard])) for shard in shards]
        counts = {"images": images, "classes": classes, "batches": [-(-size // batch) for size in images]}
        row = {name: f"{min(n):,} / {np.median(n):,g} / {max(n):,}" for name, n in counts.items()}
        rows.append({"partition": title} | row | {"hash": partition.hash})
    return table(pd.DataFrame(rows), caption, "clients")
