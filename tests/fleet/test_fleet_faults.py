"""Nodes that fail: the round goes on with the rest, and the record says who is missing, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

pytest.importorskip("flwr", reason="make test-fleet has Flower")
from fleets import BAD_ROUND, CPU, GOOD, LATE, alone, bad, fleet_of, numbers, spec_of

from fedlib.core.client import Job, Memories, Upload
from fedlib.engines.flower.engine import Flower
from fedlib.engines.in_process import InProcess
from fedlib.errors import RunError
from fedlib.runs import record, rounds

# Every client in every round: whoever is missing stands in the record.
ALL: dict[str, Any] = {"cohort": 10, "rounds": 3}


def test_a_round_goes_on_without_nodes_that_own_clients_and_fail(tmp_path: Path) -> None:
    """Each owns a client or two; what becomes of them is told by name."""
    kinds = ["dies", "garbage", "alters", "fails"]
    clients = ["3,4", "5", "6,7", "8,9"]
    nodes = [[*bad(kind), "--clients", own] for kind, own in zip(kinds, clients, strict=True)]
    spec = spec_of(**ALL)
    with fleet_of([*GOOD, "--clients", "0-2"], *nodes) as engine:
        found = rounds.run(spec, engine, root=tmp_path)
    first, second, third = found["rounds"]
    assert sorted(first["clients"]) == [*range(10)] and not first["refused"]
    assert sorted(second["clients"]) == sorted(third["clients"]) == [0, 1, 2]
    absent = dict.fromkeys((3, 4), "node 2 lost: its process has ended (-9)")
    absent |= {5: "node 3 refused: frame cannot be read (round 2)"}
    altered = "node 4 refused: client 6/7: message altered: its checksum is wrong (round 2)"
    absent |= dict.fromkeys((6, 7), altered)
    absent |= dict.fromkeys((8, 9), "node 5 refused: it says: MemoryError: no room (round 2)")
    for entry in (second, third):
        told = {client: re.sub(r"client [67]\b", "client 6/7", why) for client, why in entry["refused"]}
        assert told == {client: f"transport: {why}" for client, why in absent.items()}
    assert record.stale(found, spec).startswith("14 uploads were lost on their way, the first in round 2, client ")
    assert found["made"]["engine"].startswith("Flower: 1 node; ") and absent[3] in found["made"]["engine"]
    assert record.stable(record.read(record.save(found, tmp_path))) == json.loads(json.dumps(record.stable(found)))


def test_nodes_that_take_any_client_stand_in_for_those_that_fail(tmp_path: Path) -> None:
    spec = spec_of(**ALL)
    with fleet_of(bad("dies"), GOOD, bad("garbage")) as engine:
        found = rounds.run(spec, engine, root=tmp_path)
    assert numbers(found) == alone(spec, tmp_path / "alone")
    assert not record.stale(found, spec)
    told = found["made"]["engine"]
    assert told.startswith("Flower: 1 node; ")
    assert "node 1 lost: " in told and "node 3 refused: frame cannot be read (round 2)" in told


def test_nodes_with_something_else_are_refused_by_name(tmp_path: Path) -> None:
    kinds = ["code", "torch"]
    nodes = [[*bad(f"other {kind}"), "--clients", str(8 + place)] for place, kind in enumerate(kinds)]
    spec = spec_of(**ALL | {"rounds": 1})
    with fleet_of([*GOOD, "--clients", "0-7"], *nodes) as engine:
        found = rounds.run(spec, engine, root=tmp_path)
        ours = engine.nodes.identity
    whys = {
        8 + place: f"node {2 + place} refused: {kind} another instead of {ours[kind]}"
        for place, kind in enumerate(kinds)
    }
    assert dict(found["rounds"][0]["refused"]) == {client: f"transport: {why}" for client, why in whys.items()}
    told = found["made"]["engine"].split("; ")
    assert told[0] == "Flower: 1 node" and sorted(told[1:]) == sorted(whys.values())
    assert record.stale(found, spec).startswith("2 uploads were lost")


def test_where_no_node_can_work_the_reason_is_told(tmp_path: Path) -> None:
    with fleet_of(bad("other code"), bad("no data")) as engine, pytest.raises(RunError) as refusal:
        rounds.run(spec_of(), engine, root=tmp_path)
    said = str(refusal.value)
    assert said.startswith("engine: flower has 0 of 2 nodes (")
    assert "node 1 refused: code another instead of " in said
    assert "node 2 refused: it says: " in said and "emnist" in said


def test_an_answer_that_comes_too_late_is_nobody_s(tmp_path: Path) -> None:
    spec = spec_of(**ALL | {"rounds": 4})
    with fleet_of([*GOOD, "--clients", "0-7"], [*bad("late"), "--clients", "8,9"], limit=LATE / 2) as engine:
        found = rounds.run(spec, engine, root=tmp_path)
    missing = [sorted(client for client, _ in entry["refused"]) for entry in found["rounds"]]
    assert missing[:2] == [[], [8, 9]] and missing[3] == []
    whys = {why for _, why in found["rounds"][BAD_ROUND - 1]["refused"]}
    assert whys == {f"transport: node 2 late: no answer within {LATE / 2:g} s"}
    assert "node 2 late: no answer within" in found["made"]["engine"]


class Doomed(InProcess):
    """A fleet whose nodes are all killed before the third round."""

    def __init__(self, fleet: Flower) -> None:
        super().__init__(CPU)
        self.fleet = fleet

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        assert self.fleet.fleet
        if round == 3:
            for process in self.fleet.fleet.processes[1:]:
                process.kill()
        return self.fleet.train(job, message, round, cohort, memories)


def test_a_fleet_that_comes_back_goes_on_with_the_run_and_its_memories(tmp_path: Path) -> None:
    """All nodes are lost after the second round. New ones, with the old ones' memories, go on from the checkpoint."""
    spec = spec_of("topk", rounds=4)
    own = [("0-4", tmp_path / "a"), ("5-9", tmp_path / "b")]
    options = [["--clients", clients, "--memory", str(folder)] for clients, folder in own]
    with fleet_of(*([*GOOD, *each] for each in options)) as engine, pytest.raises(RunError) as end:
        rounds.run(spec, Doomed(engine), root=tmp_path, save_every=0)
    assert str(end.value).startswith("no node is left (node ")
    assert str(end.value).count(" lost: its process has ended (-9)") == 2
    assert "the same command goes on from the last checkpoint" in str(end.value)
    with fleet_of(*([*GOOD, *each] for each in options)) as engine:
        found = rounds.run(spec, engine, root=tmp_path)
    assert numbers(found) == alone(spec, tmp_path / "alone")
    assert not record.stale(found, spec)
