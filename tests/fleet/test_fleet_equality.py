"""Records that a server, a SuperLink and three nodes make, each a process of its own: those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import known_answers
import pytest

pytest.importorskip("flwr", reason="make test-fleet has Flower")
from common import present
from fleets import GOOD, alone, fleet_of, numbers, spec_of

from fedlib.core.client import Reply
from fedlib.engines.flower.engine import Flower
from fedlib.engines.flower.node import TICKET
from fedlib.methods import registry
from fedlib.runs import build, fleet, record, rounds, shard_files

# A hundred clients on Fashion-MNIST.
IMAGES: dict[str, Any] = {"data": "fashion-mnist", "model": "mlp", "clients": 100, "cohort": 3, "rounds": 2}


@pytest.fixture(scope="module")
def engine() -> Iterator[Flower]:
    with fleet_of(*[GOOD] * 3) as opened:
        yield opened


def test_every_method_is_tried() -> None:
    tried = {case.get("method", "fedavg") for case in known_answers.CASES.values()}
    assert tried == registry.METHODS.keys()


@pytest.mark.parametrize("name", known_answers.CASES)
def test_the_record_is_that_of_one_process(engine: Flower, name: str, tmp_path: Path) -> None:
    spec = spec_of(name)
    found = rounds.run(spec, engine, root=tmp_path)
    assert numbers(found) == alone(spec, tmp_path / "alone")
    assert found["made"]["engine"] == "Flower: 3 nodes"
    assert not record.stale(found, spec)


@pytest.mark.skipif(not present("fashion-mnist"), reason="Fashion-MNIST is not here")
@pytest.mark.parametrize("name", ["fedavg", "fedmrn", "fedpm"])
def test_the_record_of_images_is_that_of_one_process(engine: Flower, name: str, tmp_path: Path) -> None:
    spec = spec_of(name, **IMAGES)
    assert numbers(rounds.run(spec, engine, root=tmp_path)) == alone(spec, tmp_path / "alone")


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    nodes = [[*GOOD, "--clients", clients] for clients in ("0-4", "5,6", "7-9")]
    with fleet_of(nodes[0], nodes[1], [*nodes[2], "--memory", str(tmp_path_factory.mktemp("memory"))]) as opened:
        yield opened


@pytest.mark.parametrize("name", ["fedmrn", "fedavg adam, kept", "topk"])
def test_nodes_that_own_their_clients_make_the_same_record(owners: Flower, name: str, tmp_path: Path) -> None:
    spec = spec_of(name)
    assert numbers(rounds.run(spec, owners, root=tmp_path)) == alone(spec, tmp_path / "alone")


@pytest.mark.skipif(not present("fashion-mnist"), reason="Fashion-MNIST is not here")
def test_a_node_reads_its_shard_alone(tmp_path: Path) -> None:
    """Both nodes have a home without any data set, and the samples of their own clients."""
    spec = spec_of("fedmrn", **IMAGES | {"clients": 10})
    nodes = []
    for clients in ("0-6", "7-9"):
        home = tmp_path / clients
        shard_files.save(spec, fleet.clients_of(clients) or frozenset(), home / "shards")
        own = ["--clients", clients, "--shards", str(home / "shards")]
        nodes.append(["/usr/bin/env", f"FEDLIB_HOME={home}", *GOOD, *own])
    with fleet_of(*nodes) as engine:
        found = rounds.run(spec, engine, root=tmp_path)
    assert numbers(found) == alone(spec, tmp_path / "alone")
    assert not record.stale(found, spec)


def test_what_clients_keep_stays_with_the_node_that_owns_them(owners: Flower) -> None:
    job = build.job(spec_of("topk"), owners.device)
    message = rounds.broadcast(job.method, rounds.initial(job), 1)
    for client, reply in owners.train(job, message, 1, [1, 8, 5], {}):
        assert isinstance(reply, Reply)
        assert reply.memory.startswith(TICKET) and len(reply.memory) < 40, client


def test_a_client_that_nobody_owns_is_named_and_the_round_goes_on(owners: Flower, tmp_path: Path) -> None:
    spec = spec_of(clients=11, cohort=11, rounds=1)
    found = rounds.run(spec, owners, root=tmp_path)
    assert sorted(found["rounds"][0]["clients"]) == [*range(10)]
    assert found["rounds"][0]["refused"] == [(10, "transport: no node has this client")]
    assert record.stale(found, spec).startswith("1 uploads were lost on their way")
