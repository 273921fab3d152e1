"""What comes of a run, and of several side by side: numbers, a table, a figure, the trained network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from fedlib.errors import DataError, require_name
from fedlib.runs.record import Record

COLUMNS = ("round", "uplink_bytes", "downlink_bytes", "megabytes")
AGAINST = {"both": ["uplink_bytes", "downlink_bytes"], "up": ["uplink_bytes"], "down": ["downlink_bytes"]}


@dataclass(frozen=True)
class Run:
    """What came of a run. record: as the book's records, field by field. model: the trained network."""

    record: Record
    model: nn.Module

    @property
    def accuracy(self) -> float:
        """Share of the test samples after the last round; nan where the targets are no labels."""
        return _number(self.record["final"]["accuracy"])

    @property
    def loss(self) -> float:
        """Mean loss of the test samples after the last round."""
        return _number(self.record["final"]["loss"])

    @property
    def uplink_bytes(self) -> int:
        """Of all uploads of the run, as they were sent."""
        return int(self.record["final"]["uplink_bytes"])

    @property
    def downlink_bytes(self) -> int:
        """Of all broadcasts of the run, counted once for each client of a round."""
        return int(self.record["final"]["downlink_bytes"])

    @property
    def uploads(self) -> int:
        """How many there were."""
        return sum(len(entry["clients"]) for entry in self.rounds)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Those of the record: what the book knows of each."""
        return list(self.record["rounds"])

    @property
    def table(self) -> pd.DataFrame:
        """A row a round: accuracy, loss and metrics; bytes of the round, up and down; megabytes so far, both ways."""
        rows = []
        for entry in self.rounds:
            row = {name: entry[name] for name in ("round", "accuracy", "loss")} | entry.get("metrics", {})
            rows.append(row | {name: entry[name] for name in ("uplink_bytes", "downlink_bytes")})
        frame = pd.DataFrame(rows)
        frame["loss"] = frame["loss"].astype(float)
        frame["megabytes"] = (frame["uplink_bytes"] + frame["downlink_bytes"]).cumsum() / 1e6
        return frame if frame["accuracy"].notna().any() else frame.drop(columns="accuracy")

    def plot(self, ax: Any = None, against: str = "both") -> Any:
        """Accuracy (or the first metric, or the loss) against megabytes sent: "both" ways, "up" or "down"; gives
        matplotlib's axes."""
        return Comparison({str(self.record["spec"]["label"]): [self]}).plot(ax, against)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: by label, one a seed."""

    runs: Mapping[str, Sequence[Run]]

    @property
    def measure(self) -> str:
        """What is compared: accuracy; else the first metric; else the loss."""
        names = [str(name) for name in next(iter(self.runs.values()))[0].table if name not in COLUMNS]
        return "accuracy" if "accuracy" in names else next((name for name in names if name != "loss"), "loss")

    @property
    def table(self) -> pd.DataFrame:
        """A row a method: what is compared after the last round, mean and sample deviation over seeds; megabytes of the
        run each way; how many times less than the first method it uploads."""
        rows, first = [], None
        for label, own in self.runs.items():
            ends = [float(run.table[self.measure].dropna().iloc[-1]) for run in own]
            up = float(np.mean([run.uplink_bytes for run in own])) / 1e6
            down = float(np.mean([run.downlink_bytes for run in own])) / 1e6
            first = first or up
            row = {"method": label, self.measure: np.mean(ends)}
            row |= {"deviation": np.std(ends, ddof=1)} if len(ends) > 1 else {}
            rows.append(row | {"MB up": up, "MB down": down, "times less up": first / up})
        return pd.DataFrame(rows).set_index("method")

    def plot(self, ax: Any = None, against: str = "both") -> Any:
        """What is compared against megabytes sent, "both" ways, "up" or "down", a line a method (mean over seeds);
        gives matplotlib's axes."""
        require_name("against", against, AGAINST)
        try:
            from matplotlib import pyplot, ticker
        except ImportError as error:
            raise DataError("plot: matplotlib is not installed; pip install matplotlib, or use the table") from error
        ax = ax or pyplot.figure(figsize=(5.5, 3.6), layout="constrained").subplots()
        for label, own in self.runs.items():
            lines = []
            for run in own:
                sent = run.table[AGAINST[against]].sum(axis=1).cumsum() / 1e6
                lines.append(run.table.assign(sent=sent)[["sent", self.measure]].dropna().to_numpy())
            line = np.mean(lines, axis=0)
            ax.plot(line[:, 0], line[:, 1], marker=".", label=label)
        way = "both ways" if against == "both" else against
        ax.set(xlabel=f"megabytes sent, {way} (logarithmic)", ylabel=f"test {self.measure}", xscale="log")
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")  # plain numbers
        ax.xaxis.set_minor_formatter("")
        ax.legend()
        return ax


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
