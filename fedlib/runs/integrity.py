"""Whether a record still says what its run measured: a digest of itself, and what must be true of any record.

The digest finds accidents. Whoever edits a record can make its digest anew; then sums and counts must still agree.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

SUMS = ("uplink_bytes", "downlink_bytes", "paper_bits")


def digest(record: dict[str, Any]) -> str:
    """Thirty-two hex digits: of all that a record holds but its own digest."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    content = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def fault(record: dict[str, Any]) -> str:
    """The first thing that is wrong with a record, as it was read; empty where nothing is."""
    try:
        return next(_faults(record), "")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        return f"a part is missing or of another kind ({type(error).__name__}: {error})"[:200]


def _faults(record: dict[str, Any]) -> Iterator[str]:
    if record.get("digest") != digest(record):
        yield "changed after it was written: it does not fit its digest"
    spec, final, rounds = record["spec"], record["final"], record["rounds"]
    if not all(map(math.isfinite, _numbers(record))):
        yield "holds a number that is not finite"
    if [entry["round"] for entry in rounds] != list(range(1, spec["rounds"] + 1)):
        yield f"has other rounds than 1 to {spec['rounds']}"
    for entry in rounds:
        number, clients = entry["round"], [*entry["clients"], *(client for client, _ in entry["refused"])]
        due = number % spec["evaluate_every"] == 0 or number == spec["rounds"]
        judged = entry["loss"] if "metrics" in entry else entry["accuracy"]
        if due != (judged is not None) or not 0 <= (entry["accuracy"] or 0) <= 1:
            yield f"round {number}: accuracy {entry['accuracy']}"
        if len(set(entry["clients"])) < len(entry["clients"]) or not all(0 <= k < spec["clients"] for k in clients):
            yield f"round {number}: clients {clients}"
        if not all(type(entry[name]) is int and entry[name] > 0 for name in SUMS[:2]) or entry["paper_bits"] < 0:
            yield f"round {number}: bytes or bits that no round can have"
    for name in ("accuracy", "loss"):
        if final[name] != rounds[-1][name]:
            yield f"final {name} {final[name]} is not that of the last round"
    for name in SUMS:
        if not math.isclose(final[name], sum(entry[name] for entry in rounds), rel_tol=1e-9):
            yield f"final {name} {final[name]} is not the sum over the rounds"
    for name, lists in (("uploads", "clients"), ("refused", "refused")):
        if final[name] != sum(len(entry[lists]) for entry in rounds):
            yield f"final {name} {final[name]} is not the number over the rounds"
    if sum(final["uplink_parts"].values()) != final["uplink_bytes"] or min(final["uplink_parts"].values()) < 0:
        yield "uplink_parts do not add up to uplink_bytes"
    if not all(type(n) is int and n >= 0 for n in record["parameters"].values()) or not record["made"]["seconds"] >= 0:
        yield "parameters or seconds that no run can have"


def _numbers(value: Any) -> Iterator[float]:
    """All numbers within lists and mappings."""
    if isinstance(value, dict | list):
        yield from itertools.chain.from_iterable(map(_numbers, value.values() if isinstance(value, dict) else value))
    elif isinstance(value, int | float):
        yield value
