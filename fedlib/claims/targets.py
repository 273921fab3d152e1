"""What it takes to reach an accuracy: the first evaluated round at or above it, and all that was sent until then."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from fedlib.runs.record import Record

SHARE = 0.99  # of the best accuracy that full precision reaches in the same group, partition and seed


class Reached(NamedTuple):
    """`ever` false: the target was missed, and the rest is what the whole run took, a lower bound."""

    ever: bool
    rounds: int
    bits: float  # uploaded by all clients together, as the paper's definition counts them
    megabytes: float  # uploaded, measured

    def cost(self, quantity: str) -> float:
        return float(getattr(self, quantity))


def reached(r: Record, target: float) -> Reached:
    """target: accuracy in [0, 1]."""
    bits = itertools.accumulate(entry["paper_bits"] for entry in r["rounds"])
    sent = itertools.accumulate(entry["uplink_bytes"] for entry in r["rounds"])
    for entry, b, s in zip(r["rounds"], bits, sent, strict=True):
        ever = entry["accuracy"] is not None and entry["accuracy"] >= target
        found = Reached(ever, entry["round"], b, s / 1e6)
        if ever:
            break
    return found


def best_accuracy(r: Record) -> float:
    """The highest of all evaluated rounds."""
    return max(entry["accuracy"] for entry in r["rounds"] if entry["accuracy"] is not None)


def target(records: Sequence[Record], like: Record, dense: str = "fedavg", share: float = SHARE) -> float:
    """`share` of the best accuracy of the run of `dense` with a run's group, partition and seed."""
    (found,) = (r for r in records if place(r) == (dense, *place(like)[1:]))
    return share * best_accuracy(found)


def place(r: Record) -> tuple[str, str, str, int]:
    """Label, group, partition and seed."""
    s = r["spec"]
    return s["label"], s["group"], s["split"], s["seed"]


def saving(own: Reached, other: Reached, quantity: str) -> float:
    """Percent of the other's cost that is saved; negative where more is spent.

    Where the other missed the target, its whole run counts, so that the saving is a lower bound; where this one did, it
    saves nothing and is taken to have spent all over again what it spent (at most -100).
    """
    mine = own.cost(quantity) if own.ever else 2 * max(own.cost(quantity), other.cost(quantity))
    return 100 * (1 - mine / other.cost(quantity))
