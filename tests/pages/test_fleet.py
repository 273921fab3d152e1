"""What rounds of many clients ask of servers, from costs made up so that they can be worked by hand."""

import pytest

from fedlib.pages import fleet

# Network: 1.25 GB/s, so 1.25 MB take 1 ms. Cores: 16, so 32 ms of one take 2.
MEASURED = {
    "weights": 1000,
    "cpu": "a processor",
    "rows": {
        "FedAvg": {"upload_bytes": 12_500_000, "broadcast_bytes": 4000, "ms": 16.0, "peak_models": 6.0},
        "Small": {"upload_bytes": 1_250_000, "broadcast_bytes": 4000, "ms": 32.0, "peak_models": 5.5},
        "Slow": {"upload_bytes": 12_500, "broadcast_bytes": 4000, "ms": 480.0, "peak_models": 1.0},
        "Lean": {"upload_bytes": 25_000, "broadcast_bytes": 400, "ms": 1.6, "peak_models": 1.0},
    },
}


def test_the_slower_side_tells_how_many_servers() -> None:
    found = fleet.costs(MEASURED)
    assert list(found) == ["Slow", "Lean", "Small", "FedAvg"]  # by upload
    assert found["FedAvg"].network_ms == 10 and found["FedAvg"].cores_ms == 1 and found["FedAvg"].server_ms == 10
    assert found["Small"].network_ms == 1 and found["Small"].server_ms == 2 and found["Small"].memory_bytes == 22_000
    # Ten million uploads of 10 ms are 100,000 s: 166.7 times ten minutes.
    assert fleet.servers(found["FedAvg"], 10**7) == 167
    assert fleet.servers(found["Small"], 10**7) == 34 and fleet.servers(found["Small"], 10**3) == 1


def test_a_method_that_changes_its_place_is_named() -> None:
    assert fleet.moved(MEASURED) == ["Slow: place 1 by bytes, 4 by servers"]  # 30 ms; the others move by one


def test_a_root_adds_up_what_leaves_send() -> None:
    plan = fleet.tree(MEASURED, "Small", 10**7)
    # 34 sums of 8,000 bytes, at FedAvg's 16 ms for 12.5 MB
    assert plan == {"leaves": 34, "megabytes": 0.008, "seconds": pytest.approx(34 * 16e-3 * 8000 / 12.5e6)}


def test_table_and_figure_say_what_they_show() -> None:
    shown = fleet.fleet_table(MEASURED, "fleet")
    assert "<td>FedAvg</td>\n      <td>12,500</td>\n      <td>16</td>\n      <td>network</td>" in shown.body
    assert "<td>1,000</td>\n      <td>167</td>" in shown.body  # 10^5 uploads keep one server busy for 1,000 s
    assert "cores are the slower side: Slow, Lean, Small." in fleet.fleet_figure(MEASURED, "sides").body
