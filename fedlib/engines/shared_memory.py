"""Memory that a worker process and its parent share, so that an upload passes by one copy in and one copy out."""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
from multiprocessing.connection import Connection
from typing import NamedTuple


class Laid(NamedTuple):
    """What the worker says of a message that it has put on the shelf."""

    size: int
    room: int  # bytes of a place where the shelf is a new one, 0 where it is the old one


class Shelf:
    """Both sides have one. Messages take its places in turns: at most `places` may lie there untaken."""

    def __init__(self, connection: Connection, places: int) -> None:
        self.connection, self.places = connection, places
        self.memory: mmap.mmap | None = None
        self.room = self.turn = 0

    def put(self, message: bytes) -> None:
        """The worker's part. A message that is larger than all before it comes with a larger shelf."""
        grown = self.memory is None or len(message) > self.room
        if grown:
            descriptor = _file()
            room = max(len(message), 1)
            os.ftruncate(descriptor, self.places * room)
            self._map(descriptor, room)
        self._next(len(message))[:] = message
        self.connection.send(Laid(len(message), self.room if grown else 0))
        if grown:
            with _socket(self.connection) as sock:
                socket.send_fds(sock, [b"+"], [descriptor])
            os.close(descriptor)

    def take(self, laid: Laid) -> bytearray:
        """The parent's part: a copy, since the worker will write there again."""
        if laid.room:
            with _socket(self.connection) as sock:
                _, (descriptor,), _, _ = socket.recv_fds(sock, 1, 1)
            self._map(descriptor, laid.room)
            os.close(descriptor)
        return bytearray(self._next(laid.size))

    def _map(self, descriptor: int, room: int) -> None:
        self.memory, self.room, self.turn = mmap.mmap(descriptor, self.places * room), room, 0

    def _next(self, size: int) -> memoryview:
        assert self.memory is not None
        start = self.turn * self.room
        self.turn = (self.turn + 1) % self.places
        return memoryview(self.memory)[start : start + size]


def _socket(connection: Connection) -> socket.socket:
    """The pipe itself, by another descriptor: descriptors travel by sockets only."""
    return socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)


def _file() -> int:
    """A descriptor of a file that has no name and goes with its last user; in memory where the system offers it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedlib")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
