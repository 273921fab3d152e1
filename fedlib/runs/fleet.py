"""Real clients: a server's engine from the command line's options, and a node."""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedlib.data import sets, sources
from fedlib.engines import select
from fedlib.engines.flower import extra, process
from fedlib.engines.flower.engine import Flower
from fedlib.engines.flower.fleet import READY, Fleet
from fedlib.engines.flower.node import Identity, Kept, Node
from fedlib.errors import RunError
from fedlib.runs import build, machine
from fedlib.runs.digest import code_of
from fedlib.runs.shard_files import Shards
from fedlib.runs.spec import Spec

NODES = 3
IDLE = 0.02, 1.0  # seconds between a node's questions for work: right after work, and later
log = logging.getLogger("fedlib")


def add_server_options(parser: ArgumentParser) -> None:
    own = parser.add_argument_group("with --engine flower")
    own.add_argument(
        "--nodes", type=int, help=f"how many start here (default: {NODES}), or with --superlink are awaited"
    )
    _add_link_options(own, required=False)
    own.add_argument("--secret", type=Path, metavar="FILE", help="what the SuperLink asks of a server")
    own.add_argument("--round-limit", type=float, default=3600.0, metavar="SECONDS", help="that answers may take")


def add_node_options(parser: ArgumentParser) -> None:
    _add_link_options(parser, required=True)
    parser.add_argument("--clients", metavar="3,7", help="those that this node owns, such as 3,7 or 0-4 (default: any)")
    parser.add_argument(
        "--shards", type=Path, metavar="FOLDER", help="their samples, by the command shards, and no others"
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="the node's private key, registered at the SuperLink")
    parser.add_argument("--memory", type=Path, metavar="FOLDER", help="where it keeps what its clients keep")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto (default: cpu)")
    parser.add_argument("--end-with-input", action="store_true", help=SUPPRESS)


def _add_link_options(parser: Any, required: bool) -> None:
    parser.add_argument("--superlink", metavar="HOST:PORT", required=required, help="where Flower's SuperLink is")
    parser.add_argument("--root-certificates", type=Path, metavar="FILE", help="of who signed its certificate")
    parser.add_argument("--insecure", action="store_true", help="no TLS: on a network of your own")


def describe(key: str) -> Identity:
    """What decides whether another machine makes the same uploads of a run: of its code, its data, its libraries.

    SpecError: a run that is unknown here. DataError: its data are not here as they should be."""
    spec = Spec.from_dict(json.loads(key))
    sources.verify(spec.data)
    return _identity(spec, sets.digest(spec.data))


def _identity(spec: Spec, data: str) -> Identity:
    versions = {package: machine.version(package) for package in machine.PACKAGES}
    return {"code": code_of(spec), "data": data} | versions


@contextmanager
def open_engine(options: Namespace, on: str) -> Iterator[Flower]:
    """The engine `flower`: with a fleet of its own on this machine, or at a SuperLink that is there. RunError: none."""
    where, nodes = select.check(options.engine, on), options.nodes
    if nodes is not None and nodes < 1:
        raise RunError(f"nodes: {nodes} must be at least 1")
    if not options.round_limit > 0:
        raise RunError(f"round-limit: {options.round_limit:g} must be more than 0 seconds")
    extra.prepare()
    with _ended_by_signal():
        if options.superlink:
            from fedlib.engines.flower.link import Address
            from fedlib.engines.flower.server_link import ServerLink

            secret = options.secret.read_bytes() if options.secret else None
            link = ServerLink(Address(options.superlink, certificates(options)), secret)
            engine = Flower(link, where, describe, nodes=nodes or 1, limit=options.round_limit)
        else:
            serve = [sys.executable, "-m", "fedlib", "serve-client", "--insecure", "--device", on, "--end-with-input"]
            engine = led_by(Fleet([serve] * (nodes or NODES)), where, options.round_limit)
        with engine:
            yield engine


def led_by(fleet: Fleet, where: torch.device, limit: float) -> Flower:
    """The engine of a fleet on this machine, which is closed with it. RunError: its SuperLink takes no run."""
    from fedlib.engines.flower.link import Address
    from fedlib.engines.flower.server_link import ServerLink

    try:
        link = ServerLink(Address(fleet.address, patience=10.0), fleet.secret)
    except BaseException:
        fleet.close()
        raise
    return Flower(link, where, describe, nodes=len(fleet.ids), limit=limit, fleet=fleet)


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM as an exception, so that what was opened is closed."""

    def end(number: int, frame: Any) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def certificates(options: Namespace) -> bytes | None:
    """RunError: neither certificates nor the word that there are none."""
    if bool(options.root_certificates) == options.insecure:
        raise RunError("superlink: give either --root-certificates FILE or, on a network of your own, --insecure")
    return options.root_certificates.read_bytes() if options.root_certificates else None


def clients_of(text: str | None) -> frozenset[int] | None:
    """From `3,7` or `0-4`; None for any. RunError: another text."""
    if text is None:
        return None
    found = set[int]()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise RunError(f"clients: {text!r} is no list of numbers; write 3,7 or 0-4")
        found.update(range(int(first), int(last if dash else first) + 1))
    return frozenset(found)


def node_of(options: Namespace) -> Node:
    """What a node answers, by the command line. RunError: clients or a device that cannot be."""
    where, clients, kept = select.device(options.device), clients_of(options.clients), Kept(options.memory)
    if not options.shards:
        return Node(build.job_of, describe, where, clients, kept)
    if clients is None:
        raise RunError("shards: a node that holds shards owns their clients; name them with --clients")
    own = Shards(options.shards, clients)

    def describe_own(key: str) -> Identity:
        spec = Spec.from_dict(json.loads(key))
        return _identity(spec, own.describe(spec))

    return Node(own.job_of, describe_own, where, clients, kept)


def serve(node: Node, options: Namespace) -> None:
    """Let a node work until it is ended. RunError: the SuperLink is not there, or refuses it."""
    if options.end_with_input:
        process.end_with_parent()
    extra.prepare()
    if node.engine.device.type == "cpu":
        torch.set_num_threads(1)
    from fedlib.engines.flower.link import Unreachable

    with _ended_by_signal():
        _serve(node, options)
        while True:  # it was there: it will come again
            try:
                _serve(node, options)
            except Unreachable as error:
                log.warning("%s; trying again", error)


def _serve(node: Node, options: Namespace) -> None:
    """One stay at the SuperLink, to its end: the SuperLink may start anew, without knowing us."""
    from fedlib.engines.flower.link import Address, Refused, Unreachable
    from fedlib.engines.flower.node_link import NodeLink, read_key

    key = read_key(options.key.read_bytes(), str(options.key)) if options.key else None
    link = NodeLink(Address(options.superlink, certificates(options)), key)
    print(f"{READY}{link.node}", flush=True)
    pause = IDLE[0]
    try:
        while True:
            asked = link.receive()
            if asked is None:
                time.sleep(pause)
                pause = min(1.2 * pause, IDLE[1])
                continue
            frame = node.answer(asked.frame)
            try:
                link.answer(asked, frame)
            except Refused as error:
                log.warning("an answer that nobody waits for: %s", error)
            pause = IDLE[0]
    except (Refused, Unreachable) as error:
        log.warning("%s; trying again", error)
    finally:
        link.close()
