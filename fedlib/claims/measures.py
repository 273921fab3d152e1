"""What is measured of runs for a claim: a value a seed for each method, group and partition.

Each measure takes the tables of `fedlib.claims.results` that it names, `runs` or both, and the claim's arguments.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator

import numpy as np
import pandas as pd

from fedlib.claims import targets
from fedlib.claims.benchmarks import Values, inference_speed, peak_memory, step_time
from fedlib.claims.results import each, join_rounds, where
from fedlib.errors import SpecError

CASE = ("label", "group", "split")
Compare = Callable[[pd.DataFrame, pd.DataFrame], "pd.Series | np.ndarray"]


def take_best(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of each method, group and partition at the learning rate that serves it best; others left out.

    Best is the mean final accuracy over seeds, for every method alike; with one learning rate there is no choice.
    """
    if not len(runs):
        return runs
    twice = runs[runs.duplicated([*CASE, "lr", "seed"])]
    if len(twice):
        name = twice["name"].iloc[0]
        raise SpecError(f"{name}: another run has its label, group, split, lr and seed; give it a label")
    best = [where(own, lr=own.groupby("lr", sort=False)["accuracy"].mean().idxmax()) for _, own in each(runs, *CASE)]
    return pd.concat(best)


def _cases(runs: pd.DataFrame, labels: Collection[str], groups: Collection[str]) -> Iterator[tuple[str, pd.DataFrame]]:
    """The runs of each case, at the best learning rate, after the case's name."""
    for case, own in each(take_best(where(runs, label=list(labels), group=list(groups))), *CASE):
        yield ", ".join(case), own


def _pairs(
    runs: pd.DataFrame, labels: Collection[str], groups: Collection[str], against: Collection[str], compare: Compare
) -> Values:
    """One value a seed for each method and each of its baselines, where both have run: `compare` gets aligned rows."""
    base = {name: own.set_index("seed") for name, own in _cases(runs, against, groups)}
    values: Values = {}
    for name, runs_of_case in _cases(runs, labels, groups):
        own = runs_of_case.set_index("seed")
        label, place = name.split(", ", 1)
        for baseline in against:
            other = base.get(f"{baseline}, {place}", own.iloc[:0])
            both = own.index[own.index.isin(other.index)]
            if len(both):
                shown = f"{label} against {baseline}" if len(against) > 1 else label
                values[f"{shown}, {place}"] = list(map(float, compare(own.loc[both], other.loc[both])))
    return values


def bits_per_weight(runs: pd.DataFrame, labels: list[str], groups: list[str], part: str) -> Values:
    """Measured bits that one part of the uploads spends per masked parameter."""
    return {
        case: (8 * own[f"part.{part}"] / (own["uploads"] * own["weights"])).tolist()
        for case, own in _cases(runs, labels, groups)
    }


def bits_per_parameter(runs: pd.DataFrame, labels: list[str], groups: list[str]) -> Values:
    """Measured bits of a mean upload, all its parts, per parameter of the network."""
    return {case: own["measured_bits"].tolist() for case, own in _cases(runs, labels, groups)}


def final_bits(runs: pd.DataFrame, labels: list[str], groups: list[str]) -> Values:
    """Bits per parameter that the paper's own definition counts in the last round."""
    return {case: own["last.bits"].tolist() for case, own in _cases(runs, labels, groups)}


def storage_ratio(runs: pd.DataFrame, labels: list[str], groups: list[str]) -> Values:
    """Bytes of the network as float32 over bytes of the model's file after the last round."""
    return {
        case: (4 * own["parameters"] / own["last.notes.model file"]).tolist()
        for case, own in _cases(runs, labels, groups)
    }


def range_ratio(runs: pd.DataFrame, labels: list[str], groups: list[str]) -> Values:
    """Range of the updates in the last round over that in the first: mean over tensors of the ratio of mean ranges."""
    first = runs.filter(like="first.notes.ranges.")
    last = runs.filter(like="last.notes.ranges.").set_axis(first.columns, axis=1)
    ratio = (last / first.where(first != 0)).mean(axis=1)
    return {case: ratio[own.index].tolist() for case, own in _cases(runs, labels, groups)}


def upload_ratio(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """Bytes of the other method's mean upload over bytes of this one's, same partition and seed."""
    return _pairs(runs, labels, groups, against, lambda own, other: other["upload_bytes"] / own["upload_bytes"])


def accuracy_gap(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """Final test accuracy less the other method's, in points, same partition and seed, each at its learning rate."""
    return _pairs(runs, labels, groups, against, lambda own, other: own["accuracy"] - other["accuracy"])


def bits_ratio(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """The other method's bits per parameter in the last round over this one's, by the paper's definition."""
    return _pairs(
        runs, labels, groups, against, lambda own, other: other["last.bits"] / own["last.bits"].clip(lower=1e-9)
    )


def speed_gap(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """As accuracy_gap, for the mean accuracy over the evaluated rounds: higher is sooner there."""
    return _pairs(runs, labels, groups, against, lambda own, other: own["mean_accuracy"] - other["mean_accuracy"])


def saving_to_target(
    runs: pd.DataFrame,
    rounds: pd.DataFrame,
    labels: list[str],
    groups: list[str],
    against: list[str],
    quantity: str,
    largest: bool,
) -> Values:
    """Percent of what the other method spends (`rounds`, `bits` or `megabytes`) until both reach the same accuracy.

    The target is `targets.SHARE` of FedAvg's best. largest: of the methods in `against` only the one with the largest
    mean saving, for claims that say "up to".
    """
    there = list(where(runs, label="fedavg", group=groups)["group"].unique())
    own = where(runs, label=[*labels, *against, "fedavg"], group=there)
    if not there:
        return {}
    spent = targets.reach(own, rounds, targets.set_targets(own, rounds))
    costs = own[[*CASE, "seed", "lr", "accuracy"]].join(spent)
    found = _pairs(costs, labels, there, against, lambda own, other: targets.save(own, other, quantity))
    if not largest or not found:
        return found
    case = max(found, key=lambda name: statistics.fmean(found[name]))
    return {case: found[case]}


def largest_reduction(
    runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str], points: float
) -> Values:
    """As upload_ratio, of the method alone that saves most among those that lose at most so many points of accuracy."""
    gaps = {case: statistics.fmean(gap) for case, gap in accuracy_gap(runs, labels, groups, against).items()}
    ratios = upload_ratio(runs, labels, groups, against)
    close = {case: statistics.fmean(ratios[case]) for case, gap in gaps.items() if gap >= -points}
    if close:
        case = max(close, key=lambda name: close[name])
        return {case: ratios[case]}
    return {"none of them": [1.0] * min(map(len, ratios.values()))} if ratios else {}


def private_gap(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """As accuracy_gap, of the private runs with the most noise in each group."""
    name = "privacy.noise_multiplier"
    values: Values = {}
    for group in groups if name in runs else ():
        own = where(runs, group=group).dropna(subset=name)
        values |= accuracy_gap(where(own, **{name: own[name].max()}), labels, [group], against)
    return values


def count_traffic(runs: pd.DataFrame, rounds: pd.DataFrame, meter: str) -> pd.Series:
    """Bits of all messages of each run, both ways, by a meter of `fedlib.methods.fedcompress.messages`.

    The index is that of `runs`. A compressed file is FedCompress' own definition, so no other one is noted for it.
    """
    if meter == "ours":
        return 8.0 * (runs["uplink_bytes"] + runs["downlink_bytes"])
    frame = join_rounds(runs, rounds)
    up = frame.get(f"other_bits.{meter}", frame["paper_bits"]).fillna(frame["paper_bits"])
    down = frame[f"notes.sent_bits.{meter}"] * 8 * frame["downlink_bytes"] / frame["notes.sent_bits.ours"]
    return (up + down).groupby(frame["run"]).sum()[runs["run"]].set_axis(runs.index)


def traffic_ratio(
    runs: pd.DataFrame, rounds: pd.DataFrame, labels: list[str], groups: list[str], against: list[str], meter: str
) -> Values:
    """CCR: the other method's bits in both directions, all rounds and clients, over this one's."""
    own = where(runs, label=[*labels, *against], group=groups)
    counted = own.assign(traffic=count_traffic(own, rounds, meter)) if len(own) else own
    return _pairs(counted, labels, groups, against, lambda own, other: other["traffic"] / own["traffic"])


def model_ratio(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str], meter: str) -> Values:
    """MCR: size of the other method's final model over this one's."""
    size = f"last.notes.model_bits.{meter}"
    return _pairs(runs, labels, groups, against, lambda own, other: other[size] / own[size])


MEASURES: dict[str, Callable[..., Values]] = {
    "bits_per_weight": bits_per_weight,
    "upload_ratio": upload_ratio,
    "accuracy_gap": accuracy_gap,
    "speed_gap": speed_gap,
    "bits_per_parameter": bits_per_parameter,
    "final_bits": final_bits,
    "bits_ratio": bits_ratio,
    "storage_ratio": storage_ratio,
    "saving_to_target": saving_to_target,
    "range_ratio": range_ratio,
    "largest_reduction": largest_reduction,
    "private_gap": private_gap,
    "traffic_ratio": traffic_ratio,
    "model_ratio": model_ratio,
    "inference_speed": inference_speed,
    "step_time": step_time,
    "peak_memory": peak_memory,
}
