"""What it takes to reach an accuracy, and the claims and tables made of it, against runs written by hand."""

from typing import Any

import pytest

from fedlib.claims import measures, targets
from fedlib.claims.targets import Reached
from fedlib.pages import feddq

Record = dict[str, Any]


def run(label: str, accuracies: list[float | None], bits: float, seed: int = 0, **more: Any) -> Record:
    """A record of one client a round, whose uploads take `bits` by definition and a byte more than that measured."""
    spec = {"label": label, "group": "main", "split": "iid", "seed": seed, "lr": 0.1, "name": label, "profile": "lab"}
    spec |= {"data": "digits", "clients": 1, "cohort": 1, "hyper": {}, **more}
    rounds = [
        {
            "round": number,
            "accuracy": accuracy,
            "paper_bits": bits,
            "uplink_bytes": bits / 8 + 1,
            "downlink_bytes": 100,
            "clients": [0],
            "notes": {"ranges": {"a": 8.0 / number, "b": 4.0 / number}, "loss": 1.0},
            "other_bits": {"entropy": bits / 2},
        }
        for number, accuracy in enumerate(accuracies, 1)
    ]
    n = len(rounds)
    final: dict[str, Any] = {
        "accuracy": accuracies[-1],
        "paper_bits": n * bits,
        "uploads": n,
        "uplink_bytes": n * (bits / 8 + 1),
    }
    final |= {"downlink_bytes": 100 * n, "uplink_parts": {"levels": n * bits / 8, "container": n}}
    made = {"device": "cpu", "seconds": 1.0}
    return {"spec": spec, "rounds": rounds, "final": final, "parameters": {"weights": 10, "others": 0}, "made": made}


def test_the_first_evaluated_round_at_or_above_the_target() -> None:
    r = run("a", [0.5, None, 0.8, 0.7, 0.9], 1e6)
    assert targets.reached(r, 0.8)[:3] == (True, 3, 3e6)
    assert targets.reached(r, 0.8).megabytes == pytest.approx(3 * 0.125001)
    assert targets.reached(r, 0.85).rounds == 5
    assert targets.reached(r, 0.95)[:3] == (False, 5, 5e6), "the whole run"
    assert targets.best_accuracy(r) == 0.9


def test_the_target_is_a_share_of_the_same_seed_and_group() -> None:
    records = [run("fedavg", [0.5, 0.6], 320, seed) for seed in (0, 1)] + [run("fedavg", [1.0], 320, 1, group="other")]
    records[1]["rounds"][0]["accuracy"] = 0.8
    assert targets.target(records, run("a", [0.1], 1, seed=0)) == pytest.approx(0.99 * 0.6)
    assert targets.target(records, run("a", [0.1], 1, seed=1)) == pytest.approx(0.99 * 0.8)
    with pytest.raises(ValueError, match="not enough values"):
        targets.target(records, run("a", [0.1], 1, seed=2))


@pytest.mark.parametrize(
    "own, other, percent",
    [
        (Reached(True, 3, 0, 0), Reached(True, 4, 0, 0), 25.0),
        (Reached(True, 4, 0, 0), Reached(True, 3, 0, 0), -100 / 3),
        (Reached(True, 3, 0, 0), Reached(False, 10, 0, 0), 70.0),  # at least: the other was not there yet
        (Reached(False, 10, 0, 0), Reached(True, 4, 0, 0), -400.0),
        (Reached(False, 10, 0, 0), Reached(False, 10, 0, 0), -100.0),
    ],
)
def test_savings(own: Reached, other: Reached, percent: float) -> None:
    assert targets.saving(own, other, "rounds") == pytest.approx(percent)


def records() -> list[Record]:
    """FedAvg is at its best, 0.8, in round 3; a gets to 99 % of that in round 2, b in round 4, c never."""
    found = []
    for seed in (0, 1, 2):
        found += [run("fedavg", [0.5, 0.6, 0.8, 0.8], 320, seed), run("a", [0.5, 0.8, 0.8, 0.8], 40, seed)]
        found += [run("b", [0.4, 0.5, 0.6, 0.8], 10, seed), run("c", [0.1, 0.1, 0.1, 0.1], 10, seed)]
    return found


def test_claims_on_savings() -> None:
    given: dict[str, Any] = {"labels": ["a"], "groups": ["main", "absent"], "against": ["b", "c"]}
    found = measures.saving_to_target(records(), **given, quantity="rounds", largest=False)
    assert found == {"a against b, main, iid": [50.0] * 3, "a against c, main, iid": [50.0] * 3}
    bits = measures.saving_to_target(records(), **given, quantity="bits", largest=True)
    assert bits == {"a against b, main, iid": [-100.0] * 3}  # 80 against 40: the larger of two equals is the first
    without = [r for r in records() if r["spec"]["label"] != "fedavg"]
    assert measures.saving_to_target(without, **given, quantity="bits", largest=True) == {}


def test_claims_on_ranges() -> None:
    assert measures.range_ratio(records(), ["a"], ["main"]) == {"a, main, iid": [0.25] * 3}


def test_the_table_of_targets_tells_what_was_not_reached() -> None:
    shown = feddq.target_table(records(), "Caption.", "b")
    assert shown.frame[shown.frame["method"] == "a"]["rounds"].tolist() == [2, 2, 2]
    assert shown.body.count("not reached") == 3 and "0 of 3" in shown.body
    assert "50 ± 0" in shown.body and "-100 ± 0" in shown.body  # rounds and bits that a saves over b


def test_the_table_of_messages_adds_up() -> None:
    body = feddq.wire_table(records(), "Caption.", "wire").body
    assert [f">{number}<" in body for number in ("40", "41", "5", "6", "1", "20", "100")] == [True] * 7


def test_a_sweep_marks_its_guides() -> None:
    found = [run("a", [0.5, 0.6 + 0.1 * x], 10 * x, seed, hyper={"x": x}) for x in (1, 2, 3) for seed in (0, 1)]
    shown = feddq.sweep_figure(found, "hyper.x", {"here": 1.5}, "sweep")
    assert shown.frame["bits in the mean"].tolist() == [1, 1, 2, 2, 3, 3]
    assert 'alt="Two line charts, accuracy and bits an entry against x. 1: 70.0 %, 1.00 bits; 2: 80.0 %' in shown.body
    assert "here 1.5" in shown.caption
