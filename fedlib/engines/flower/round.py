"""One round's work with the nodes: clients to nodes, uploads back, and what becomes of clients whose node fails."""

from __future__ import annotations

import time
from collections.abc import Sequence

import xxhash

from fedlib.core.client import Job, Memories, Reply, Upload
from fedlib.core.uploads import shorten
from fedlib.engines.flower import frames
from fedlib.engines.flower.frames import LOST, Lost
from fedlib.engines.flower.node import job_id
from fedlib.engines.flower.nodes import RETURN, SOONEST, Nodes, told
from fedlib.engines.in_process import memory_of
from fedlib.errors import PayloadError, RunError
from fedlib.wire import container

LATEST = 0.25  # seconds between questions whether an answer is there, at most
SPARE = 60.0  # seconds for which a message outlives its round: the time is kept here
LOOK = 1.0  # seconds between looks at who is there


class Round:
    """Made for a round, and used once."""

    def __init__(
        self,
        nodes: Nodes,
        job: Job,
        message: bytes,
        number: int,
        cohort: Sequence[int],
        memories: Memories,
        limit: float,
    ) -> None:
        """limit: seconds until the last answer."""
        self.nodes, self.job, self.message, self.number = nodes, job, message, number
        self.memories, self.limit, self.end = memories, limit, time.monotonic() + limit
        self.left = list(cohort)  # clients that no node has got yet
        self.waiting: dict[str, tuple[int, list[int]]] = {}  # by message: the node and its clients
        self.found: dict[int, Upload] = {}

    def collect(self) -> dict[int, Upload]:
        """What came of each client. RunError: no node is there, for a while."""
        pause, looked, alone = SOONEST, time.monotonic(), 0.0
        while self.left or self.waiting:
            if self.left and self.nodes.usable():
                clients, self.left, alone = self.left, [], 0.0
                self._send(clients)
            answers = list(self.nodes.link.received(list(self.waiting)))
            for id, answer in answers:
                self._take(*self.waiting.pop(id), answer)
            now = time.monotonic()
            if now > self.end:
                self._give_up()
                break
            if now - looked > LOOK or self.left:
                looked = now
                self.nodes.greet()
                self._drop_gone()
            if self.left and not self.nodes.usable() and not self.nodes.greeted:
                alone = alone or now
                if self.nodes.fleet or now - alone > RETURN:
                    raise RunError(
                        f"no node is left ({'; '.join(self.nodes.events[-3:])}); what was recorded is kept, and the "
                        "same command goes on from the last checkpoint"
                    )
            pause = SOONEST if answers else min(1.3 * pause, LATEST)
            if self.left or self.waiting:
                time.sleep(pause)
        return self.found

    def _send(self, clients: Sequence[int]) -> None:
        """Each client to a node that owns it, else to the one with fewest among those that take any."""
        usable = self.nodes.usable()
        dealt: dict[int, list[int]] = {id: [] for id in usable}
        for client in clients:
            able = [id for id, node in usable.items() if node.clients is not None and client in node.clients]
            able = able[:1] or [id for id, node in usable.items() if node.clients is None]
            if able:
                dealt[min(able, key=lambda id: len(dealt[id]))].append(client)
            elif self.nodes.greeted:  # whose it may be
                self.left.append(client)
            else:
                self.found[client] = PayloadError(shorten(LOST + self.nodes.absent(client)))
        batches = {id: self._frame(own) for id, own in dealt.items() if own}
        if batches:
            sent = self.nodes.link.send(batches, self.end - time.monotonic() + SPARE)
            self.waiting |= {message: (id, dealt[id]) for message, id in sent.items()}

    def _frame(self, clients: Sequence[int]) -> bytes:
        head = {"kind": "train", "job": job_id(self.job.key), "round": self.number, "clients": clients}
        memories = [] if self.memories is None else [memory_of(self.memories, client) or b"" for client in clients]
        return frames.pack(head, [self.message, *memories])

    def _take(self, id: int, clients: list[int], answer: bytes | Lost) -> None:
        """An answer, or word that there will be none."""
        try:
            self.found |= self._read(id, clients, answer)
        except PayloadError as error:
            out = self.nodes.lose if isinstance(answer, Lost) and answer.gone else self.nodes.bar
            out(id, f"{error} (round {self.number})")
            self._again(clients)

    def _again(self, clients: list[int]) -> None:
        """Clients whose node is out: others that own them or take any get them, where there are such; where there is
        no node at all, it is waited for one."""
        usable = self.nodes.usable().values()
        for client in clients:
            if not usable or any(node.clients is None or client in node.clients for node in usable):
                self.left.append(client)
            else:
                self.found[client] = PayloadError(shorten(LOST + self.nodes.absent(client)))

    def _drop_gone(self) -> None:
        for message, (id, clients) in list(self.waiting.items()):
            if id not in self.nodes.known:
                del self.waiting[message]
                self._again(clients)

    def _give_up(self) -> None:
        """The time is over: what comes later is nobody's."""
        for id, clients in self.waiting.values():
            why = f"{self.nodes.names[id]} late: no answer within {self.limit:g} s"
            self.nodes.note(f"{why} (round {self.number})")
            self.found |= {client: PayloadError(LOST + why) for client in clients}
        self.found |= {client: PayloadError(f"{LOST}no node within {self.limit:g} s") for client in self.left}
        self.waiting, self.left = {}, []

    def _read(self, id: int, clients: list[int], answer: bytes | Lost) -> dict[int, Upload]:
        """Replies by client. PayloadError: bytes that no node of ours sends."""
        head, parts = told(answer, "train")
        kinds = head.get("replies")
        if (head.get("job"), head.get("round"), head.get("clients")) != (job_id(self.job.key), self.number, clients):
            raise PayloadError("it answers something else than it was asked")
        if not isinstance(kinds, list) or len(kinds) != len(clients) or len(parts) != len(kinds) + kinds.count("kept"):
            raise PayloadError("its answer does not hold a reply for each client")
        rest, replies = iter(parts), dict[int, Upload]()
        for client, kind in zip(clients, kinds, strict=True):
            part = next(rest)
            if kind in ("refused", "lost"):
                text = part.decode("utf-8", "replace")
                ours = text if kind == "refused" else f"{LOST}{self.nodes.names[id]}: {text}"
                replies[client] = PayloadError(shorten(ours))
                continue
            if kind != ("upload" if self.memories is None else "kept"):
                raise PayloadError(f"client {client}: a reply of another kind than was asked for")
            try:
                require_sound(part, self.number, client)
            except PayloadError as error:
                raise PayloadError(f"client {client}: {error}") from error
            replies[client] = part if self.memories is None else Reply(part, next(rest))
        return replies


def require_sound(upload: bytes, round: int, client: int) -> None:
    """PayloadError: bytes that no client's code writes: no message, another's, or an altered one."""
    container.check_address(upload, round, client)
    if xxhash.xxh3_64_intdigest(upload[:-4]) & 0xFFFFFFFF != int.from_bytes(upload[-4:], "little"):
        raise PayloadError("message altered: its checksum is wrong")
