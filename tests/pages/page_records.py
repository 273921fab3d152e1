"""Records written by hand, as the tables of the pages read them."""

from typing import Any

from fedlib.runs.record import Record


def written(label: str, rounds: list[dict[str, Any]], final: dict[str, Any] | None = None, /, **fields: Any) -> Record:
    """A record of these rounds, of two clients each where they say nothing else; 100 parameters, 10 not compressed.

    final: beside the accuracy of the last round and the sums of all. fields: of the spec.
    """
    entries: list[dict[str, Any]] = [
        {"round": n, "clients": [0, 1], "uplink_bytes": 0, "downlink_bytes": 0, "paper_bits": 0} | entry
        for n, entry in enumerate(rounds, 1)
    ]
    end: dict[str, Any] = {
        "accuracy": entries[-1]["accuracy"],
        "uploads": sum(len(entry["clients"]) for entry in entries),
    }
    end |= {name: sum(entry[name] for entry in entries) for name in ("uplink_bytes", "downlink_bytes", "paper_bits")}
    spec = {"label": label, "group": "main", "split": "iid", "seed": 0, "lr": 0.1, "profile": "lab", "hyper": {}}
    spec |= {"data": "digits", "model": "net", "clients": 10, "cohort": 2, "name": f"{label}-{fields}"} | fields
    return {
        "spec": spec,
        "rounds": entries,
        "final": end | {"uplink_parts": {}} | (final or {}),
        "parameters": {"weights": 90, "others": 10},
        "made": {"device": "cpu (test)"},
    }
