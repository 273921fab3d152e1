"""Real clients by Flower: this process is the server, nodes train, a SuperLink stands between them.

    server (this process)  --HTTP-->  SuperLink (Flower's program)  <--HTTP--  nodes (python -m fedlib serve-client)

A node gets one message a round, with the broadcast and the clients that it is to train; it answers with their uploads.
The bytes are those that any engine hands on, read in the cohort's order, so that on a CPU the record is that of one
process. A node that is lost, late or wrong costs its clients the round: the record says so, and is not fresh. Where
other nodes can take its clients they do, and the record is the same as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from fedlib.core.client import Job, Memories, Upload
from fedlib.core.plan import Tensors
from fedlib.engines.flower.fleet import Fleet
from fedlib.engines.flower.node import Identity
from fedlib.engines.flower.nodes import Nodes
from fedlib.engines.flower.round import Round
from fedlib.engines.in_process import Engine, InProcess

if TYPE_CHECKING:
    from fedlib.engines.flower.server_link import ServerLink


class Flower(Engine):
    """The server of a fleet; `fedlib.runs.fleet` opens it."""

    def __init__(
        self,
        link: ServerLink,
        where: torch.device,
        describe: Callable[[str], Identity],
        *,
        nodes: int = 1,
        limit: float = 3600.0,
        fleet: Fleet | None = None,
    ) -> None:
        """describe: what a node must agree in, for a job's text. nodes: how many must be there at the start. limit:
        seconds that a round's answers may take. fleet: one on this machine, which is closed with the engine."""
        self.link, self.device, self.local = link, where, InProcess(where)
        self.limit, self.fleet = limit, fleet
        self.nodes = Nodes(link, describe, nodes, fleet)

    @property
    @override
    def name(self) -> str:
        return f"Flower: {self.nodes.told()}"

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        self.nodes.meet(job.key)
        found = Round(self.nodes, job, message, round, cohort, memories, self.limit).collect()
        yield from ((client, found[client]) for client in cohort)

    @override
    def evaluate(self, job: Job, model: Tensors) -> tuple[float, ...]:
        return self.local.evaluate(job, model)

    @override
    def close(self) -> None:
        try:
            self.link.close()
        finally:
            if self.fleet:
                self.fleet.close()
