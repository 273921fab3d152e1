"""DRIVE's and EDEN's messages there and back, and the Hadamard transform inside them, on one thread.

    python bench/rotation.py     prints the tables and writes bench/results/rotation.json

Target, set before measuring: 20 million weights/s for DRIVE to encode and to decode, each with the rotation and its
random signs, as medians; weights are counted without padding. Times are CPU time of the process, since wall-clock time
measures the machine's other work too. The transform is timed with matrices of several sizes and beside butterflies, the
textbook's way: log2 n passes of additions and subtractions.
"""

import dataclasses
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import torch
from fedlib.methods.baselines.eden import Eden
from local_training import spec
from report import save
from torch import Tensor

from fedlib.core.method import Local
from fedlib.core.task import Task
from fedlib.methods.baselines.drive import Drive
from fedlib.rng import Rng
from fedlib.runs import build
from fedlib.wire import rotation

SIZES = (2**20, 389_920)  # the second is CNN4's, with a padded length of 524,288
RADICES = (4, 8, 16, 32, 64, 128)
REPEATS = 31
TARGET = 20.0  # million weights/s


def milliseconds(call: Callable[[], object]) -> float:
    """CPU time, median of REPEATS calls after a first one that is not counted."""
    call()
    seconds = []
    for _ in range(REPEATS):
        start = process_time()
        call()
        seconds.append(process_time() - start)
    return 1e3 * median(seconds)


def butterflies(x: Tensor) -> Tensor:
    x, h = x.clone(), 1
    while h < len(x):
        pairs = x.view(-1, 2, h)
        difference = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] += pairs[:, 1]
        pairs[:, 1] = difference
        h *= 2
    return x


def message(kind: type[Drive] | type[Eden], d: int, task: Task) -> dict[str, Any]:
    method = kind().bind(dataclasses.replace(task, weights={"w": torch.Size([d])}))
    u, local = torch.randn(d, generator=torch.Generator().manual_seed(0)), Local({}, {}, 1)
    parts = [memoryview(bytes(part)) for part in method.encode(u, local, Rng(0))]
    error = method.decode(parts, None) - u
    row: dict[str, Any] = {
        "method": method.name,
        "weights": d,
        "padded": rotation.padded(d),
        "bytes": sum(len(part) for part in parts),
        "relative_squared_error": round(float(error.square().sum() / u.square().sum()), 4),
        "encode_million_per_s": round(d / milliseconds(lambda: method.encode(u, local, Rng(0))) / 1e3, 1),
        "decode_million_per_s": round(d / milliseconds(lambda: method.decode(parts, None)) / 1e3, 1),
    }
    row["target_met"] = row["encode_million_per_s"] >= TARGET and row["decode_million_per_s"] >= TARGET
    return row


def transforms(n: int) -> dict[str, Any]:
    x, chosen = torch.randn(n, generator=torch.Generator().manual_seed(0)), rotation.RADIX
    row: dict[str, Any] = {
        "padded": n,
        "radix": chosen,
        "butterflies_ms": round(milliseconds(lambda: butterflies(x)), 2),
    }
    for radix in RADICES:
        rotation.RADIX = radix
        row[f"radix_{radix}_ms"] = round(milliseconds(lambda: rotation.transform(x)), 2)
    rotation.RADIX = chosen
    row["butterflies_over_chosen"] = round(row["butterflies_ms"] / row[f"radix_{chosen}_ms"], 2)
    return row


def main() -> None:
    torch.set_num_threads(1)
    task = build.task(spec("fedavg", {}, "mlp"), torch.device("cpu"))
    messages, rows = [], []
    print("method   weights   padded    bytes   error | encode  decode   (million weights/s)")
    for method in (Drive, Eden):
        for d in SIZES:
            row = message(method, d, task)
            messages.append(row)
            print(
                f"{row['method']:6} {d:9,} {row['padded']:9,} {row['bytes']:7,} {row['relative_squared_error']:7.4f} | "
                f"{row['encode_million_per_s']:6.0f} {row['decode_million_per_s']:7.0f}   "
                + ("ok" if row["target_met"] else "TARGET MISSED")
            )
    print("\ntransform: ms, butterflies, then matrices of " + ", ".join(map(str, RADICES)))
    for n in (rotation.padded(d) for d in SIZES):
        row = transforms(n)
        rows.append(row)
        print(f"{n:9,} {row['butterflies_ms']:8.2f} | " + " ".join(f"{row[f'radix_{r}_ms']:6.2f}" for r in RADICES))
    save("rotation", {"messages": messages, "transforms": rows, "repeats": REPEATS, "threads": 1, "device": "cpu"})


if __name__ == "__main__":
    main()
