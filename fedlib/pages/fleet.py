"""The page on large rounds: what uploads cost a server's cores and its network, from what bench/server.py measured."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any, NamedTuple

import pandas as pd

from fedlib.pages.exhibit import MARKERS, Exhibit, canvas, picture, table

# A server of a fleet, as rates: stated, not measured
CORES = 16
NETWORK = 1.25e9  # bytes a second that it takes in: 10 Gbit/s
ROUND = 600.0  # seconds in which a round's uploads arrive
CLIENTS = (10**3, 10**5, 10**7)
SUM = 8  # bytes an entry of what a leaf of the tree sends on: sums in float64


class Cost(NamedTuple):
    """What one upload of a method costs a server."""

    method: str
    upload_bytes: int
    broadcast_bytes: int
    core_ms: float  # of one core
    cores_ms: float  # of all together
    network_ms: float
    server_ms: float  # of the slower of the two
    memory_bytes: float  # while two are read


def costs(measured: dict[str, Any]) -> dict[str, Cost]:
    found = {}
    for method, row in sorted(measured["rows"].items(), key=lambda each: each[1]["upload_bytes"]):
        cores, network = row["ms"] / CORES, 1e3 * row["upload_bytes"] / NETWORK
        memory = 4 * measured["weights"] * row["peak_models"]
        sizes = row["upload_bytes"], row["broadcast_bytes"]
        found[method] = Cost(method, *sizes, row["ms"], cores, network, max(cores, network), memory)
    return found


def servers(cost: Cost, clients: int) -> int:
    """How many a round of so many clients needs: as many as its slower side, cores or network, keeps busy."""
    return max(1, math.ceil(clients * cost.server_ms / 1e3 / ROUND))


def fleet_table(measured: dict[str, Any], name: str) -> Exhibit:
    """A row a method, by upload: core time, which side is slower, one server's seconds or how many servers a round
    needs, and what passes its network."""
    own = costs(measured).values()
    cells: dict[str, list[str]] = {
        "method": [cost.method for cost in own],
        "upload (kB)": [f"{cost.upload_bytes / 1e3:,.0f}" for cost in own],
        "core (ms)": [_tell(cost.core_ms) for cost in own],
        "slower": ["cores" if cost.cores_ms > cost.network_ms else "network" for cost in own],
    }
    *few, most = CLIENTS
    for clients in few:
        cells[f"s, {_power(clients)}"] = [_tell(clients * cost.server_ms / 1e3) for cost in own]
    cells[f"servers, {_power(most)}"] = [f"{servers(cost, most):,}" for cost in own]
    cells["TB in"] = [f"{cost.upload_bytes * most / 1e12:,.1f}" for cost in own]
    cells["TB out"] = [f"{cost.broadcast_bytes * most / 1e12:,.1f}" for cost in own]
    how = (
        f"Servers of {CORES} such cores and {8e-9 * NETWORK:g} Gbit/s. With {' and '.join(map(_power, few))} clients: "
        f"seconds of one server; with {_power(most)}: servers that read all within {ROUND / 60:g} minutes, and what "
        f"passes their network. {measured['weights']:,} weights; core time measured on {measured['cpu']}."
    )
    return table(pd.DataFrame(cells), how, name, numbers=pd.DataFrame(own))


def fleet_figure(measured: dict[str, Any], name: str) -> Exhibit:
    """An upload's time on the network against its time on the cores; on the diagonal both sides are equally busy."""
    own = costs(measured).values()
    figure, (ax,) = canvas(height=6.2, width=5.6)
    sides = [side for cost in own for side in (cost.cores_ms, cost.network_ms)]
    low, high = min(sides) / 2, max(sides) * 2
    ax.plot([low, high], [low, high], color="0.6", linewidth=1)
    ax.text(low * 1.6, low * 1.8, "cores and network equally busy", rotation=45, va="bottom", color="0.4")
    for index, cost in enumerate(own):
        style = {"marker": MARKERS[index % len(MARKERS)], "color": f"C{index % 10}", "linestyle": "none"}
        ax.plot(cost.network_ms, cost.cores_ms, label=cost.method, **style)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.set(xlabel="network time of an upload (ms)", ylabel=f"time of {CORES} cores for it (ms)")
    figure.legend(loc="outside lower center", ncols=4)
    busy = ", ".join(cost.method for cost in own if cost.cores_ms > cost.network_ms)
    alt = f"Core time against network time of an upload. Above the diagonal, where cores are the slower side: {busy}."
    caption = f"Rates as in the table; core time measured on {measured['cpu']}, one thread, one upload at a time."
    return picture(figure, alt, caption, pd.DataFrame(own), name)


def moved(measured: dict[str, Any]) -> list[str]:
    """Methods that change their place among all by three or more where servers count in place of bytes."""
    own = costs(measured).values()

    def place(cost: Cost, side: str) -> int:
        return 1 + sum(getter(other) < getter(cost) for getter in [attrgetter(side)] for other in own)

    places = {cost.method: (place(cost, "upload_bytes"), place(cost, "server_ms")) for cost in own}
    return [
        f"{method}: place {one} by bytes, {other} by servers"
        for method, (one, other) in places.items()
        if abs(one - other) >= 3
    ]


def tree(measured: dict[str, Any], method: str, clients: int) -> dict[str, float]:
    """An aggregation tree of two levels: leaves that read uploads, and a root that adds up what they send.

    leaves; megabytes that each sends on; seconds of one core with which the root adds them up, as FedAvg's uploads.
    """
    leaves = servers(costs(measured)[method], clients)
    plain = measured["rows"]["FedAvg"]
    sent = SUM * measured["weights"]
    seconds = leaves * plain["ms"] * sent / plain["upload_bytes"] / 1e3
    return {"leaves": leaves, "megabytes": sent / 1e6, "seconds": seconds}


def _power(clients: int) -> str:
    return f"10{'⁰¹²³⁴⁵⁶⁷⁸⁹'[round(math.log10(clients))]}"


def _tell(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
