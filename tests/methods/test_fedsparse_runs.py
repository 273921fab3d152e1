"""Whole runs of FedPM on digits: properties 11 and 14 of the specification's section 9, by number."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fedsparse_toys import uniform
from jobs import MakeSpec, ran

from fedlib.core.method import ServerState
from fedlib.methods.fedsparse.method import FedPM, Own
from fedlib.runs.checkpoint import Checkpoint
from fedlib.runs.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")


def of_fedpm(tiny: MakeSpec, rounds: int = 3, **hyper: Any) -> Spec:
    """Adam with two local epochs on the small perceptron, n = 4,736."""
    return tiny(method="fedpm", hyper=hyper, optimizer="adam", epochs=2, rounds=rounds, evaluate_every=1)


@pytest.mark.parametrize("own", [Own(2**64 - 3), Own(2**63, rounds=3, masks=12, kept=torch.ones(4736))])
def test_11_a_checkpoint_keeps_the_posterior(tiny: MakeSpec, tmp_path: Path, own: Own) -> None:
    checkpoint, theta = Checkpoint(of_fedpm(tiny), tmp_path), uniform(4736)
    checkpoint.save(ServerState({"theta": theta}, own), {}, {"rounds": []})
    loaded = checkpoint.load(FedPM())
    assert loaded and torch.equal(loaded[0].model["theta"], theta)
    found = loaded[0].own
    assert (found.seed, found.rounds, found.masks) == (own.seed, own.rounds, own.masks)
    assert torch.equal(found.kept, own.kept) if own.kept is not None else found.kept is None


@pytest.mark.parametrize(
    "other", [{"evaluate_every": 3}, *({"hyper": {"evaluated": how}} for how in ("mean", "threshold"))], ids=str
)
def test_14_evaluation_does_not_change_training(tiny: MakeSpec, tmp_path: Path, other: dict[str, Any]) -> None:
    found, different = (ran(Spec.from_dict(of_fedpm(tiny).as_dict() | more), tmp_path) for more in ({}, other))
    for a, b in zip(found["rounds"], different["rounds"], strict=True):
        assert all(a[name] == b[name] for name in ("notes", "uplink_bytes", "paper_bits", "clients"))
        assert a["loss"] != b["loss"] or a["round"] == 3
    same = found["final"]["loss"] == different["final"]["loss"]
    assert same == ("evaluate_every" in other), "each round's masks are named after the round"


def test_a_round_learns(tiny: MakeSpec, tmp_path: Path) -> None:
    """Ten rounds on digits with the code's scale: far from chance, and in few bits with the penalty."""
    found = {lam: ran(of_fedpm(tiny, rounds=10, lam=lam, weight_scale="fedpm"), tmp_path) for lam in (0.0, 30.0)}
    assert all(run["final"]["accuracy"] > 0.6 for run in found.values())
    dense, sparse = (found[lam]["rounds"][-1] for lam in (0.0, 30.0))
    assert dense["paper_bits"] > 0.99 * 4 * 4736 > 0.9 * 4 * 4736 > sparse["paper_bits"]
    assert sparse["uplink_bytes"] < dense["uplink_bytes"]
    assert all(sparse["notes"]["density"][name] < value for name, value in dense["notes"]["density"].items())


@pytest.mark.parametrize("masking", ["threshold", "top"])
def test_masks_without_chance_are_learned(tiny: MakeSpec, tmp_path: Path, masking: str) -> None:
    run = ran(of_fedpm(tiny, rounds=6, lam=0.0, masking=masking, weight_scale="fedpm"), tmp_path)
    assert run["final"]["accuracy"] > 0.5


def test_coding_does_not_change_what_is_learned(tiny: MakeSpec, tmp_path: Path) -> None:
    found = {
        coding: ran(of_fedpm(tiny, rounds=6, lam=30.0, weight_scale="fedpm", coding=coding), tmp_path)
        for coding in ("pooled", "layers", "global")
    }
    pooled = found["pooled"]
    for run in found.values():
        for entry, plain in zip(run["rounds"], pooled["rounds"], strict=True):
            assert entry["refused"] == []
            assert all(entry[name] == plain[name] for name in ("accuracy", "loss", "notes", "paper_bits"))
            assert entry["uplink_bytes"] <= plain["uplink_bytes"], "contexts are used where they pay alone"
    assert found["layers"]["rounds"][-1]["uplink_bytes"] < pooled["rounds"][-1]["uplink_bytes"]
    assert found["global"]["rounds"][-1]["uplink_bytes"] < 0.9 * pooled["rounds"][-1]["uplink_bytes"]


@pytest.mark.parametrize("more", [{}, {"aggregation": "bayes", "reset_period": 3, "prior": 2.0}], ids=["mean", "bayes"])
def test_downlink_by_levels_does_not_change_what_is_learned(
    tiny: MakeSpec, tmp_path: Path, more: dict[str, Any]
) -> None:
    full, levels = (
        ran(of_fedpm(tiny, rounds=4, downlink=downlink, **more), tmp_path) for downlink in ("full", "levels")
    )
    for one, other in zip(full["rounds"], levels["rounds"], strict=True):
        assert all(one[name] == other[name] for name in ("accuracy", "loss", "notes", "uplink_bytes", "refused"))
    assert levels["rounds"][0]["downlink_bytes"] == full["rounds"][0]["downlink_bytes"], "all values differ at first"
    # Four masks of 143 or 144 samples have at most 16 weighted means; masks counted alike, k of 4, 8 or 12.
    most = 26 if more else 16
    for entry in levels["rounds"][1:]:
        assert entry["downlink_bytes"] <= 4 * (4736 * math.log2(most) / 8 + 6 * most + 100)


def test_a_collapse_shows_in_the_record_and_in_the_log(
    tiny: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A penalty that outweighs the data by far, from scores that fall by half a unit a step."""
    spec = of_fedpm(tiny, rounds=2, lam=1e6)
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = ran(Spec.from_dict(spec.as_dict() | {"lr": 1.0, "epochs": 4}), tmp_path)
    assert found["rounds"][-1]["notes"]["collapsed"] == ["1.weight", "3.weight"]
    assert any("collapsed" in line.getMessage() for line in caplog.records)
    assert found["rounds"][-1]["uplink_bytes"] < 4 * 200
