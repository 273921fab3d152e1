"""What it takes to reach an accuracy: the first evaluated round at or above it, and all that was sent until then."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fedlib.claims.results import join_rounds, where

DENSE = "fedavg"  # full precision
SHARE = 0.99  # of the best accuracy that full precision reaches in the same group, partition and seed
PLACE = ["group", "split", "seed"]


def reach(runs: pd.DataFrame, rounds: pd.DataFrame, target: pd.Series | float) -> pd.DataFrame:
    """What each run spends until its accuracy (%) is at the target: a row a run, with the index of `runs`.

    Columns: `ever`, false where the target was missed, and the rest is what the whole run took, a lower bound;
    `rounds`; uploaded by all clients together, `bits` by the paper's definition and `megabytes` measured; `both ways`,
    megabytes of uploads and downloads.
    """
    frame = join_rounds(runs.assign(target=target), rounds)
    met, last = (
        rows.set_index("run")
        for rows in (
            frame[frame["accuracy"] >= frame["target"]].drop_duplicates("run"),
            frame.drop_duplicates("run", keep="last"),
        )
    )
    end = pd.concat([met, last.drop(met.index)]).loc[runs["run"]]
    columns = {"ever": end.index.isin(met.index), "rounds": end["round"], "bits": end["spent_bits"]}
    columns |= {"megabytes": end["uplink_megabytes"], "both ways": end["megabytes"]}
    return pd.DataFrame({name: np.asarray(column) for name, column in columns.items()}, index=runs.index)


def set_targets(runs: pd.DataFrame, rounds: pd.DataFrame, dense: str = DENSE, share: float = SHARE) -> pd.Series:
    """For each run `share` of the best accuracy (%) of the run of `dense` with its group, partition and seed.

    ValueError where that run is missing, or where there are several.
    """
    best = rounds.groupby("run")["accuracy"].max()
    model = where(runs, label=dense).set_index(PLACE)["run"]
    places = pd.MultiIndex.from_frame(runs[PLACE])
    if not model.index.is_unique or not places.isin(model.index).all():
        raise ValueError(f"each group, partition and seed needs one run of {dense} to set the target")
    return pd.Series(share * best[model[places]].to_numpy(), index=runs.index)


def save(own: pd.DataFrame, other: pd.DataFrame, quantity: str) -> pd.Series:
    """Percent of the other's cost that is saved, from rows of `reach` in the same order; negative where more is spent.

    Where the other missed the target, its whole run counts, so that the saving is a lower bound; where this one did, it
    saves nothing and is taken to have spent all over again what it spent (at most -100).
    """
    mine, theirs = own[quantity].to_numpy(float), other[quantity].to_numpy(float)
    spent = np.where(own["ever"], mine, 2 * np.maximum(mine, theirs))
    return pd.Series(100 * (1 - spent / theirs), index=own.index)
