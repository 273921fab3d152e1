"""What a server pays for an upload of 1.6 million weights: CPU time and memory to read, check and add it up, by method.

    python bench/server.py     prints the rows and writes bench/results/server.json

One thread. A round of nine uploads against a round of one, in turns: what eight more cost, over eight. A row a
method:

    upload_bytes       of one upload, after one local step; broadcast_bytes: of the message down
    ms                 to check, decode and add one upload, median over turns
    decode_ms          of it within the method's own decoding, of its bytes and of what it draws again
    ours_ms            the rest: address, finiteness, the running sum
    uploads_per_s      1 / ms;  mb_per_s: upload bytes taken in at that rate
    once_ms            what a round costs beside its uploads: means to a model, steps of a server's optimizer
    broadcast_ms       to write the broadcast, once for all clients
    peak_models        memory at its peak while two uploads come in, less what there was before, in float32 models: what
                       the system had to give, in a process of its own (Linux)
    copy_mb_per_s      beside it, in one run: bytes of a model copied in memory
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from local_training import spec
from report import save
from tqdm import tqdm

from fedlib.core.plan import count
from fedlib.core.uploads import Buffer, Update, Uploads
from fedlib.engines.in_process import InProcess
from fedlib.runs import build, rounds
from fedlib.wire import container

NETWORK = "emnist-hidden2048"
NINE, TURNS = 9, 5  # after a turn that does not count
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "FedAvg": ("fedavg", {}),
    "FedMRN": ("fedmrn", {}),
    "FedMRN, signed": ("fedmrn", {"mask": "signed"}),
    "FedPM": ("fedpm", {"lam": 0.0}),
    "FedSparse": ("fedpm", {"lam": 1.0}),
    "FedDQ": ("feddq", {}),
    "FedPT": ("fedpt", {"policy": "emnist/dense1"}),
    "FedCompress": ("fedcompress", {"layers": "all", "self_compression": False}),
    "EDEN": ("eden", {}),
    "DRIVE": ("drive", {}),
    "signSGD": ("signsgd", {}),
    "sign vote": ("signvote", {}),
    "TernGrad": ("terngrad", {}),
    "top-k": ("topk", {}),
    "FedZip": ("fedzip", {}),
}


class Watched(Uploads):
    """Says how much of a round is decoding."""

    seconds = 0.0

    def read(self, decode: Callable[[Buffer], Update]) -> Iterator[Update]:
        def timed(upload: Buffer) -> Update:
            begin = process_time()
            try:
                return decode(upload)
            finally:
                self.seconds += process_time() - begin

        return super().read(timed)


class Server:
    """A run's server, and an upload that it may get from any client."""

    def __init__(self, method: str, hyper: dict[str, Any]) -> None:
        more: dict[str, Any] = {"held_out": 0.1} if method == "fedcompress" else {}
        run = spec(method, hyper, NETWORK, clients=12, batch=100, **more)
        engine = InProcess(torch.device("cpu"))
        self.job = build.job(run, engine.device)
        self.state = rounds.initial(self.job)
        self.message = rounds.broadcast(self.job.method, self.state, 1)
        sent = engine.client(self.job, self.message, 1, 0)
        if not isinstance(sent, bytes | bytearray):
            raise SystemExit(f"{method}: sends nothing plain: {sent}")
        self.sent = bytes(sent)

    def round_of(self, uploads: int, held: bool = True) -> tuple[float, float]:
        """CPU seconds, and those of decoding. held: uploads are there before, and not made within the time."""
        arrivals = ((client, container.address(self.sent, 1, client)) for client in range(uploads))
        watched = Watched(list(arrivals) if held else arrivals, most=self.job.task.count_samples, round=1)
        begin = process_time()
        self.job.method.aggregate(self.state, watched)
        seconds = process_time() - begin
        if len(watched.accepted) != uploads:
            raise SystemExit(f"{self.job.method.name}: {watched.refused}")
        return seconds, watched.seconds


def measure(label: str) -> dict[str, Any]:
    server = Server(*METHODS[label])
    more: list[tuple[float, float]] = []
    once, write = [], []
    for turn in range(TURNS + 1):
        (one, one_decoding), (nine, nine_decoding) = server.round_of(1), server.round_of(NINE)
        begin = process_time()
        rounds.broadcast(server.job.method, server.state, 1)
        if turn:
            write.append(process_time() - begin)
            more.append(((nine - one) / (NINE - 1), (nine_decoding - one_decoding) / (NINE - 1)))
            once.append(max(0.0, one - more[-1][0]))
    ms, decode_ms = (1e3 * median(column) for column in zip(*more, strict=True))
    model = 4 * count(server.job.task.tensors)
    return {
        "upload_bytes": len(server.sent),
        "broadcast_bytes": len(server.message),
        "ms": round(ms, 3),
        "decode_ms": round(decode_ms, 3),
        "ours_ms": round(ms - decode_ms, 3),
        "uploads_per_s": round(1e3 / ms, 1),
        "mb_per_s": round(len(server.sent) / ms / 1e3, 1),
        "once_ms": round(1e3 * median(once), 2),
        "broadcast_ms": round(1e3 * median(write), 2),
        "peak_models": round(int(asked("--peak", label)) / model, 2),
    }


def asked(*arguments: str) -> str:
    """What this script says in a process whose memory goes back to the system as soon as it is freed."""
    command = [sys.executable, __file__, *arguments]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def peak(label: str) -> int:
    """Bytes that the process had to get while it read two uploads, at most."""
    server = Server(*METHODS[label])
    server.round_of(2, held=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = memory("VmRSS")
    server.round_of(2, held=False)
    return memory("VmHWM") - before


def memory(what: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def copying(megabytes: float) -> float:
    """Megabytes a second from one tensor to another."""
    source = torch.ones(round(megabytes * 2.5e5))
    target = torch.empty_like(source)
    seconds = []
    for _ in range(21):
        begin = process_time()
        target.copy_(source)
        seconds.append(process_time() - begin)
    return megabytes / median(seconds[1:])


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak"]:
        print(peak(sys.argv[2]))
        return
    rows = {}
    for label in tqdm(METHODS, unit="method", disable=None):
        rows[label] = measure(label)
        print(f"{label:16}", ", ".join(f"{key} {value:,}" for key, value in rows[label].items()), flush=True)
    weights = count(build.job(spec("fedavg", {}, NETWORK), torch.device("cpu")).task.tensors)
    copy = round(copying(4e-6 * weights))
    save("server", {"network": NETWORK, "weights": weights, "turns": TURNS, "copy_mb_per_s": copy, "rows": rows})


if __name__ == "__main__":
    main()
