"""A server's connection to a SuperLink: a run there, and messages to its nodes."""

from __future__ import annotations

import contextlib
import io
import threading
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import httpx
from flwr.app import Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.proto import control_pb2, fab_pb2, runtime_pb2
from flwr.supercore.constant import TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from fedlib.core.uploads import shorten
from fedlib.engines.flower.frames import Lost
from fedlib.engines.flower.link import Address, Objects, Refused, content, frame_of
from fedlib.errors import RunError

BEAT = 10.0  # seconds between signs of life
START = 30.0  # seconds until the SuperLink has made the run ready
KIND = "train"  # of Flower's few kinds of messages
NOT_TAKEN = "not taken "  # how what stands for a message's id begins where the SuperLink took none
# Flower asks for an app of whoever starts a run. This one names no code.
BUNDLE = """
[project]
name = "fedlib"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedlib"
[tool.flwr.app.components]
serverapp = "none:none"
clientapp = "none:none"
[tool.flwr.app.config]
"""


class ServerLink:
    """A run at a SuperLink, to `close`. RunError: as of `Address.call`.

    secret: what the SuperLink asks of whoever may lead a run (its `--superexec-auth-secret-file`).
    """

    def __init__(self, address: Address, secret: bytes | None) -> None:
        self.address = address
        self.run = self._started()
        token = RuntimeTokenHttpInterceptor(self._token(secret))
        self.client = address.client(RuntimeHttpClient, RuntimeVersionHttpInterceptor("flwr-serverapp"), token)
        address.call(self.client.PullTaskInput, runtime_pb2.PullTaskInputRequest())
        self.objects = Objects(address, self.client, SUPERLINK_NODE_ID)
        self.arriving: dict[str, tuple[Any, Any]] = {}  # answers whose parts are not all there yet
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def _started(self) -> int:
        bundle = io.BytesIO()
        with zipfile.ZipFile(bundle, "w") as archive:
            archive.writestr("pyproject.toml", BUNDLE)
        control = self.address.client(ControlHttpClient, RuntimeVersionHttpInterceptor("flwr CLI"))
        try:
            request = control_pb2.StartRunRequest(fab=fab_pb2.Fab(content=bundle.getvalue()))
            return int(self.address.call(control.StartRun, request).run_id)
        finally:
            control.close()

    def _token(self, secret: bytes | None) -> str:
        """What leads our run; runs that others have left waiting are none of ours."""
        interceptors: list[Any] = [RuntimeVersionHttpInterceptor("SuperExec")]
        if secret is not None:
            methods = {"/flwr.proto.Runtime/AcquireTask"}
            interceptors.append(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=methods))
        client = self.address.client(RuntimeHttpClient, *interceptors)
        try:
            end = time.monotonic() + START
            while time.monotonic() < end:
                request = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
                found = self.address.call(client.AcquireTask, request)
                if found.HasField("task") and found.token and found.task.run_id == self.run:
                    return str(found.token)
                time.sleep(0.05)
        finally:
            client.close()
        raise Refused(f"SuperLink {self.address.place}: it gave our run to another; start it with --isolation process")

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(httpx.HTTPError, OSError):  # whoever sends a message is told
                self.client.SendTaskHeartbeat(runtime_pb2.SendTaskHeartbeatRequest())

    def nodes(self) -> dict[int, str]:
        """Nodes that are there, with the name under which they were registered, empty where there is none."""
        found = self.address.call(self.client.GetNodes, runtime_pb2.GetNodesRequest())
        return {node.node_id: node.name for node in found.nodes}

    def send(self, frames: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        """Give nodes their frames; by the message's id who got it. One that nobody fetches in time ends by itself."""
        messages = [self._message(node, frame, seconds) for node, frame in frames.items()]

        def send(heads: list[Any], trees: list[Any]) -> Any:
            request = runtime_pb2.PushAppMessagesRequest(messages_list=heads, message_object_trees=trees)
            return self.address.call(self.client.PushMessages, request)

        ids = self.objects.push(messages, send).message_ids
        return {id or f"{NOT_TAKEN}{node}": node for id, node in zip(ids, frames, strict=True)}

    def _message(self, node: int, frame: bytes, seconds: float) -> Message:
        metadata = Metadata(
            run_id=self.run,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=seconds,
            message_type=KIND,
        )
        return make_message(metadata=metadata, content=content(frame))

    def received(self, ids: Collection[str]) -> Iterator[tuple[str, bytes | Lost]]:
        """Answers that have come to some of these messages, each told once."""
        for id in ids:
            if id.startswith(NOT_TAKEN):
                yield id, Lost("the SuperLink did not take the message")
        wanted = [id for id in ids if id not in self.arriving and not id.startswith(NOT_TAKEN)]
        if wanted:
            found = self.address.call(self.client.PullMessages, runtime_pb2.PullAppMessagesRequest(message_ids=wanted))
            for head, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                self.arriving[head.metadata.reply_to_message_id] = head, tree
        for id in [id for id in ids if id in self.arriving]:
            try:
                message = self.objects.pull(*self.arriving[id], seconds=0)
                if message is None:
                    continue
                answer = _lost(message) if message.has_error() else frame_of(message)
            except RunError:
                raise
            except Exception as error:  # whatever a node has put there
                answer = Lost(f"its answer cannot be read ({type(error).__name__})")
            del self.arriving[id]
            yield id, answer

    def close(self) -> None:
        """End the run at the SuperLink, where it is still there."""
        self._stop.set()
        done = runtime_pb2.PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details="")
        with contextlib.suppress(httpx.HTTPError, OSError):
            self.client.PushTaskOutput(done)
        self.client.close()


def _lost(message: Message) -> Lost:
    if message.error.code == ErrorCode.NODE_UNAVAILABLE:
        return Lost("it is gone", gone=True)
    return Lost(shorten(f"no answer ({message.error.reason})"))
