"""Whole runs of FedPM on digits: properties 11, 12 and 14 of the specification's section 9, by number."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fedpm_toys import mask_in, uniform

from fedlib.core.client import Job, Memories, Upload
from fedlib.core.method import ServerState
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.vmapped import Stacked
from fedlib.methods.fedsparse.masks import bits_a_parameter
from fedlib.methods.fedsparse.method import FedPM, Own
from fedlib.runs import build, record, rounds
from fedlib.runs.checkpoint import Checkpoint
from fedlib.runs.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]


def finished(spec: Spec, root: Path, engine: Any = None) -> dict[str, Any]:
    return record.stable(rounds.run(spec, engine or InProcess(CPU), root=root))


def of_fedpm(tiny: MakeSpec, rounds: int = 3, **hyper: Any) -> Spec:
    """Adam with two local epochs on the small perceptron, n = 4,736."""
    return tiny(method="fedpm", hyper=hyper, optimizer="adam", epochs=2, rounds=rounds, evaluate_every=1)


@pytest.mark.parametrize("hyper", [{}, {"aggregation": "bayes", "reset_period": 2}, {"masking": "top"}], ids=str)
def test_11_the_seed_decides_the_history(tiny: MakeSpec, tmp_path: Path, hyper: dict[str, Any]) -> None:
    spec = of_fedpm(tiny, **hyper)
    torch.manual_seed(1)
    first = json.dumps(finished(spec, tmp_path))
    torch.manual_seed(2)
    assert json.dumps(finished(spec, tmp_path)) == first
    assert json.dumps(finished(spec, tmp_path, Graphed(CPU))) == first
    other = finished(Spec.from_dict(spec.as_dict() | {"seed": 1}), tmp_path)
    assert other["rounds"][0]["loss"] != json.loads(first)["rounds"][0]["loss"]


@pytest.mark.parametrize("own", [Own(2**64 - 3), Own(2**63, rounds=3, masks=12, kept=torch.ones(4736))])
def test_11_a_checkpoint_keeps_the_posterior(tiny: MakeSpec, tmp_path: Path, own: Own) -> None:
    checkpoint, theta = Checkpoint(of_fedpm(tiny), tmp_path), uniform(4736)
    checkpoint.save(ServerState({"theta": theta}, own), {}, {"rounds": []})
    loaded = checkpoint.load(FedPM())
    assert loaded and torch.equal(loaded[0].model["theta"], theta)
    found = loaded[0].own
    assert (found.seed, found.rounds, found.masks) == (own.seed, own.rounds, own.masks)
    assert torch.equal(found.kept, own.kept) if own.kept is not None else found.kept is None


class Backwards(InProcess):
    """Trains and delivers the cohort from its end."""

    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        return super().train(job, message, round, cohort[::-1], memories)


def test_11_the_order_of_the_clients_does_not_matter(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = of_fedpm(tiny)
    forwards, backwards = finished(spec, tmp_path), finished(spec, tmp_path, Backwards(CPU))
    for one, other in zip(forwards["rounds"], backwards["rounds"], strict=True):
        assert one["clients"] == other["clients"][::-1] != other["clients"]
        assert one["other_bits"] == pytest.approx(other["other_bits"], rel=1e-12)
        assert one["paper_bits"] == pytest.approx(other["paper_bits"], rel=1e-12)
        for name in ("accuracy", "loss", "notes", "uplink_bytes", "downlink_bytes"):
            assert one[name] == other[name]


class Weighing(InProcess):
    """Notes every message beside the reference engine."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.up: list[list[bytes]] = []
        self.down: list[int] = []

    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        replies = list(super().train(job, message, round, cohort, memories))
        self.up.append([upload for _, upload in replies if isinstance(upload, bytes)])
        assert len(self.up[-1]) == len(cohort)
        self.down.append(len(message) * len(cohort))
        return iter(replies)


def test_12_the_ledger_adds_up_what_was_passed(tiny: MakeSpec, tmp_path: Path) -> None:
    spec, scale = of_fedpm(tiny), Weighing()
    found = finished(spec, tmp_path, scale)
    job = build.job(spec, CPU)
    method, seed = job.method, rounds.initial(job).own.seed
    assert isinstance(method, FedPM)
    assert [entry["uplink_bytes"] for entry in found["rounds"]] == [sum(map(len, up)) for up in scale.up]
    assert [entry["downlink_bytes"] for entry in found["rounds"]] == scale.down
    assert all(4 * (8 + 4 * 4736) < size <= 4 * (8 + 4 * 4736 + 64) for size in scale.down), "32 n bits a client"
    parts = found["final"]["uplink_parts"]
    assert list(parts) == ["ones", "mask", "container"] and sum(parts.values()) == found["final"]["uplink_bytes"]
    assert parts["ones"] == 4 * 12 and 0 < parts["container"] <= 64 * 12
    for entry, uploads in zip(found["rounds"], scale.up, strict=True):
        kept = [int(mask_in(method, upload, seed).sum()) for upload in uploads]
        own = [4736 * bits_a_parameter(k / 4736) for k in kept]
        assert entry["paper_bits"] == pytest.approx(sum(own))
        official = [4736 * bits_a_parameter(0.01 + 0.98 * k / 4736) + math.log2(4736) for k in kept]
        assert entry["other_bits"] == {"official code": pytest.approx(sum(official))}


def test_14_evaluation_does_not_change_training(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = of_fedpm(tiny, rounds=4)
    often = finished(spec, tmp_path)
    seldom = finished(Spec.from_dict(spec.as_dict() | {"evaluate_every": 4}), tmp_path)
    assert [entry["accuracy"] is None for entry in seldom["rounds"]] == [True, True, True, False]
    for one, other in zip(often["rounds"], seldom["rounds"], strict=True):
        assert all(one[name] == other[name] for name in ("notes", "uplink_bytes", "paper_bits", "clients"))
    assert often["final"]["loss"] == seldom["final"]["loss"], "and each round's masks are named after the round"


def test_14_the_way_of_evaluating_does_not_change_training(tiny: MakeSpec, tmp_path: Path) -> None:
    found = [finished(of_fedpm(tiny, evaluated=name), tmp_path) for name in ("sampled", "mean", "threshold")]
    for other in found[1:]:
        for one, two in zip(found[0]["rounds"], other["rounds"], strict=True):
            assert one["notes"] == two["notes"] and one["uplink_bytes"] == two["uplink_bytes"]
            assert one["loss"] != two["loss"]


def test_a_round_learns(tiny: MakeSpec, tmp_path: Path) -> None:
    """Ten rounds on digits with the code's scale: far from chance, and in few bits with the penalty."""
    found = {lam: finished(of_fedpm(tiny, rounds=10, lam=lam, weight_scale="fedpm"), tmp_path) for lam in (0.0, 30.0)}
    assert all(run["final"]["accuracy"] > 0.6 for run in found.values())
    dense, sparse = (found[lam]["rounds"][-1] for lam in (0.0, 30.0))
    assert dense["paper_bits"] > 0.99 * 4 * 4736 > 0.9 * 4 * 4736 > sparse["paper_bits"]
    assert sparse["uplink_bytes"] < dense["uplink_bytes"]
    assert all(sparse["notes"]["density"][name] < value for name, value in dense["notes"]["density"].items())


def test_coding_does_not_change_what_is_learned(tiny: MakeSpec, tmp_path: Path) -> None:
    found = {
        coding: finished(of_fedpm(tiny, rounds=6, lam=30.0, weight_scale="fedpm", coding=coding), tmp_path)
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
        finished(of_fedpm(tiny, rounds=4, downlink=downlink, **more), tmp_path) for downlink in ("full", "levels")
    )
    for one, other in zip(full["rounds"], levels["rounds"], strict=True):
        assert all(one[name] == other[name] for name in ("accuracy", "loss", "notes", "uplink_bytes", "refused"))
    assert levels["rounds"][0]["downlink_bytes"] == full["rounds"][0]["downlink_bytes"], "all values differ at first"
    # Four masks of 143 or 144 samples have at most 16 weighted means; masks counted alike, k of 4, 8 or 12.
    most = 26 if more else 16
    for entry in levels["rounds"][1:]:
        assert entry["downlink_bytes"] <= 4 * (4736 * math.log2(most) / 8 + 6 * most + 100)


@pytest.mark.parametrize("masking", ["threshold", "top"])
def test_masks_without_chance_are_learned_and_agree_between_engines(
    tiny: MakeSpec, tmp_path: Path, masking: str
) -> None:
    spec = of_fedpm(tiny, rounds=6, lam=0.0, masking=masking, weight_scale="fedpm")
    found = finished(spec, tmp_path)
    assert found["final"]["accuracy"] > 0.5
    assert finished(spec, tmp_path, Graphed(CPU)) == found
    stacked = finished(spec, tmp_path, Stacked(CPU))
    assert stacked["rounds"][0]["uplink_bytes"] == pytest.approx(found["rounds"][0]["uplink_bytes"], rel=1e-2)
    assert stacked["rounds"][0]["loss"] == pytest.approx(found["rounds"][0]["loss"], rel=0.1)


def test_a_collapse_shows_in_the_record_and_in_the_log(
    tiny: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A penalty that outweighs the data by far, from scores that fall by half a unit a step."""
    spec = of_fedpm(tiny, rounds=2, lam=1e6)
    with caplog.at_level(logging.WARNING, "fedlib"):
        found = finished(Spec.from_dict(spec.as_dict() | {"lr": 1.0, "epochs": 4}), tmp_path)
    assert found["rounds"][-1]["notes"]["collapsed"] == ["1.weight", "3.weight"]
    assert any("collapsed" in line.getMessage() for line in caplog.records)
    assert found["rounds"][-1]["uplink_bytes"] < 4 * 200
