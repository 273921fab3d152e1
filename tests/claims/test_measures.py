"""What is measured of runs for a claim, against runs written by hand."""

import pytest

from fedlib.claims import measures
from fedlib.claims.results import runs
from fedlib.errors import SpecError
from fedlib.runs.record import Record


def ran(label: str, group: str, split: str, lr: float, seed: int, *accuracies: float | None) -> Record:
    sizes = {"uplink_bytes": 210, "downlink_bytes": 0, "paper_bits": 0, "clients": [0, 1]}
    entries = [{"round": n, "accuracy": accuracy} | sizes for n, accuracy in enumerate(accuracies, 1)]
    final = {
        "accuracy": accuracies[-1],
        "uploads": 2,
        "uplink_bytes": 210,
        "uplink_parts": {"mask": 200, "refused": 10},
    }
    spec = dict(label=label, group=group, split=split, lr=lr, seed=seed, hyper={})
    spec |= {"name": "_".join(map(str, (group, label, split, lr, seed)))}
    return {"spec": spec, "rounds": entries, "final": final, "parameters": {"weights": 100}, "made": {}}


RAN = [
    ran("a", "main", "iid", 0.1, 0, 0.5, None, 0.6),
    ran("a", "main", "iid", 0.1, 1, 0.7, None, 0.9),
    ran("b", "main", "iid", 0.3, 0, 0.1, None, 0.5),
    ran("b", "main", "skew", 0.1, 0, 0.1, None, 0.1),
    ran("b", "wide", "iid", 0.1, 0, 0.3, None, 0.4),
    ran("a", "wide", "iid", 0.1, 0, 0.8, None, 0.8),
    ran("c", "main", "iid", 0.1, 1, 0.4, None, 0.4),
    ran("c", "wide", "iid", 0.1, 0, 0.4, None, 0.75),
]


TABLE = runs(RAN)


def test_cases_come_with_their_seeds() -> None:
    cases = dict(measures.take_cases(TABLE, ["a", "c"], ["wide", "main"]))
    assert {name: list(own.index) for name, own in cases.items()} == {
        "a, main, iid": [0, 1],
        "c, main, iid": [1],
        "a, wide, iid": [0],
        "c, wide, iid": [0],
    }
    assert measures.bits_per_parameter(TABLE, ["d"], ["main"]) == measures.bits_per_parameter(TABLE, ["a"], []) == {}


def test_two_runs_of_one_case_and_seed_are_refused() -> None:
    """Whoever took the better one would choose by what is reported."""
    grid = runs([ran("a", "main", "iid", lr, 0, 0.5) for lr in (0.1, 0.3)])
    with pytest.raises(SpecError, match=r"main_a_iid_0\.3_0: another run has its label"):
        measures.bits_per_parameter(grid, ["a"], ["main"])


def test_gaps_of_accuracy_by_hand() -> None:
    """Only where both have run: a and b share seed 0 of main and of wide, a and c seed 1 of main and seed 0 of wide."""
    both = measures.accuracy_gap(TABLE, ["a"], ["main", "wide"], ["b", "c"])
    assert {case: pytest.approx(values) for case, values in both.items()} == {
        "a against b, main, iid": {0: 10.0},  # 0.6 - 0.5
        "a against c, main, iid": {1: 50.0},  # 0.9 - 0.4
        "a against b, wide, iid": {0: 40.0},
        "a against c, wide, iid": {0: 5.0},
    }
    assert measures.accuracy_gap(TABLE, ["b"], ["main"], ["a"]) == {"b, main, iid": {0: pytest.approx(-10.0)}}
    assert measures.accuracy_gap(TABLE, ["b"], ["main"], ["c"]) == {}, "no seed in common"


def test_gaps_of_speed_by_hand() -> None:
    """The mean over the evaluated rounds: a 0.55 and 0.8, b 0.3, c 0.4; the middle round was not evaluated."""
    found = measures.speed_gap(TABLE, ["a"], ["main"], ["b", "c"])
    assert found == {
        "a against b, main, iid": {0: pytest.approx(25.0)},
        "a against c, main, iid": {1: pytest.approx(40.0)},
    }
    late, early = ran("a", "main", "iid", 0.1, 0, 0.0, 0.9), ran("b", "main", "iid", 0.1, 0, 0.8, 0.9)
    assert measures.speed_gap(runs([late, early]), ["a"], ["main"], ["b"]) == {
        "a, main, iid": {0: pytest.approx(-40.0)}
    }
    assert measures.accuracy_gap(runs([late, early]), ["a"], ["main"], ["b"]) == {
        "a, main, iid": {0: pytest.approx(0.0)}
    }


def test_bytes_by_hand() -> None:
    """200 bytes of mask for two uploads of 100 weights: 8 bits each; 10 bytes were refused and count for nobody."""
    assert measures.bits_per_weight(TABLE, ["a"], ["main"], "mask") == {"a, main, iid": {0: 8.0, 1: 8.0}}
    assert TABLE["upload_bytes"].iloc[0] == 100
    large = ran("b", "main", "iid", 0.1, 0, 0.5)
    large["final"]["uplink_bytes"] = 6410
    assert measures.upload_ratio(runs([RAN[0], large]), ["a"], ["main"], ["b"]) == {"a, main, iid": {0: 32.0}}
