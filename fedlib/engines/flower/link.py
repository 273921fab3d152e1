"""What a server's and a node's connection to a SuperLink share. The modules ..._link, and they alone, import Flower.

Flower's own clients of the SuperLink's HTTP API are used, and its form of a message: one record with one byte string, a
frame. Neither side fetches or runs what a run brings along (its app bundle); the one that is sent here holds no code.

Flower's retries and exits are not used: they wait without end, and end the process by signals.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import message_pb2, node_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)

from fedlib.errors import PayloadError, RunError

RECORD, FIELD = "f", "b"  # where a message holds its frame
Result = TypeVar("Result")


class Unreachable(RunError):
    """The SuperLink does not answer, or no longer."""


class Refused(RunError):
    """The SuperLink does not take a call: a key that is not registered, a run that has ended."""


@dataclass(frozen=True)
class Address:
    """Of a SuperLink. Its calls raise Unreachable and Refused."""

    place: str  # host:port
    certificates: bytes | None = None  # PEM of the authority that signed its certificate; None: plain HTTP
    patience: float = 30.0  # seconds for which a call is tried again where there is no answer

    def client(self, kind: type[Result], *interceptors: Any) -> Result:
        """One of Flower's clients."""
        make: Any = kind
        try:
            return make.from_server_address(self.place, self.certificates is None, self.certificates, interceptors)
        except (OSError, UnicodeError) as error:  # of ssl too
            raise RunError(f"root certificates: they cannot be read ({error})") from error

    def call(self, function: Callable[[Any], Result], request: Any) -> Result:
        """What a method of a client answers."""
        end, wait = time.monotonic() + self.patience, 0.05
        while True:
            try:
                return function(request)
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in (502, 503, 504):
                    raise Refused(f"SuperLink {self.place}: {_reason(error.response)}") from error
                why = f"status {error.response.status_code}"
            except (httpx.TransportError, OSError) as error:
                why = str(error) or type(error).__name__
                if "certificate" in why.lower():
                    raise Refused(f"SuperLink {self.place}: {why}") from error
            if time.monotonic() + wait > end:
                raise Unreachable(f"SuperLink {self.place} does not answer ({why})")
            time.sleep(wait)
            wait = min(2 * wait, 2.0)


def _reason(response: httpx.Response) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        return f"{response.json().get('detail')} (status {response.status_code})"
    return f"status {response.status_code}"


def content(frame: bytes) -> RecordDict:
    return RecordDict({RECORD: ConfigRecord({FIELD: frame})})


def frame_of(message: Message) -> bytes:
    """PayloadError: a message with something else in it."""
    try:
        records: Any = message.content
        frame = records[RECORD][FIELD]
    except (KeyError, TypeError, ValueError) as error:
        raise PayloadError("message holds no frame") from error
    if not isinstance(frame, bytes):
        raise PayloadError("message holds no frame")
    return frame


class Objects:
    """Messages and their parts, as both sides hand them over."""

    def __init__(self, address: Address, client: Any, node: int) -> None:
        self.address, self.client, self.node = address, client, node_pb2.Node(node_id=node)

    def push(self, messages: list[Message], send: Callable[[list[Any], list[Any]], Any]) -> Any:
        """send: gets messages without content and the trees of their parts; its answer says which are wanted."""
        with no_object_id_recompute():
            for message in messages:
                vars(message.metadata)["_message_id"] = message.object_id
            parts: dict[str, Any] = {}
            for message in messages:
                parts.update(get_all_nested_objects(message))
            heads = [message_to_proto(remove_content_from_message(message)) for message in messages]
            answer = send(heads, [get_object_tree(message) for message in messages])
            push = make_push_object_fn_protobuf(
                lambda request: self.address.call(self.client.PushObject, request),
                self.node,
                messages[0].metadata.run_id,
                answer.session_id,
            )
            push_objects(parts, push, object_ids_to_push=set(answer.objects_to_push))
        return answer

    def pull(self, head: Any, tree: Any, seconds: float) -> Message | None:
        """None: its sender has not handed all parts over within so many seconds."""
        run = head.metadata.run_id
        pull = make_pull_object_fn_protobuf(
            lambda request: self.address.call(self.client.PullObject, request), self.node, run
        )
        ids = [part.object_id for part in iterate_object_tree(tree)]
        tries: dict[str, Any] = {"max_time": seconds, "max_tries_per_object": None if seconds else 1}
        try:
            contents = pull_objects(ids, pull, initial_backoff=0.02, backoff_cap=0.5, **tries)
        except ObjectPullError:
            return None
        confirmed = message_pb2.ConfirmMessageReceivedRequest(
            node=self.node, run_id=run, message_object_id=head.metadata.message_id
        )
        self.address.call(self.client.ConfirmMessageReceived, confirmed)
        found = inflate_object_from_contents(head.metadata.message_id, contents)
        if not isinstance(found, Message):
            raise PayloadError("it is no message")
        vars(found.metadata)["_message_id"] = head.metadata.message_id
        return found
