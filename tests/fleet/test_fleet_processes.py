"""What `run --engine flower` starts, and that nothing of it is left: no process, no port, no file."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import projects
import pytest

pytest.importorskip("flwr", reason="make test-fleet has Flower")
from common import session

COMMAND = [sys.executable, "-m", "fedlib", "run", "fedmrn", "--profile", "smoke", "--engine", "flower", "--nodes", "2"]
SOON = 20.0  # seconds in which what was left alone has to end


class Launcher:
    """The command in a session of its own, with a folder of its own for what is temporary."""

    def __init__(self, folder: Path, *words: str, rounds: int = 2, **environment: str) -> None:
        self.home, self.temporary = folder / "home", folder / "temporary"
        self.temporary.mkdir()
        projects.small(self.home)
        projects.edit(self.home, projects.put("profiles/smoke", {"main": projects.group(rounds=rounds)}))
        self.process = subprocess.Popen(
            [*COMMAND, *words],
            env=os.environ | {"FEDLIB_HOME": str(self.home), "TMPDIR": str(self.temporary)} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def others(self) -> list[int]:
        return [pid for pid in session(self.process.pid) if pid != self.process.pid]

    def port(self) -> int:
        """The SuperLink's, once all are at work."""
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            lines = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in self.others()]
            ports = [int(line[line.index(b"--port") + 1]) for line in lines if b"--port" in line]
            if ports and len(lines) == 3 and (self.home / ".cache" / "checkpoints").exists():
                return ports[0]
            time.sleep(0.05)
        raise AssertionError(self.process.communicate())

    def left(self) -> list[object]:
        """What is there of it after a while."""
        end = time.monotonic() + SOON
        while (found := [*session(self.process.pid), *self.temporary.iterdir()]) and time.monotonic() < end:
            time.sleep(0.05)
        return found


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    launched: list[Launcher] = []

    def start(*words: str, rounds: int = 2, **environment: str) -> Launcher:
        launched.append(Launcher(tmp_path, *words, rounds=rounds, **environment))
        return launched[-1]

    yield start
    for each in launched:
        for pid in session(each.process.pid):
            os.kill(pid, signal.SIGKILL)
        each.process.communicate()


def closed(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_after_success_nothing_is_left_and_nobody_else_was_asked(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    noted = tmp_path / "noted"
    it = launch(AUDITED=str(noted), PYTHONPATH=str(Path(__file__).parent / "audited"))
    said, errors = it.process.communicate(timeout=120)
    assert it.process.returncode == 0, errors
    assert "2 runs, 2 to train on cpu" in said
    made = [json.loads(file.read_text())["made"]["engine"] for file in (it.home / "records").rglob("*.json")]
    assert made == ["Flower: 2 nodes"] * 2
    assert not it.left()
    lines = [json.loads(line) for line in noted.read_text().splitlines()]
    started = {pid: " ".join(about) for pid, event, about in lines if event == "start"}
    (superlink,) = [words for words in started.values() if "flower.process" in words]
    address = ["127.0.0.1", int(superlink.rpartition("--port ")[2].split()[0])]
    met = {pid for pid, event, about in lines if event == "socket.connect" and about == address}
    assert sum("serve-client" in started[pid] for pid in met) == 2 and it.process.pid in met
    others = [line for line in lines if line[1] != "start" and line[2] not in (address, address[0])]
    assert not others


def test_after_failure_nothing_is_left(launch: Callable[..., Launcher]) -> None:
    it = launch("--round-limit", "0.0001")
    _, errors = it.process.communicate(timeout=120)
    assert it.process.returncode == 2
    assert re.search(r"error: 2 of 2 runs failed.*no usable update in 3 attempts", errors), errors
    assert "transport: node 1 late: no answer within 0.0001 s" in errors
    assert not it.left()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_after_a_signal_nothing_is_left(launch: Callable[..., Launcher], by: signal.Signals) -> None:
    it = launch(rounds=100_000)
    port = it.port()
    assert not closed(port) and any(it.temporary.iterdir())
    it.process.send_signal(by)
    it.process.communicate(timeout=60)
    assert it.process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[by]
    assert not it.left()
    assert closed(port)


def test_other_engines_do_not_load_flower() -> None:
    program = "import sys, fedlib.__main__, fedlib.runs.grid; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "fedlib.runs.fleet" in loaded
    assert not loaded & {"flwr", "httpx", "grpc", "fastapi"}
