"""A node of a fleet: what it answers to a server. It runs the code that is installed here, on data that is here.

A node that owns clients also keeps what they keep from round to round, and the server gets a ticket for it: the
hash by which it asks for it again. A node that takes any client keeps nothing, as a worker of a pool does.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fedlib.core.client import Job, Reply, Upload
from fedlib.core.uploads import shorten
from fedlib.engines.flower import frames
from fedlib.engines.flower.frames import Head
from fedlib.engines.in_process import InProcess
from fedlib.errors import FedlibError, PayloadError

Identity = Mapping[str, str]  # what server and nodes must agree in, by name: digests and versions
TICKET = b"kept by the node "  # how begins what the server holds in place of a client's memory
KEPT = 3  # last memories of a client that a node keeps: a server may come back from an older checkpoint
log = logging.getLogger("fedlib")


class Kept:
    """Memories of clients by their ticket; in files of a folder, where one is given, for a node that comes back."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.here = folder, OrderedDict[tuple[str, int, bytes], bytes]()

    def put(self, job: str, client: int, memory: bytes) -> bytes:
        """The ticket."""
        ticket = TICKET + hashlib.blake2b(memory, digest_size=16).digest()
        if self.folder:
            own = self.folder / job / str(client)
            own.mkdir(parents=True, exist_ok=True)
            (own / ticket.hex()).write_bytes(memory)
            for old in sorted(own.iterdir(), key=lambda file: file.stat().st_mtime_ns)[:-KEPT]:
                old.unlink()
        else:
            self.here[job, client, ticket] = memory
            self.here.move_to_end((job, client, ticket))
            for place in [place for place in self.here if place[:2] == (job, client)][:-KEPT]:
                del self.here[place]
        return ticket

    def get(self, job: str, client: int, ticket: bytes) -> bytes:
        """LookupError: it is no longer there."""
        if not self.folder:
            return self.here[job, client, ticket]
        try:
            return (self.folder / job / str(client) / ticket.hex()).read_bytes()
        except OSError as error:
            raise KeyError(ticket) from error


class Node:
    """Answers frames with frames, whatever they hold."""

    def __init__(
        self,
        rebuild: Callable[[str, torch.device], Job],
        describe: Callable[[str], Identity],
        where: torch.device,
        clients: frozenset[int] | None = None,
        kept: Kept | None = None,
    ) -> None:
        """rebuild: a job from its text. describe: what both sides must agree in for it. clients: None for any."""
        self.rebuild, self.describe, self.clients = rebuild, describe, clients
        self.engine, self.kept = InProcess(where), kept or Kept()
        self.jobs: dict[str, Job] = {}  # the present one, by the digest of its text

    def answer(self, frame: bytes) -> bytes:
        try:
            head, parts = frames.unpack(frame)
            kind = head.get("kind")
            if kind == "hello":
                return self._hello(head)
            if kind == "train":
                return self._train(head, parts)
            raise PayloadError(f"frame of an unknown kind, {kind!r}")
        except Exception as error:  # told to the server, which goes on without this node
            log.debug("frame", exc_info=True)
            reason = str(error) if isinstance(error, FedlibError) else f"{type(error).__name__}: {error}"
            log.warning("asked for what it cannot do: %s", shorten(reason))
            return frames.pack({"kind": "fault", "why": shorten(reason)})

    def _hello(self, head: Head) -> bytes:
        key = str(head["key"])
        told = dict(self.describe(key))
        if told == head["identity"]:
            self.jobs = {job_id(key): self.rebuild(key, self.engine.device)}
        owned = None if self.clients is None else sorted(self.clients)
        return frames.pack({"kind": "hello", "identity": told, "clients": owned})

    def _train(self, head: Head, parts: list[bytes]) -> bytes:
        job, round, clients = self.jobs[head["job"]], int(head["round"]), [int(client) for client in head["clients"]]
        if self.clients is not None and not self.clients.issuperset(clients):
            raise PayloadError(f"asked for clients {sorted({*clients} - self.clients)}, which are not its own")
        message, *memories = parts
        kinds, answers = list[str](), list[bytes | bytearray]()
        for place, client in enumerate(clients):
            try:
                memory = self._memory(head["job"], client, memories[place]) if memories else None
                reply: Upload = self.engine.client(job, message, round, client, memory)
            except LookupError:
                kinds.append("lost")
                answers.append(b"what the client kept is no longer there")
                continue
            if isinstance(reply, PayloadError):
                kinds.append("refused")
                answers.append(str(reply).encode())
            elif isinstance(reply, Reply):
                kinds.append("kept")
                own = self.clients is not None
                answers += [reply.upload, self.kept.put(head["job"], client, reply.memory) if own else reply.memory]
            else:
                kinds.append("upload")
                answers.append(reply)
        told = {"kind": "train", "job": head["job"], "round": round, "clients": clients, "replies": kinds}
        return frames.pack(told, answers)

    def _memory(self, job: str, client: int, given: bytes) -> bytes:
        return self.kept.get(job, client, given) if given.startswith(TICKET) else given


def job_id(key: str) -> str:
    """A short name for a job's text."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
