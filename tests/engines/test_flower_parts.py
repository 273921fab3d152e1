"""What a fleet says and does that takes no Flower: frames, what a node answers to anything, options."""

import importlib.util
import struct
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, cast

import known_answers
import projects
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlib.core.client import Job, Memories, Reply
from fedlib.engines.flower import extra, frames
from fedlib.engines.flower.node import KEPT, TICKET, Kept, Node, job_id
from fedlib.engines.flower.nodes import Nodes
from fedlib.engines.flower.round import Round, require_sound
from fedlib.engines.in_process import InProcess
from fedlib.engines.select import open_engine
from fedlib.errors import PayloadError, RunError
from fedlib.runs import build, fleet, record, rounds
from fedlib.runs.spec import Spec

CPU = torch.device("cpu")
HEADS = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=3)


@given(HEADS, st.lists(st.binary(max_size=20), max_size=4))
def test_a_frame_holds_what_was_put_in(head: dict[str, Any], parts: list[bytes]) -> None:
    head.pop("sizes", None)
    assert frames.unpack(frames.pack(head, parts)) == (head, parts)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_frame_are_refused(junk: bytes) -> None:
    with pytest.raises(PayloadError, match=r"^frame"):
        frames.unpack(junk)


def framed(text: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("<I", len(text)) + text + rest


@pytest.mark.parametrize(
    "frame",
    [
        framed(b"{}"),
        framed(b"[]"),
        framed(b'{"sizes":3}'),
        framed(b'{"sizes":[-1]}'),
        framed(b'{"sizes":[true]}', b"x"),
        framed(b'{"sizes":[1.0]}', b"x"),
        framed(b'{"sizes":[2]}', b"x"),
        framed(b'{"sizes":[]}', b"x"),
        framed(b"[" * 100_000),
    ],
)
def test_frames_that_lie_are_refused(frame: bytes) -> None:
    with pytest.raises(PayloadError, match=r"^frame"):
        frames.unpack(frame)


def job(name: str) -> Job:
    return build.job(Spec.from_dict(known_answers.TINY | known_answers.CASES[name]), CPU)


def node(clients: frozenset[int] | None = None, kept: Kept | None = None) -> Node:
    return Node(build.job_of, lambda key: {"code": "1"}, CPU, clients, kept)


def hello(key: str) -> bytes:
    return frames.pack({"kind": "hello", "key": key, "identity": {"code": "1"}})


def asked(key: str, message: bytes, clients: list[int], *memories: bytes) -> tuple[dict[str, Any], list[bytes]]:
    return {"kind": "train", "job": job_id(key), "round": 1, "clients": clients}, [message, *memories]


def test_a_node_s_uploads_are_those_of_one_process() -> None:
    own, it = job("fedmrn"), node()
    message = rounds.broadcast(own.method, rounds.initial(own), 1)
    head, _ = frames.unpack(it.answer(hello(own.key)))
    assert head == {"kind": "hello", "identity": {"code": "1"}, "clients": None}
    head, parts = frames.unpack(it.answer(frames.pack(*asked(own.key, message, [3, 1]))))
    assert head["clients"] == [3, 1] and head["replies"] == ["upload", "upload"]
    assert parts == [InProcess(CPU).client(own, message, 1, client) for client in (3, 1)]
    require_sound(parts[0], 1, 3)


def test_a_client_s_refusal_is_told_in_its_own_words() -> None:
    own, it = job("fedmrn"), node()
    message = rounds.broadcast(own.method, rounds.initial(own), 2)
    it.answer(hello(own.key))
    head, (said,) = frames.unpack(it.answer(frames.pack(*asked(own.key, message, [3]))))
    assert head["replies"] == ["refused"]
    assert said == str(InProcess(CPU).client(own, message, 1, 3)).encode()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"clients": [1, 5]}, "asked for clients [5], which are not its own"),
        ({"job": "0"}, "KeyError"),
        ({"round": None}, "TypeError"),
        ({"kind": "stop"}, "unknown kind, 'stop'"),
        ({"kind": None}, "unknown kind, None"),
    ],
)
def test_what_a_node_cannot_do_is_told_and_it_goes_on(change: dict[str, Any], why: str) -> None:
    own, it = job("fedavg"), node(frozenset({1, 2}))
    message = rounds.broadcast(own.method, rounds.initial(own), 1)
    it.answer(hello(own.key))
    right = asked(own.key, message, [1])
    head, _ = frames.unpack(it.answer(frames.pack(right[0] | change, right[1])))
    assert head["kind"] == "fault" and why in head["why"]
    assert frames.unpack(it.answer(frames.pack(*right)))[0]["kind"] == "train"


def test_a_node_with_other_code_builds_nothing() -> None:
    own, it = job("fedavg"), node()
    head, _ = frames.unpack(it.answer(frames.pack({"kind": "hello", "key": own.key, "identity": {"code": "2"}})))
    assert head["identity"] == {"code": "1"} and not it.jobs


@given(st.binary(max_size=40))
def test_a_node_answers_anything(junk: bytes) -> None:
    assert frames.unpack(node().answer(junk))[0]["kind"] == "fault"


@pytest.mark.parametrize("in_files", [False, True])
def test_memories_stay_with_a_node_that_owns_its_clients(in_files: bool, tmp_path: Path) -> None:
    own, kept = job("topk"), Kept(tmp_path / "memory" if in_files else None)
    message = rounds.broadcast(own.method, rounds.initial(own), 1)
    reply = InProcess(CPU).client(own, message, 1, 4, b"")
    assert isinstance(reply, Reply)
    it = node(frozenset({4}), kept)
    it.answer(hello(own.key))
    head, (upload, ticket) = frames.unpack(it.answer(frames.pack(*asked(own.key, message, [4], b""))))
    assert head["replies"] == ["kept"] and upload == reply.upload
    assert ticket.startswith(TICKET) and len(ticket) < 40
    later = node(frozenset({4}), Kept(tmp_path / "memory") if in_files else kept)
    later.answer(hello(own.key))
    _, (upload, _) = frames.unpack(later.answer(frames.pack(*asked(own.key, message, [4], ticket))))
    second = InProcess(CPU).client(own, message, 1, 4, reply.memory)
    assert isinstance(second, Reply) and upload == second.upload != reply.upload
    head, (said,) = frames.unpack(later.answer(frames.pack(*asked(own.key, message, [4], TICKET + b"?"))))
    assert head["replies"] == ["lost"] and b"no longer there" in said


@pytest.mark.parametrize("in_files", [False, True])
def test_a_node_keeps_the_last_memories_of_each_client(in_files: bool, tmp_path: Path) -> None:
    kept = Kept(tmp_path if in_files else None)
    others = kept.put("a", 2, b"other")
    tickets = [kept.put("a", 1, bytes([number])) for number in range(KEPT + 1)]
    assert [kept.get("a", 1, ticket) for ticket in tickets[1:]] == [bytes([n]) for n in range(1, KEPT + 1)]
    assert kept.get("a", 2, others) == b"other"
    with pytest.raises(LookupError):
        kept.get("a", 1, tickets[0])


def a_round(own: Job, message: bytes, clients: list[int], memories: Memories = None) -> Round:
    """Its answers are read without a link."""
    nodes = Nodes(cast(Any, None), lambda key: {}, 1)
    nodes.names[5] = "node 1"
    return Round(nodes, own, message, 1, clients, memories, 60.0)


def test_answers_are_read_by_client() -> None:
    own, it = job("fedmrn"), node()
    message = rounds.broadcast(own.method, rounds.initial(own), 1)
    it.answer(hello(own.key))
    answer = it.answer(frames.pack(*asked(own.key, message, [3, 1])))
    expected = {client: InProcess(CPU).client(own, message, 1, client) for client in (3, 1)}
    assert a_round(own, message, [3, 1])._read(5, [3, 1], answer) == expected


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kind": "hello"}, "something else than it was asked"),
        ({"round": 2}, "something else than it was asked"),
        ({"job": "0"}, "something else than it was asked"),
        ({"clients": [1, 3]}, "something else than it was asked"),
        ({"replies": ["upload"]}, "does not hold a reply for each client"),
        ({"replies": ["upload", "kept"]}, "does not hold a reply for each client"),
        ({"replies": None}, "does not hold a reply for each client"),
        ({"replies": ["upload", "?"]}, "client 1: a reply of another kind"),
        ({"kind": "fault", "why": "no room"}, "it says: no room"),
    ],
)
def test_answers_to_something_else_are_refused(change: dict[str, Any], why: str) -> None:
    own, it = job("fedavg"), node()
    message = rounds.broadcast(own.method, rounds.initial(own), 1)
    it.answer(hello(own.key))
    head, parts = frames.unpack(it.answer(frames.pack(*asked(own.key, message, [3, 1]))))
    with pytest.raises(PayloadError, match=why):
        a_round(own, message, [3, 1])._read(5, [3, 1], frames.pack(head | change, parts))
    with pytest.raises(PayloadError, match="client 3: message of round 1 and client 1, expected round 1 and client 3"):
        a_round(own, message, [3, 1])._read(5, [3, 1], frames.pack(head, parts[::-1]))


def test_uploads_that_no_client_has_written_are_told_from_others() -> None:
    own = job("fedavg")
    message = rounds.broadcast(own.method, rounds.initial(own), 1)
    upload = InProcess(CPU).client(own, message, 1, 3)
    assert isinstance(upload, bytes)
    require_sound(upload, 1, 3)
    altered = bytearray(upload)
    altered[len(upload) // 2] ^= 1
    for wrong in ((upload, 2, 3), (upload, 1, 4), (bytes(altered), 1, 3), (b"", 1, 3), (upload[:-1], 1, 3)):
        with pytest.raises(PayloadError):
            require_sound(*wrong)


def test_a_record_with_lost_uploads_is_not_fresh(tmp_path: Path) -> None:
    spec = Spec.from_dict(known_answers.TINY)
    found = rounds.run(spec, InProcess(CPU), root=tmp_path)
    assert not record.stale(found, spec)
    found["rounds"][1]["refused"] = [[5, "its values are not finite"], [7, f"{frames.LOST}node 2: it is gone"]]
    assert (
        record.stale(found, spec)
        == "1 uploads were lost on their way, the first in round 2, client 7: node 2: it is gone"
    )


def options(*words: str) -> Namespace:
    parser = ArgumentParser()
    fleet.add_server_options(parser)
    return parser.parse_args(words, Namespace(engine="flower"))


@pytest.mark.parametrize(
    ("words", "why"),
    [(["--nodes", "0"], "nodes: 0 must be at least 1"), (["--round-limit", "0"], "round-limit: 0 must be more than 0")],
)
def test_options_that_cannot_be_are_refused(words: list[str], why: str) -> None:
    with pytest.raises(RunError, match=why), fleet.open_engine(options(*words), "cpu"):
        pass


@pytest.mark.parametrize(("text", "found"), [(None, None), ("3", {3}), ("3,7", {3, 7}), ("0-2,5", {0, 1, 2, 5})])
def test_clients_of_a_node(text: str | None, found: set[int] | None) -> None:
    assert fleet.clients_of(text) == found


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1.5"])
def test_clients_that_are_no_list_are_refused(text: str) -> None:
    with pytest.raises(RunError, match=r"clients: .* is no list of numbers; write 3,7 or 0-4"):
        fleet.clients_of(text)


def test_flower_is_for_the_command_line() -> None:
    with pytest.raises(RunError, match="engine: flower is for python -m fedlib run"):
        open_engine("flower", "cpu")


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="Flower is here")
def test_without_flower_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLIB_HOME", str(tmp_path))
    projects.small(tmp_path)
    said = projects.refusal(tmp_path, capsys, [*projects.RUN[:4], "--engine", "flower"])
    assert f"engine: flower needs Flower {extra.VERSION}, here is none: it is the extra `fleet`" in said
    node = ["serve-client", "--superlink", "127.0.0.1:1", "--insecure"]
    assert "run make fleet" in projects.refusal(tmp_path, capsys, node)
