"""The nodes that a server knows: who they are, which clients they own, and why one gets no work.

A node says hello once a run, with the digests of its code and data and the versions of its libraries; one that differs
in any is refused by name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedlib.core.uploads import shorten
from fedlib.engines.flower import frames
from fedlib.engines.flower.fleet import Fleet
from fedlib.engines.flower.frames import Head, Lost
from fedlib.engines.flower.node import Identity
from fedlib.errors import PayloadError, RunError

if TYPE_CHECKING:
    from fedlib.engines.flower.server_link import ServerLink

GREETING = 300.0  # seconds that the answer to a hello may take: a data set is read for the first one
RETURN = 60.0  # seconds for which nodes are waited for that are not there
SOONEST = 0.01  # seconds between questions whether an answer is there
SHOWN = 10  # events that a record's line holds
log = logging.getLogger("fedlib")


@dataclass
class Known:
    """A node that has answered a hello of this run."""

    name: str
    clients: frozenset[int] | None  # its own; None: it takes any
    fault: str = ""  # why it gets no work: "refused: " or "lost: ", and the reason


class Nodes:
    """Of one SuperLink, for one run after the other."""

    def __init__(
        self, link: ServerLink, describe: Callable[[str], Identity], awaited: int, fleet: Fleet | None = None
    ) -> None:
        """describe: what a node must agree in, for a job's text. awaited: nodes that must be there at the start.
        fleet: whose nodes they are; then nobody else's are."""
        self.link, self.describe, self.awaited, self.fleet = link, describe, awaited, fleet
        self.key, self.identity = "", dict[str, str]()  # of the run that all below is about
        self.known: dict[int, Known] = {}
        self.gone: dict[int, Known] = {}  # which were known
        self.greeted: dict[str, int] = {}  # hellos without an answer: who got them
        self.events: list[str] = []
        self.names: dict[int, str] = {}

    def told(self) -> str:
        """For the record: how many there are, and what became of the others."""
        count, events = len(self.usable()), self.events
        more = [f"and {len(events) - SHOWN} more"] if len(events) > SHOWN else []
        return "; ".join((f"{count} node{'s' * (count != 1)}", *events[:SHOWN], *more))

    def usable(self) -> dict[int, Known]:
        return {id: node for id, node in self.known.items() if not node.fault}

    def meet(self, key: str) -> None:
        """Before each round. In a run's first one, wait for its nodes; RunError where there are too few."""
        if key == self.key:
            self.greet()
            return
        self.key, self.identity = key, dict(self.describe(key))
        self.known, self.gone, self.greeted, self.events = {}, {}, {}, []
        begin = time.monotonic()
        self.greet()
        while self.greeted or len(self.known) < self.awaited:
            waited = time.monotonic() - begin
            if waited > GREETING or (not self.greeted and (self.fleet or waited > RETURN)):
                break
            time.sleep(SOONEST)
            self.greet()
        if len(self.known) < self.awaited or not self.usable():
            self.key = ""
            said = "; ".join(self.events) or "no other has come"
            raise RunError(f"engine: flower has {len(self.usable())} of {self.awaited} nodes ({said})")
        self.awaited = 1  # a later run goes on with those that are left

    def greet(self) -> None:
        """Say hello to nodes that are new, hear those that answer, and note those that are gone."""
        there, gone = self.link.nodes(), dict[int, str]()
        if self.fleet:  # whoever else has found the SuperLink is none of ours
            gone = self.fleet.gone()
            there = {id: there[id] for id in self.fleet.ids if id in there and id not in gone}
        for id in [id for id in self.known if id not in there]:
            self.lose(id, gone.get(id, "it is gone"))
        for id in there:
            self.names[id] = there[id] or self.names.get(id) or f"node {len(self.names) + 1}"
        hello = frames.pack({"kind": "hello", "key": self.key, "identity": self.identity})
        new = [id for id in there if id not in self.known and id not in self.greeted.values()]
        if new:
            self.greeted |= self.link.send(dict.fromkeys(new, hello), GREETING)
        for message, answer in list(self.link.received(list(self.greeted))):
            id = self.greeted.pop(message)
            if isinstance(answer, Lost) and answer.gone:
                continue
            self.gone.pop(id, None)
            self.known[id] = Known(self.names[id], frozenset())
            try:
                self.known[id].clients, fault = self._introduced(answer)
            except PayloadError as error:
                fault = str(error)
            if fault:
                self.bar(id, fault)

    def _introduced(self, answer: bytes | Lost) -> tuple[frozenset[int] | None, str]:
        """Whose clients it has, and what is wrong with it."""
        head, _ = told(answer, "hello")
        clients, theirs = head.get("clients"), head.get("identity")
        if not isinstance(theirs, dict) or not isinstance(clients, list | None):
            raise PayloadError("its hello cannot be read")
        differ = [
            f"{what} {shorten(theirs.get(what))} instead of {ours}"
            for what, ours in self.identity.items()
            if theirs.get(what) != ours
        ]
        owned = None if clients is None else frozenset(client for client in clients if type(client) is int)
        return owned, ", ".join(differ)

    def note(self, event: str) -> None:
        """For the record, and for whoever watches."""
        log.warning("%s", event)
        self.events.append(event)

    def lose(self, id: int, why: str) -> None:
        """A node that is gone; it may say hello again."""
        if node := self.known.pop(id, None):
            self.gone[id] = node
            if not node.fault:
                node.fault = f"lost: {shorten(why)}"
                self.note(f"{node.name} {node.fault}")

    def bar(self, id: int, why: str) -> None:
        """A node that gets no work in this run any more."""
        if id in self.known:
            self.known[id].fault = f"refused: {shorten(why)}"
            self.note(f"{self.known[id].name} {self.known[id].fault}")

    def absent(self, client: int) -> str:
        """Why nobody trains a client."""
        for node in (*self.known.values(), *self.gone.values()):
            if node.fault and node.clients is not None and client in node.clients:
                return f"{node.name} {node.fault}"
        return "no node has this client"


def told(answer: bytes | Lost, kind: str) -> tuple[Head, list[bytes]]:
    """PayloadError: no answer, or one of another kind."""
    if isinstance(answer, Lost):
        raise PayloadError(answer.why)
    head, parts = frames.unpack(answer)
    if head.get("kind") == "fault":
        raise PayloadError(shorten(f"it says: {head.get('why')}"))
    if head.get("kind") != kind:
        raise PayloadError("it answers something else than it was asked")
    return head, parts
