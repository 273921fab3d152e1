"""What hostile bytes, flipped bits, edited records and kills come to: how many were tried, how many got through.

    python bench/attack.py                            all of it: a million mutated messages, 200 kills
    python bench/attack.py --messages 1e4 --kills 5   less of it

A message is attacked section by section, and its checksum made right again: bits flipped, bytes set, cut, spliced,
repeated, and grown to many times its length. Its receiver must refuse it, or read what a sender could have sent:
tensors of the model's shapes with finite values. Anything else is a fault, and is printed.
"""

import argparse
import contextlib
import functools
import json
import logging
import random
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import save
from tqdm import tqdm

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))
import malformed  # noqa: E402
from kills import attack_by_kills  # noqa: E402
from known_answers import CASES, TINY  # noqa: E402
from malformed import CHANNELS, Channel  # noqa: E402

from fedlib.engines.in_process import InProcess  # noqa: E402
from fedlib.errors import PayloadError  # noqa: E402
from fedlib.runs import integrity, record, rounds  # noqa: E402
from fedlib.runs.checkpoint import Checkpoint  # noqa: E402
from fedlib.runs.spec import Spec  # noqa: E402

LARGE = {"model": "cnn4", "data": "fashion-mnist", "clients": 100, "cohort": 2}  # 389,920 weights
MEASURED = 50  # one mutation of so many is measured, since measuring is slow


WORDS = (b"\0", b"\x80", b"\xff", b"\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\x80" * 5 + b"\1")

# Mutators


def flip(part: bytes, draw: random.Random) -> bytes:
    changed = bytearray(part)
    for _ in range(draw.choice((1, 1, 2, 16))):
        changed[draw.randrange(len(part))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def put(part: bytes, draw: random.Random) -> bytes:
    """Bytes that often mean something: ends of ranges, numbers that are not finite, lengths."""
    word = draw.choice(
        (b"\0", b"\x80", b"\xff", b"\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\x80" * 5 + b"\1")
    )
    at = draw.randrange(len(part))
    return part[:at] + word + part[at + len(word) :]


def cut(part: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(part))
    return part[:start] + part[start + draw.choice((1, 4, 64, len(part))) :]


def splice(part: bytes, draw: random.Random) -> bytes:
    one, other = draw.randrange(len(part)), draw.randrange(len(part))
    return part[:one] + part[other:]


def repeat(part: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(part))
    piece = part[start : start + draw.choice((1, 4, 32))]
    return part[:start] + piece * draw.choice((2, 16, 300)) + part[start:]


def grow(part: bytes, draw: random.Random) -> bytes:
    """Up to the length that a receiver lets pass, and beyond."""
    at, byte = draw.randrange(len(part) + 1), draw.choice((b"\0", b"\x80", b"\xff", b"\1"))
    return part[:at] + byte * draw.choice((7, 100, 2100, 5000, 70_000)) + part[at:]


MUTATORS = (flip, put, cut, splice, repeat, grow)


def mutated(channel: Channel, draw: random.Random) -> bytes:
    parts = list(channel.sections)
    for _ in range(draw.choice((1, 1, 1, 2))):
        index = draw.randrange(len(parts))
        mutate = draw.choice(MUTATORS)
        parts[index] = mutate(parts[index], draw) if parts[index] or mutate is grow else bytes(draw.randrange(9))
    return channel.packed(parts)


def attack_messages(count: int) -> dict[str, Any]:
    """Refused, read as another message that a sender could have sent, and faults; the worst memory and time."""
    draw, said = random.Random(0), Counter[str]()
    worst = {"memory": 0.0, "time": 0.0}
    for name, direction in tqdm(CHANNELS, unit="channel", disable=None):
        channel = malformed.channels(name)[direction]
        honest = timed(lambda channel=channel: channel.read(channel.message))
        for number in range(count // len(CHANNELS)):
            message = mutated(channel, draw)
            try:
                said["read as another" if channel.reads(message) else "refused"] += 1
                if not number % MEASURED:
                    worst["memory"] = max(worst["memory"], peak(channel, message) / channel.model)
                    worst["time"] = max(worst["time"], timed(lambda m=message, c=channel: tried(c, m)) / honest)
            except Exception as error:  # what must not happen
                said["faults"] += 1
                print(f"{name} {direction}: {type(error).__name__}: {str(error)[:100]}: {message.hex()[:200]}")
    return {"tried": sum(said.values()), **said, **{f"worst {key}": round(value, 1) for key, value in worst.items()}}


def tried(channel: Channel, message: bytes) -> None:
    with contextlib.suppress(PayloadError):
        channel.read(message)


def peak(channel: Channel, message: bytes) -> int:
    tracemalloc.start()
    try:
        tried(channel, message)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return max(time.process_time() - start, 1e-4)


# Files


def attack_checkpoints(count: int) -> dict[str, int]:
    """Single flipped bits in the checkpoint of a run with state at server and clients."""
    spec = Spec.from_dict(TINY | CASES["fedavg adam, kept"])
    draw, said = random.Random(0), Counter[str](tried=count)
    with tempfile.TemporaryDirectory() as folder:
        here = Checkpoint(spec, Path(folder))
        halfway(spec, Path(folder))
        content = here.file.read_bytes()
        for _ in tqdm(range(count), unit="bit", disable=None):
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            here.file.write_bytes(changed)
            try:
                said["believed"] += here.load(spec.chosen) is not None
            except Exception:
                said["tracebacks"] += 1
    return {"tried": count, "believed": said["believed"], "tracebacks": said["tracebacks"]}


def halfway(spec: Spec, root: Path) -> None:
    class Stops(InProcess):
        def train(self, job: Any, message: bytes, round: int, *rest: Any, **more: Any) -> Any:
            if round == spec.rounds:
                raise InterruptedError
            return super().train(job, message, round, *rest, **more)

    try:
        rounds.run(spec, Stops(torch.device("cpu")), root=root, save_every=0)
    except InterruptedError:
        return


def attack_records() -> dict[str, int]:
    """Every number of a record changed, one at a time; with its digest made anew where sums or counts can tell."""
    spec = Spec.from_dict(TINY)
    with tempfile.TemporaryDirectory() as folder:
        made = rounds.run(spec, InProcess(torch.device("cpu")), root=Path(folder))
        kept = json.loads(record.text(made))
    text = json.dumps(kept)
    places = [at for at, sign in enumerate(text) if sign.isdigit()]
    unnoticed = 0
    for at in places:
        changed = json.loads(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :], strict=False)
        unnoticed += changed != kept and not integrity.fault(changed)
    return {"tried": len(places), "unnoticed": unnoticed}


# Time to refuse


def time_refusals() -> dict[str, float]:
    """Milliseconds of the server with an upload of CNN4: an honest one, and the slowest refusal of a hundred."""
    malformed.TINY = TINY | LARGE  # type: ignore[attr-defined]
    malformed.channels.cache_clear()
    channel, draw = malformed.channels("fedmrn coded")["up"], random.Random(1)
    honest = median(timed(lambda: channel.read(channel.message)) for _ in range(21))
    bad = [mutated(channel, draw) for _ in range(100)]
    worst = max(timed(functools.partial(tried, channel, message)) for message in bad)
    return {"honest": round(1e3 * honest, 2), "slowest refusal": round(1e3 * worst, 2)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--messages", type=float, default=1e6)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--bits", type=int, default=2000)
    given = options.parse_args()
    logging.getLogger("fedlib").setLevel(logging.CRITICAL)
    found = {
        "messages": attack_messages(int(given.messages)),
        "checkpoints": attack_checkpoints(given.bits),
        "records": attack_records(),
        "kills": attack_by_kills(given.kills),
        "refusal, ms": time_refusals(),
    }
    for name, row in found.items():
        print(f"{name:14}", ", ".join(f"{key} {value:,}" for key, value in row.items()))
    save("attack", found)


if __name__ == "__main__":
    main()
