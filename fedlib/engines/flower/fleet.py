"""A fleet on this machine: Flower's SuperLink and some nodes, as processes of their own that talk over loopback.

It leaves nothing behind: whatever becomes of the process that started it, the others notice that their pipe to it
has closed, end, and remove their folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedlib.engines.flower import extra
from fedlib.errors import RunError

HOST = "127.0.0.1"
START = 120.0  # seconds that nodes may take until they have registered
TRIES = 5  # ports: between the choice of one and its use another process may have taken it
READY = "node "  # how the line begins with which a node tells its number


class Fleet:
    """A SuperLink and its nodes, from the start to `close`. RunError: it does not start."""

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        """commands: each starts a node, once `--superlink HOST:PORT` is added to it."""
        self.folder = Path(tempfile.mkdtemp(prefix="fedlib-fleet-"))
        self.environment = extra.without_proxy(dict(os.environ)) | {"OMP_NUM_THREADS": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []  # the SuperLink, then the nodes
        self.ids: list[int] = []  # of the nodes, at the SuperLink
        self.secret = secrets.token_hex(32).encode()
        try:
            (self.folder / "secret").write_bytes(self.secret)
            self.address = self._superlink()
            for number, command in enumerate(commands, 1):
                arguments = [*command, "--superlink", self.address]
                self.processes.append(self._start(arguments, f"node-{number}", subprocess.PIPE))
            self._register()
        except BaseException:
            self.close()
            raise

    def _start(self, arguments: Sequence[str], name: str, output: int | None) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=output or log, stderr=log, env=self.environment
            )

    def _superlink(self) -> str:
        for _ in range(TRIES):
            port = free_port()
            options = ["--insecure", "--isolation", "process", "--host", HOST, "--port", str(port)]
            options += ["--superexec-auth-secret-file", str(self.folder / "secret")]
            own = [sys.executable, "-m", "fedlib.engines.flower.process", str(self.folder), *options]
            process = self._start(own, "superlink", None)
            self.processes = [process]
            end = time.monotonic() + START
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
                    return f"{HOST}:{port}"
                time.sleep(0.02)
            _end(process)
        raise RunError(f"the SuperLink does not start: {self._said('superlink')}")

    def _register(self) -> None:
        """Each node tells its number on its first line."""
        end, found = time.monotonic() + START, dict[int, int]()
        with selectors.DefaultSelector() as selector:
            for place, process in enumerate(self.processes[1:]):
                assert process.stdout
                selector.register(process.stdout, selectors.EVENT_READ, place)
            while len(found) < len(self.processes) - 1:
                ready = selector.select(end - time.monotonic())
                if not ready:
                    raise RunError(f"{len(self.processes) - 1 - len(found)} nodes do not start within {START:g} s")
                for key, _ in ready:
                    stream = self.processes[1 + key.data].stdout
                    assert stream
                    line = stream.readline().decode(errors="replace")
                    if not line.startswith(READY):
                        raise RunError(f"node {key.data + 1} does not start: {self._said(f'node-{key.data + 1}')}")
                    found[key.data] = int(line.removeprefix(READY))
                    selector.unregister(stream)
        self.ids = [found[place] for place in range(len(found))]

    def _said(self, name: str) -> str:
        with contextlib.suppress(OSError):
            lines = (self.folder / f"{name}.log").read_text(errors="replace").split("\n")
            return next((line[:300] for line in reversed(lines) if line.strip()), "it says nothing")
        return "it says nothing"

    def gone(self) -> dict[int, str]:
        """Nodes that have ended, and how. RunError: the SuperLink has."""
        superlink, *nodes = self.processes
        if superlink.poll() is not None:
            raise RunError(f"the SuperLink has ended ({superlink.returncode}): {self._said('superlink')}")
        return {
            id: f"its process has ended ({process.returncode})"
            for id, process in zip(self.ids, nodes, strict=True)
            if process.poll() is not None
        }

    def close(self) -> None:
        """End all, by their ids, nodes first; remove the folder."""
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            _end(process)
        self.processes = []
        shutil.rmtree(self.folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()


def free_port() -> int:
    """That nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
