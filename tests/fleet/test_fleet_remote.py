"""Nodes that the server did not start, as on other machines: found at the SuperLink, missed by their heartbeat."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="make test-fleet has Flower")
from fleets import CPU, GOOD, bad, spec_of

from fedlib.engines.flower import extra
from fedlib.engines.flower.engine import Flower
from fedlib.engines.flower.fleet import READY, Fleet, free_port
from fedlib.runs import build, fleet, record, rounds

SILENT = 60.0  # seconds after which a node that is gone has to be missed


class Started:
    """Processes of a test, the last one ended first."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def node(self, command: Sequence[str], address: str) -> subprocess.Popen[str]:
        node = self.start([*command, "--superlink", address])
        assert node.stdout and node.stdout.readline().startswith(READY)
        return node

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        self.processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return self.processes[-1]


@pytest.fixture
def started() -> Iterator[Started]:
    extra.prepare()
    own = Started()
    yield own
    for process in reversed(own.processes):
        process.terminate()
        process.wait(timeout=20)
        process.communicate()


def test_a_node_that_falls_silent_is_missed_and_one_that_comes_takes_its_place(
    started: Started, tmp_path: Path
) -> None:
    from fedlib.engines.flower.link import Address
    from fedlib.engines.flower.server_link import ServerLink

    superlink = Fleet([])
    try:
        started.node([*GOOD, "--clients", "0-4"], superlink.address)
        dying = started.node([*bad("dies"), "--clients", "5-9"], superlink.address)
        link = ServerLink(Address(superlink.address), superlink.secret)
        spec = spec_of(cohort=10, rounds=3)
        with Flower(link, CPU, fleet.describe, nodes=2) as engine:
            begin = time.monotonic()
            job, parts = build.job(spec, CPU), dict[str, int]()
            state = rounds.initial(job)
            entries = []
            for number in (1, 2, 3):
                if number == 3:
                    started.node([*GOOD, "--clients", "5-9"], superlink.address)
                state, entry = rounds.one_round(spec, job, engine, state, number, parts)
                entries.append(entry)
            assert time.monotonic() - begin < SILENT
            told = engine.name
    finally:
        superlink.close()
    assert dying.wait() == -9
    assert [sorted(entry["clients"]) for entry in entries] == [[*range(10)], [*range(5)], [*range(10)]]
    whys = {why for _, why in entries[1]["refused"]}
    (why,) = whys
    assert why.startswith("transport: node ") and why.endswith(" lost: it is gone (round 2)")
    assert why.removeprefix("transport: ") in told and told.startswith("Flower: 2 nodes; ")
    assert record.lost({"rounds": entries})


def test_a_node_outlives_its_superlink(started: Started, tmp_path: Path) -> None:
    from fedlib.engines.flower.link import Address
    from fedlib.engines.flower.server_link import ServerLink

    port = free_port()
    address = f"127.0.0.1:{port}"
    own = [sys.executable, "-m", "fedlib.engines.flower.process"]
    options = ["--insecure", "--isolation", "process", "--host", "127.0.0.1", "--port", str(port)]
    first = started.start([*own, str(tmp_path / "first"), *options])
    node = started.node(GOOD, address)
    first.kill()
    first.wait()
    started.start([*own, str(tmp_path / "second"), *options])
    assert node.stdout and node.stdout.readline().startswith(READY)  # it has registered anew
    link = ServerLink(Address(address), None)
    assert len(link.nodes()) == 1
    link.close()
