"""What the scripts in `bench/` have measured, for claims about time and memory."""

from __future__ import annotations

import json
from typing import Any

from fedlib.data.sources import home

Values = dict[
    str, dict[int, float]
]  # case, e.g. "fedmrn-binary, main, iid" -> by seed, or by turn of a benchmark: value


def step_time(networks: list[str]) -> Values:
    """Time of a local step over that of full training, for each policy of these networks, in each turn of the bench."""
    return {f"{row['network']}, {row['policy']}": dict(enumerate(row["step_ratios"])) for row in _frozen(networks)}


def peak_memory(networks: list[str]) -> Values:
    """Most bytes in tensors during local training over those of full training, by each of three optimizers."""
    full = {row["network"]: row["peak_bytes"] for row in benchmark("partial")["rows"] if row["policy"] == "none"}

    def ratios(row: dict[str, Any]) -> dict[int, float]:
        return dict(enumerate(size / full[row["network"]][name] for name, size in row["peak_bytes"].items()))

    return {f"{row['network']}, {row['policy']}": ratios(row) for row in _frozen(networks)}


def _frozen(networks: list[str]) -> list[dict[str, Any]]:
    return [r for r in benchmark("partial")["rows"] if r["network"] in networks and r["policy"] != "none"]


def benchmark(name: str) -> dict[str, Any]:
    """What a script of `bench/` has measured."""
    found: dict[str, Any] = json.loads((home() / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def inference_speed(networks: list[str], plain: str, clustered: str) -> Values:
    """Time of the plain network over that of its clustered copy, a value a network, image shape and batch size."""
    times = [row["variants"] for row in benchmark("inference")["times"] if row["network"] in networks]
    ratios = dict(enumerate(variants[plain]["ms"] / variants[clustered]["ms"] for variants in times))
    return {f"{clustered} against {plain}": ratios} if ratios else {}
