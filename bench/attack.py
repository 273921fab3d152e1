"""What hostile bytes, flipped bits, edited records and kills come to: how many were tried, how many got through.

    python bench/attack.py                            all of it: a million mutated messages, 200 kills
    python bench/attack.py --messages 2e4 --kills 5   less of it

A message is attacked section by section, and its checksum made right again: bits flipped, bytes set, cut, spliced,
repeated, and grown to many times its length. Its receiver must refuse it, or read what a sender could have sent:
tensors of the model's shapes with finite values. Anything else is a fault, and is printed.

A tenth of the messages are of networks as papers have them, 270,000 to 1.9 million weights: there memory and time show.
The others are of some thousand weights: the code that reads them is the same, and is tried ten times as often.
"""

import argparse
import functools
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from operator import itemgetter
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
from mutations import REPEATS, mutated, peak, real, timed, tried, typical  # noqa: E402

from fedlib.engines.in_process import InProcess  # noqa: E402
from fedlib.runs import integrity, record, rounds  # noqa: E402
from fedlib.runs.checkpoint import Checkpoint  # noqa: E402
from fedlib.runs.spec import Spec  # noqa: E402

OF_REAL_SIZE = 0.1  # share of the messages
MEASURED = 50  # one mutation of so many is measured, since measuring is slow


def attack_messages(count: int, large: bool) -> dict[str, Any]:
    """Refused, read as another message that a sender could have sent, and faults; the worst memory and time."""
    rows = []
    for name, ways in itertools.groupby(tqdm(sorted(CHANNELS), unit="channel", disable=None), key=itemgetter(0)):
        for _, direction in ways:
            channel = malformed.channels(name, **(real(name) if large else {}))[direction]
            row = attack_channel(f"{name} {direction}", channel, -(-count // len(CHANNELS)))
            print(
                f"{name + ' ' + direction:28}", ", ".join(f"{key} {value:,}" for key, value in row.items()), flush=True
            )
            rows.append(row)
        malformed.channels.cache_clear()  # large ones have some megabytes each
    sums = {key: sum(row[key] for row in rows) for key in ("tried", "refused", "read as another", "faults", "seconds")}
    return sums | {key: max(row[key] for row in rows) for key in ("worst memory", "worst time")}


def attack_channel(label: str, channel: Channel, count: int) -> dict[str, Any]:
    """The same of one receiver; memory in models, time in that of an honest message.
    Where a time seems worse than any before, both are taken nine times in turns, and the least of each counts."""
    draw, said, start = random.Random(label), Counter[str](), time.perf_counter()
    honest = typical(channel, channel.message, 5 * REPEATS)
    memory = duration = 0.0
    for number in range(count):
        message = mutated(channel, draw)
        try:
            said["read as another" if channel.reads(message) else "refused"] += 1
            if not number % MEASURED:
                memory = max(memory, peak(channel, message) / channel.model)
                ratio = typical(channel, message) / honest
                if ratio > duration:  # what a busy machine did to one try is no finding
                    turns = [[typical(channel, each, 1) for each in (message, channel.message)] for _ in range(9)]
                    bad, good = map(min, zip(*turns, strict=True))
                    ratio = bad / good
                duration = max(duration, ratio)
        except Exception as error:  # what must not happen
            said["faults"] += 1
            print(f"{label}: {type(error).__name__}: {str(error)[:100]}: {message.hex()[:200]}")
    counts = {key: said[key] for key in ("refused", "read as another", "faults")}
    worst = {"worst memory": round(memory, 1), "worst time": round(duration, 1)}
    return {"tried": count, **counts, **worst, "seconds": round(time.perf_counter() - start, 1)}


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
    """Every digit of a record changed, one at a time."""
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
    channel, draw = malformed.channels("fedmrn coded", **real("fedmrn coded"))["up"], random.Random(1)
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
        "messages": attack_messages(round(given.messages * (1 - OF_REAL_SIZE)), large=False),
        "real size": attack_messages(round(given.messages * OF_REAL_SIZE), large=True),
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
