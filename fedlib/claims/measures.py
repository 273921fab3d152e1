"""What is measured of records for a claim: a value a seed for each method, group and partition."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence

from fedlib.claims import targets
from fedlib.claims.benchmarks import Values, inference_speed, peak_memory, step_time
from fedlib.errors import SpecError
from fedlib.runs.record import Record

Cases = dict[tuple[str, str, str], dict[int, Record]]


def by_case(records: Sequence[Record], labels: Collection[str], groups: Collection[str]) -> Cases:
    """Records by (label, group, split) and seed, each method at the learning rate of its grid that serves it best.

    Best is the mean final accuracy over seeds, for every method alike; with one learning rate there is no choice.
    """
    found: dict[tuple[str, str, str], dict[float, dict[int, Record]]] = {}
    for r in records:
        s = r["spec"]
        if s["label"] in labels and s["group"] in groups:
            runs = found.setdefault((s["label"], s["group"], s["split"]), {}).setdefault(s["lr"], {})
            if s["seed"] in runs:
                raise SpecError(f"{s['name']}: another run has its label, group, split, lr and seed; give it a label")
            runs[s["seed"]] = r
    return {case: max(rates.values(), key=_mean_accuracy) for case, rates in found.items()}


def best(records: Sequence[Record]) -> list[Record]:
    """The records of each method, group and partition at the learning rate that serves it best; others left out."""
    specs = [r["spec"] for r in records]
    cases = by_case(records, {s["label"] for s in specs}, {s["group"] for s in specs})
    return [r for runs in cases.values() for r in runs.values()]


def _mean_accuracy(runs: dict[int, Record]) -> float:
    return statistics.fmean(r["final"]["accuracy"] for r in runs.values())


def bits_per_weight(records: list[Record], labels: list[str], groups: list[str], part: str) -> Values:
    """Measured bits that one part of the uploads spends per masked parameter."""

    def bits(r: Record) -> float:
        return 8 * r["final"]["uplink_parts"][part] / (r["final"]["uploads"] * r["parameters"]["weights"])

    return {_name(case): [bits(r) for r in runs.values()] for case, runs in by_case(records, labels, groups).items()}


def bits_per_parameter(records: list[Record], labels: list[str], groups: list[str]) -> Values:
    """Measured bits of a mean upload, all its parts, per parameter of the network."""
    cases = by_case(records, labels, groups)
    return {_name(case): [8 * upload_bytes(r) / parameters(r) for r in runs.values()] for case, runs in cases.items()}


def final_bits(records: list[Record], labels: list[str], groups: list[str]) -> Values:
    """Bits per parameter that the paper's own definition counts in the last round."""
    return {
        _name(case): [last_bits(r) for r in runs.values()] for case, runs in by_case(records, labels, groups).items()
    }


def storage_ratio(records: list[Record], labels: list[str], groups: list[str]) -> Values:
    """Bytes of the network as float32 over bytes of the model's file after the last round."""
    cases = by_case(records, labels, groups)
    return {_name(case): [4 * parameters(r) / model_bytes(r) for r in runs.values()] for case, runs in cases.items()}


def parameters(r: Record) -> int:
    return int(sum(r["parameters"].values()))


def last_bits(r: Record) -> float:
    """Mean over the last round's uploads, per parameter, by the paper's definition."""
    last = r["rounds"][-1]
    return float(last["paper_bits"] / max(1, len(last["clients"])) / parameters(r))


def model_bytes(r: Record) -> int:
    return int(r["rounds"][-1]["notes"]["model file"])


def _name(case: tuple[str, str, str], against: str = "") -> str:
    label, group, split = case
    return f"{label}{' against ' + against if against else ''}, {group}, {split}"


def _pairs(
    records: list[Record],
    labels: list[str],
    groups: list[str],
    against: list[str],
    measure: Callable[[Record, Record], float],
) -> Values:
    """One value a seed for each method and each method it is held against, where both have run."""
    base = by_case(records, against, groups)
    values: Values = {}
    for (label, group, split), runs in by_case(records, labels, groups).items():
        for name in against:
            other = base.get((name, group, split), {})
            pairs = [measure(r, other[seed]) for seed, r in runs.items() if seed in other]
            if pairs:
                values[_name((label, group, split), name if len(against) > 1 else "")] = pairs
    return values


def upload_ratio(records: list[Record], labels: list[str], groups: list[str], against: list[str]) -> Values:
    """Bytes of the other method's mean upload over bytes of this one's, same partition and seed."""
    return _pairs(records, labels, groups, against, lambda r, other: upload_bytes(other) / upload_bytes(r))


def accuracy_gap(records: list[Record], labels: list[str], groups: list[str], against: list[str]) -> Values:
    """Final test accuracy less the other method's, in points, same partition and seed, each at its learning rate."""

    def gap(r: Record, other: Record) -> float:
        return 100 * (r["final"]["accuracy"] - other["final"]["accuracy"])

    return _pairs(records, labels, groups, against, gap)


def bits_ratio(records: list[Record], labels: list[str], groups: list[str], against: list[str]) -> Values:
    """The other method's bits per parameter in the last round over this one's, by the paper's definition."""
    return _pairs(records, labels, groups, against, lambda r, other: last_bits(other) / max(last_bits(r), 1e-9))


def speed_gap(records: list[Record], labels: list[str], groups: list[str], against: list[str]) -> Values:
    """As accuracy_gap, for the mean accuracy over the evaluated rounds: higher is sooner there."""
    return _pairs(records, labels, groups, against, lambda r, other: 100 * (_area(r) - _area(other)))


def saving_to_target(
    records: list[Record], labels: list[str], groups: list[str], against: list[str], quantity: str, largest: bool
) -> Values:
    """Percent of what the other method spends (`rounds`, `bits` or `megabytes`) until both reach the same accuracy.

    The target is `targets.SHARE` of FedAvg's best. largest: of the methods in `against` only the one with the largest
    mean saving, for claims that say "up to".
    """

    def percent(r: Record, other: Record) -> float:
        goal = targets.target(records, r)
        return targets.saving(targets.reached(r, goal), targets.reached(other, goal), quantity)

    dense = by_case(records, ["fedavg"], groups)
    there = [group for group in groups if any(case[1] == group for case in dense)]
    found = _pairs(records, labels, there, against, percent)
    if not largest or not found:
        return found
    case = max(found, key=lambda name: statistics.fmean(found[name]))
    return {case: found[case]}


def range_ratio(records: list[Record], labels: list[str], groups: list[str]) -> Values:
    """Range of the updates in the last round over that in the first: mean over tensors of the ratio of mean ranges."""

    def ratio(r: Record) -> float:
        first, last = (r["rounds"][index]["notes"]["ranges"] for index in (0, -1))
        return statistics.fmean(last[name] / first[name] for name in first if first[name])

    cases = by_case(records, labels, groups)
    return {_name(case): [ratio(r) for r in runs.values()] for case, runs in cases.items()}


def largest_reduction(
    records: list[Record], labels: list[str], groups: list[str], against: list[str], points: float
) -> Values:
    """As upload_ratio, of the method alone that saves most among those that lose at most so many points of accuracy."""
    gaps = accuracy_gap(records, labels, groups, against)
    close = {
        case: r for case, r in upload_ratio(records, labels, groups, against).items() if _mean(gaps[case]) >= -points
    }
    case = max(close, key=lambda name: _mean(close[name]), default="")
    return {case: close[case]} if case else {"none of them": [1.0] * min(map(len, gaps.values()))} if gaps else {}


def traffic(r: Record, meter: str) -> float:
    """Bits of all messages of a run, both ways, by a meter of `fedlib.methods.fedcompress.messages`."""
    if meter == "ours":
        return 8.0 * (r["final"]["uplink_bytes"] + r["final"]["downlink_bytes"])
    bits = 0.0
    for entry in r["rounds"]:
        other = entry.get("other_bits", {})
        bits += other.get(meter, entry["paper_bits"])  # a compressed file is FedCompress' own definition
        sent = entry["notes"]["sent_bits"]
        bits += sent[meter] * 8 * entry["downlink_bytes"] / sent["ours"]
    return bits


def traffic_ratio(
    records: list[Record], labels: list[str], groups: list[str], against: list[str], meter: str
) -> Values:
    """CCR: the other method's bits in both directions, all rounds and clients, over this one's."""
    return _pairs(records, labels, groups, against, lambda r, other: traffic(other, meter) / traffic(r, meter))


def model_ratio(records: list[Record], labels: list[str], groups: list[str], against: list[str], meter: str) -> Values:
    """MCR: size of the other method's final model over this one's."""

    def size(r: Record) -> float:
        return float(r["rounds"][-1]["notes"]["model_bits"][meter])

    return _pairs(records, labels, groups, against, lambda r, other: size(other) / size(r))


def private_gap(records: list[Record], labels: list[str], groups: list[str], against: list[str]) -> Values:
    """As accuracy_gap, of the private runs with the most noise in each group."""
    values: Values = {}
    for group in groups:
        own = [r for r in records if r["spec"]["group"] == group and "privacy" in r["final"]]
        noise = max((r["final"]["privacy"]["noise_multiplier"] for r in own), default=0)
        strongest = [r for r in own if r["final"]["privacy"]["noise_multiplier"] == noise]
        values |= accuracy_gap(strongest, labels, [group], against)
    return values


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _area(r: Record) -> float:
    return statistics.fmean(entry["accuracy"] for entry in r["rounds"] if entry["accuracy"] is not None)


def upload_bytes(r: Record) -> float:
    """Mean measured bytes of one accepted upload."""
    final = r["final"]
    return (final["uplink_bytes"] - final["uplink_parts"].get("refused", 0)) / final["uploads"]


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
