"""A node's connection to a SuperLink, at which it is a SuperNode, as Flower calls it."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.proto import fleet_pb2, heartbeat_pb2, node_pb2
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedlib.engines.flower.link import Address, Objects, content, frame_of
from fedlib.errors import PayloadError, RunError

LONGEST = 300.0  # seconds that a node waits for the parts of a message


def read_key(text: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    """A node's private key, as `ssh-keygen -t ecdsa` writes it. RunError: another one."""
    try:
        key = load_ssh_private_key(text, None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RunError(f"key: {where} cannot be read ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError(f"key: {where} is of another kind; make one with ssh-keygen -t ecdsa -b 384")
    return key


@dataclass(frozen=True)
class Asked:
    """A message that a node has fetched, still to be answered."""

    message: Message
    frame: bytes  # empty where it holds none


class NodeLink:
    """A node at a SuperLink, to `close`. RunError: as of `Address.call`.

    key: registered at the SuperLink; None for one that is made here and registers itself, where the SuperLink lets it.
    """

    def __init__(self, address: Address, key: ec.EllipticCurvePrivateKey | None = None) -> None:
        self.address, self.registers = address, key is None
        private = key or generate_key_pairs()[0]
        signs = NodeAuthHttpInterceptor(private, private.public_key())
        self.client = address.client(FleetHttpClient, RuntimeVersionHttpInterceptor("SuperNode"), signs)
        name = public_key_to_bytes(private.public_key())
        if self.registers:
            address.call(self.client.RegisterNode, fleet_pb2.RegisterNodeFleetRequest(public_key=name))
        request = fleet_pb2.ActivateNodeRequest(public_key=name, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        self.node = int(address.call(self.client.ActivateNode, request).node_id)
        self.objects = Objects(address, self.client, self.node)
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def _beat(self) -> None:
        node = node_pb2.Node(node_id=self.node)
        request = heartbeat_pb2.SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        while not self._stop.wait(HEARTBEAT_MIN_INTERVAL / 3):
            with contextlib.suppress(httpx.HTTPError, OSError):  # whoever fetches a message is told
                self.client.SendNodeHeartbeat(request)

    def receive(self) -> Asked | None:
        """The next message, if there is one."""
        found = self.address.call(self.client.PullMessages, fleet_pb2.PullMessagesRequest(node=self.objects.node))
        if not found.messages_list:
            return None
        message = self.objects.pull(found.messages_list[0], found.message_object_trees[0], LONGEST)
        if message is None:
            return None
        try:
            return Asked(message, frame_of(message))
        except PayloadError:
            return Asked(message, b"")

    def answer(self, asked: Asked, frame: bytes) -> None:
        """Refused: nobody waits for it any more."""

        def send(heads: list[Any], trees: list[Any]) -> Any:
            request = fleet_pb2.PushMessagesRequest(
                node=self.objects.node, messages_list=heads, message_object_trees=trees, clientapp_runtime_list=[0.0]
            )
            return self.address.call(self.client.PushMessages, request)

        self.objects.push([Message(content(frame), reply_to=asked.message)], send)

    def close(self) -> None:
        """Sign off, where the SuperLink is still there."""
        self._stop.set()
        with contextlib.suppress(httpx.HTTPError, OSError):
            self.client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self.node))
            if self.registers:
                self.client.UnregisterNode(fleet_pb2.UnregisterNodeFleetRequest(node_id=self.node))
        self.client.close()


def superlink() -> None:
    """Flower's program `flower-superlink`, with the arguments of this process."""
    from flwr.superlink.cli import flower_superlink

    os.umask(0o077)
    flower_superlink()
