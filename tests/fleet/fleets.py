"""Fleets on this machine, for tests; run as a program, a node that misbehaves: `fleets.py KIND OPTIONS...`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import known_answers
import torch
from typing_extensions import override

from fedlib.engines.flower import frames
from fedlib.engines.flower.engine import Flower
from fedlib.engines.flower.fleet import Fleet
from fedlib.engines.flower.frames import Head
from fedlib.engines.flower.node import Node
from fedlib.engines.in_process import InProcess
from fedlib.runs import build, fleet, rounds
from fedlib.runs.record import Record
from fedlib.runs.spec import Spec

CPU = torch.device("cpu")
GOOD = [sys.executable, "-m", "fedlib", "serve-client", "--insecure", "--end-with-input"]
LATE = 8.0  # seconds by which a node is late, more than a round may take
BAD_ROUND = 2


def bad(kind: str) -> list[str]:
    """Starts a node that misbehaves."""
    return [sys.executable, __file__, kind, "--insecure", "--end-with-input"]


@contextmanager
def fleet_of(*commands: Sequence[str], limit: float = 60.0) -> Iterator[Flower]:
    with fleet.led_by(Fleet(commands), CPU, limit) as engine:
        yield engine


def spec_of(name: str = "fedavg", **changes: Any) -> Spec:
    return Spec.from_dict(known_answers.TINY | known_answers.CASES[name] | changes)


def alone(spec: Spec, folder: Path) -> dict[str, Any]:
    """The numbers of one process."""
    return known_answers.numbers(rounds.run(spec, InProcess(CPU), root=folder))


def numbers(found: Record) -> dict[str, Any]:
    return known_answers.numbers(found)


class Bad(Node):
    """In the second round it does what its kind says; before and after it is a good node."""

    kind = ""

    @override
    def _train(self, head: Head, parts: list[bytes]) -> bytes:
        if head["round"] != BAD_ROUND:
            return super()._train(head, parts)
        if self.kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "fails":
            raise MemoryError("no room")
        if self.kind == "garbage":
            return b"garbage"
        if self.kind == "late":
            time.sleep(LATE)
        told, uploads = frames.unpack(super()._train(head, parts))
        if self.kind == "alters":
            uploads[0] = uploads[0][:-5] + bytes([uploads[0][-5] ^ 1]) + uploads[0][-4:]
        return frames.pack(told, uploads)


def main() -> None:
    Bad.kind, *words = sys.argv[1:]
    parser = ArgumentParser()
    fleet.add_node_options(parser)
    options = parser.parse_args(words)
    node = Bad(build.job_of, fleet.describe, CPU, fleet.clients_of(options.clients))
    if Bad.kind.startswith("other "):
        what = Bad.kind.removeprefix("other ")
        node.describe = lambda key: {**fleet.describe(key), what: "another"}
    if Bad.kind == "no data":
        node.describe = lambda key: fleet.describe(json.dumps(json.loads(key) | {"data": "emnist"}))
    fleet.serve(node, options)


if __name__ == "__main__":
    main()
