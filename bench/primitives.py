"""What every message and every local step pays: a checksum of its bytes, and draws for its entries.

    python bench/primitives.py

Targets: XXH3 faster than CRC-32; draws from Philox no slower than torch's own, which depend on device and version.
"""

import zlib
from collections.abc import Callable
from statistics import median
from time import process_time

import numpy as np
import torch
import xxhash
from report import save

from fedlib.rng import Rng

MESSAGE = 4 * 1_626_442  # bytes: cnn2 as float32
DRAWS = 389_920  # weights of cnn4
TURNS, REPEATS = 11, 20


def main() -> None:
    torch.set_num_threads(1)
    message = np.random.default_rng(0).bytes(MESSAGE)
    generator, stream = torch.Generator().manual_seed(0), Rng(0).stream()
    calls: dict[str, Callable[[], object]] = {
        "CRC-32": lambda: zlib.crc32(message),
        "XXH3": lambda: xxhash.xxh3_64_intdigest(message),
        "a copy": lambda: bytearray(message),
        "torch.rand": lambda: torch.rand(DRAWS, generator=generator),
        "Philox": lambda: stream.uniform(DRAWS),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            begin = process_time()
            for _ in range(REPEATS):
                call()
            times[name].append(1e3 * (process_time() - begin) / REPEATS)
    found = {name: round(median(turns), 3) for name, turns in times.items()}
    met = found["XXH3"] < found["CRC-32"] and found["Philox"] <= found["torch.rand"]
    print(", ".join(f"{name} {ms} ms" for name, ms in found.items()), "; targets met" if met else "; targets missed")
    save("primitives", {"ms": found, "bytes": MESSAGE, "draws": DRAWS, "met": met}, ("torch", "numpy", "xxhash"))


if __name__ == "__main__":
    main()
