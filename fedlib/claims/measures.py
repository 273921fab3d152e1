"""What is measured of runs for a claim: for each method, group and partition a value a seed.

Each measure takes the tables of `fedlib.claims.results` that it names, `runs` or both, and the claim's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import pandas as pd

from fedlib.claims import targets
from fedlib.claims.benchmarks import Values, inference_speed, peak_memory, step_time
from fedlib.claims.results import each, join_rounds, where
from fedlib.errors import SpecError

CASE = ("label", "group", "split")
Compare = Callable[[pd.DataFrame, pd.DataFrame], pd.Series]


def take_cases(
    runs: pd.DataFrame, labels: Collection[str], groups: Collection[str]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The runs of each case, by seed, after the case's name. SpecError where a case has two runs of one seed.

    A case has one setting: what a method's best of several would be is chosen elsewhere, on other data.
    """
    for case, own in each(where(runs, label=list(labels), group=list(groups)), *CASE):
        twice = own[own["seed"].duplicated()]
        if len(twice):
            name = twice["name"].iloc[0]
            raise SpecError(f"{name}: another run has its label, group, split and seed; give it a label of its own")
        yield ", ".join(case), own.set_index("seed")


def _by_seed(
    runs: pd.DataFrame, labels: Collection[str], groups: Collection[str], measure: Callable[[pd.DataFrame], pd.Series]
) -> Values:
    return {case: _tell(measure(own)) for case, own in take_cases(runs, labels, groups)}


def _pairs(
    runs: pd.DataFrame, labels: Collection[str], groups: Collection[str], against: Collection[str], compare: Compare
) -> Values:
    """One value a seed for each method and each of its baselines, where both have run: `compare` gets aligned rows."""
    base = dict(take_cases(runs, against, groups))
    values: Values = {}
    for name, own in take_cases(runs, labels, groups):
        label, place = name.split(", ", 1)
        for baseline in against:
            other = base.get(f"{baseline}, {place}", own.iloc[:0])
            both = own.index[own.index.isin(other.index)]
            if len(both):
                case = f"{label} against {baseline}" if len(against) > 1 else label
                values[f"{case}, {place}"] = _tell(compare(own.loc[both], other.loc[both]))
    return values


def _tell(values: pd.Series) -> dict[int, float]:
    return {int(str(seed)): float(value) for seed, value in values.items()}


def bits_per_weight(runs: pd.DataFrame, labels: list[str], groups: list[str], part: str) -> Values:
    """Measured bits that one part of the uploads spends per masked parameter."""
    return _by_seed(runs, labels, groups, lambda own: 8 * own[f"part.{part}"] / (own["uploads"] * own["weights"]))


def bits_per_parameter(runs: pd.DataFrame, labels: list[str], groups: list[str]) -> Values:
    """Measured bits of a mean upload, all its parts, per parameter of the network."""
    return _by_seed(runs, labels, groups, lambda own: own["measured_bits"])


def final_bits(runs: pd.DataFrame, labels: list[str], groups: list[str]) -> Values:
    """Bits per parameter that the paper's own definition counts in the last round."""
    return _by_seed(runs, labels, groups, lambda own: own["last.bits"])


def storage_ratio(runs: pd.DataFrame, labels: list[str], groups: list[str]) -> Values:
    """Bytes of the network as float32 over bytes of the model's file after the last round."""
    return _by_seed(runs, labels, groups, lambda own: 4 * own["parameters"] / own["last.notes.model file"])


def range_ratio(runs: pd.DataFrame, labels: list[str], groups: list[str]) -> Values:
    """Range of the updates in the last round over that in the first: mean over tensors of the ratio of mean ranges."""

    def compare(own: pd.DataFrame) -> pd.Series:
        first = own.filter(like="first.notes.ranges.")
        last = own.filter(like="last.notes.ranges.").set_axis(first.columns, axis=1)
        return (last / first.where(first != 0)).mean(axis=1)

    return _by_seed(runs, labels, groups, compare)


def upload_ratio(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """Bytes of the other method's mean upload over bytes of this one's, same partition and seed."""
    return _pairs(runs, labels, groups, against, lambda own, other: other["upload_bytes"] / own["upload_bytes"])


def accuracy_gap(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """Test accuracy less the other method's, in points, same partition and seed: the mean over the last quarter of the
    rounds, so that the swing from one cohort to the next does not decide."""
    return _pairs(runs, labels, groups, against, lambda own, other: own["late_accuracy"] - other["late_accuracy"])


def bits_ratio(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """The other method's bits per parameter in the last round over this one's, by the paper's definition."""
    return _pairs(
        runs, labels, groups, against, lambda own, other: other["last.bits"] / own["last.bits"].clip(lower=1e-9)
    )


def speed_gap(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """As accuracy_gap, for the mean accuracy over the evaluated rounds: higher is sooner there."""
    return _pairs(runs, labels, groups, against, lambda own, other: own["mean_accuracy"] - other["mean_accuracy"])


def saving_to_target(
    runs: pd.DataFrame, rounds: pd.DataFrame, labels: list[str], groups: list[str], against: list[str], quantity: str
) -> Values:
    """Percent of what the other method spends (`rounds`, `bits` or `megabytes`) until both reach the same accuracy.

    The target is `targets.SHARE` of FedAvg's best.
    """
    there = list(where(runs, label="fedavg", group=groups)["group"].unique())
    own = where(runs, label=[*labels, *against, "fedavg"], group=there)
    if not there:
        return {}
    spent = targets.reach(own, rounds, targets.set_targets(own, rounds))
    costs = own[[*CASE, "seed", "name"]].join(spent)
    return _pairs(costs, labels, there, against, lambda own, other: targets.save(own, other, quantity))


def private_gap(runs: pd.DataFrame, labels: list[str], groups: list[str], against: list[str]) -> Values:
    """As accuracy_gap, of private runs: a case for each amount of noise."""
    name = "privacy.noise_multiplier"
    values: Values = {}
    for noise, own in each(where(runs, group=groups).dropna(subset=name), name) if name in runs else ():
        if noise > 0:
            gaps = accuracy_gap(own, labels, groups, against)
            values |= {f"{case}, noise {noise:g}": found for case, found in gaps.items()}
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
    "private_gap": private_gap,
    "traffic_ratio": traffic_ratio,
    "model_ratio": model_ratio,
    "inference_speed": inference_speed,
    "step_time": step_time,
    "peak_memory": peak_memory,
}
