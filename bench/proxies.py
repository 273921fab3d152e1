"""A proxy on loopback that counts the bytes that pass."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self


class Counting:
    """Before one address, while it is open; `bytes`: from those that connect, and back to them."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target, self.bytes, self.lock = (host, int(port)), [0, 0], threading.Lock()
        self.open: list[socket.socket] = []

    def __enter__(self) -> Self:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.server, *self.open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                theirs, _ = self.server.accept()
                ours = socket.create_connection(self.target)
                for end in (theirs, ours):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.open += [theirs, ours]
                for way, (source, sink) in enumerate(((theirs, ours), (ours, theirs))):
                    threading.Thread(target=self._pass, args=(way, source, sink), daemon=True).start()

    def _pass(self, way: int, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                with self.lock:
                    self.bytes[way] += len(chunk)
                sink.sendall(chunk)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
