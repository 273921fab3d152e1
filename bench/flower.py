"""What a fleet of Flower costs: seconds a round, and bytes beside the payload, counted by proxies on loopback.

    make bench-fleet

FedAvg on digits with a small network, so that a round is mostly the fleet's own time; a SuperLink and three nodes are
processes of their own. Nodes and server reach the SuperLink through proxies that count what passes, HTTP and questions
for work included. Targets, stated beforehand: at most 6 s a round; framing, which is all but payload and HTTP, at most
1,000 bytes a client and round.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import torch
from known_answers import TINY
from proxies import Counting
from report import save

from fedlib.engines.flower import extra
from fedlib.engines.flower.engine import Flower
from fedlib.engines.flower.fleet import READY, Fleet
from fedlib.runs import fleet, rounds
from fedlib.runs.spec import Spec

NODES, ROUNDS, WARM_UP = 3, 12, 2
SECONDS, FRAMING = 6.0, 1000.0  # targets
SERVE = [sys.executable, "-m", "fedlib", "serve-client", "--insecure", "--end-with-input"]
CPU = torch.device("cpu")


@contextmanager
def counted(servers: Counting, nodes: Counting, superlink: Fleet) -> Iterator[Flower]:
    """The engine of a SuperLink without nodes, and three nodes, all behind the proxies."""
    from fedlib.engines.flower.link import Address
    from fedlib.engines.flower.server_link import ServerLink

    processes = [
        subprocess.Popen(
            [*SERVE, "--superlink", nodes.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(NODES)
    ]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline().startswith(READY)
        link = ServerLink(Address(servers.address), superlink.secret)
        with Flower(link, CPU, fleet.describe, nodes=NODES) as engine:
            yield engine
    finally:
        for process in processes:
            process.terminate()
            process.wait()
            process.communicate()


class Framed:
    """A link that adds up frames and what Flower makes of them."""

    def __init__(self, link: Any) -> None:
        self.link, self.frames, self.objects = link, [0, 0], [0, 0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def _count(self, way: int, frame: bytes) -> None:
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

        message = self.link._message(1, frame, 1.0)
        vars(message.metadata)["_message_id"] = message.object_id
        parts = [part.deflate() for part in get_all_nested_objects(message).values()]
        head, tree = message_to_proto(remove_content_from_message(message)), get_object_tree(message)
        self.frames[way] += len(frame)
        self.objects[way] += sum(map(len, parts)) + head.ByteSize() + tree.ByteSize()

    def send(self, frames: Mapping[int, bytes], seconds: float) -> dict[str, int]:
        for frame in frames.values():
            self._count(0, frame)
        return dict(self.link.send(frames, seconds))

    def received(self, ids: list[str]) -> Iterator[tuple[str, Any]]:
        for id, answer in self.link.received(ids):
            if isinstance(answer, bytes):
                self._count(1, answer)
            yield id, answer


def measure(cohort: int, superlink: Fleet) -> dict[str, Any]:
    """Bytes a client and round, of rounds after the first ones, and the seconds of these."""
    spec = Spec.from_dict(TINY | {"cohort": cohort, "rounds": ROUNDS, "evaluate_every": ROUNDS})
    with (
        Counting(superlink.address) as servers,
        Counting(superlink.address) as nodes,
        counted(servers, nodes, superlink) as engine,
    ):
        job = rounds.build.job(spec, CPU)
        framed: Any = Framed(engine.link)
        engine.nodes.link = framed
        state, parts, seconds, marks = rounds.initial(job), dict[str, int](), list[float](), list[list[int]]()
        ledger = [0, 0]
        torch.set_num_threads(1)
        for number in range(1, ROUNDS + 1):
            if number == WARM_UP + 1:
                marks.append([*framed.frames, *framed.objects, *nodes.bytes, *servers.bytes])
            begin = time.perf_counter()
            state, entry = rounds.one_round(spec, job, engine, state, number, parts)
            if number > WARM_UP:
                seconds.append(time.perf_counter() - begin)
                ledger[0] += entry["downlink_bytes"] * NODES // cohort  # one broadcast a node
                ledger[1] += entry["uplink_bytes"]
        marks.append([*framed.frames, *framed.objects, *nodes.bytes, *servers.bytes])
    count = cohort * (ROUNDS - WARM_UP)
    frames_down, frames_up, down, up, *wire = ((after - before) / count for before, after in zip(*marks, strict=True))
    payload_down, payload_up = (size / count for size in ledger)
    return {
        "cohort": cohort,
        "seconds": statistics.median(seconds),
        "slowest": max(seconds),
        "payload": {"down": payload_down, "up": payload_up},
        "frames": {"down": frames_down - payload_down, "up": frames_up - payload_up},
        "flower": {"down": down - frames_down, "up": up - frames_up},
        "wire": {"down": wire[1], "up": wire[0], "server down": wire[3], "server up": wire[2]},
    }


def main() -> None:
    extra.prepare()
    superlink = Fleet([])
    try:
        rows = [measure(cohort, superlink) for cohort in (NODES, 9)]
    finally:
        superlink.close()
    for row in rows:
        framing = sum(row["frames"].values()) + sum(row["flower"].values())
        print(f"cohort {row['cohort']}: {row['seconds']:.2f} s a round, framing {framing:.0f} bytes a client; {row}")
    worst = rows[0]
    met = max(row["slowest"] for row in rows) <= SECONDS and all(
        worst["frames"][way] + worst["flower"][way] <= FRAMING for way in ("down", "up")
    )
    save("flower", {"nodes": NODES, "rounds": ROUNDS - WARM_UP, "rows": rows, "met": met}, ("torch", "flwr"))


if __name__ == "__main__":
    main()
