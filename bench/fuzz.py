"""Fuzzes whatever reads bytes from outside, led by the code that an input reaches.

    python bench/fuzz.py                                       every receiver, ten seconds each
    python bench/fuzz.py --seconds 60 --targets 'fedmrn*' levels
    python bench/fuzz.py --minimize                            of all inputs found the few that tests/attacks keeps
    python bench/fuzz.py --real                                those, against networks as papers have them

An input is a list of edits to an honest message (`tests/receivers.py`), whose envelope is made right again. Mutations
are those of libFuzzer and of `bench/mutations.py`. What comes of an input must be a PayloadError, or tensors of the
model's shapes with finite values; in memory of eight models, and at real size within ten times an honest message's
time. All else is a finding: it is printed, and stands in .cache/fuzz/findings.txt. New inputs gather in .cache/fuzz.

The fuzzer is atheris, which nothing else needs, and which has wheels for Linux on x86-64 and Python up to 3.13 alone:
so it is no dependency, and not in the lock. Into the environment by hand: pip install --no-deps atheris==3.0.0
"""

import argparse
import fnmatch
import hashlib
import itertools
import logging
import os
import random
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
try:
    import atheris
except ImportError:
    atheris = None
CACHE = ROOT / ".cache" / "fuzz"
FINDINGS = CACHE / "findings.txt"
MOST_MEMORY = 8  # models
MOST_TIME = 10  # honest messages
SLACK = 2**18  # bytes: of Python itself, and of blocks that small models do not fill
MEASURED = 50  # one input of so many is measured, since measuring is slow
LONGEST = 4096  # bytes of an input
LONGEST_KEPT = 2000  # characters of one in tests/attacks

if atheris and not {"--minimize", "--real"} & set(sys.argv):  # what is to be watched must be imported under it
    with atheris.instrument_imports(include=["fedlib"], enable_loader_override=False):
        import malformed
        import receivers
else:
    import malformed
    import receivers
import mutations  # noqa: E402
import torch  # noqa: E402
from common import peak_bytes  # noqa: E402
from receivers import END, Edit, Receiver, edited, file_of, from_bytes, from_text, kept, to_bytes, to_text  # noqa: E402


def fault(target: Receiver, line: str, measured: bool = False) -> str:
    """What is wrong with the reading of an input; empty: nothing."""
    parts = edited(target.sections, from_text(line))
    try:
        message = target.packed(parts)
        held = peak_bytes(lambda: target.accepts(message)) if measured else int(not target.accepts(message))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:120]}"
    copies = 0 if target.bounded else 3 * sum(map(len, parts))
    over = held > MOST_MEMORY * target.model + SLACK + copies
    return f"memory: {held / target.model:.0f} models" if over else ""


# Mutations


def mutator(target: Receiver) -> Any:
    """Half of them libFuzzer's own, half of `bench/mutations.py`, as a further edit or as the only one."""

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        kind = draw.randrange(4)
        edits = from_bytes(data) if kind else []  # an honest message has the most to lose
        if kind < 2:
            if len(edits) == receivers.MOST_EDITS:
                edits.pop(draw.randrange(len(edits)))
            parts = edited(target.sections, edits)
            index, content = mutations.mutation(parts, draw)
            changed = to_bytes([*edits, difference(index, parts[index], content)])
            if len(changed) <= size:
                return changed
        return bytes(atheris.Mutate(data, size))

    return mutate


def difference(index: int, old: bytes, new: bytes) -> Edit:
    """The one edit that makes the new section of the old one."""
    start = common(old, new)
    end = common(old[start:][::-1], new[start:][::-1])
    put, times = new[start : len(new) - end], 1
    for period in range(1, min(33, len(put) // 2 + 1)):
        if not len(put) % period and put == put[:period] * (len(put) // period):
            put, times = put[:period], len(put) // period
            break
    return Edit(index, start, len(old) - end - start, put[:65_535], min(times, 65_535))


def common(one: bytes, other: bytes) -> int:
    """Bytes at the start that are the same."""
    size = min(len(one), len(other))
    differing = np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)
    return int(differing.argmax()) if differing.any() else size


# Fuzzing


def fuzz(name: str, seconds: int) -> int:
    """Executions of a target, in a process of its own: libFuzzer ends the one that it runs in."""
    folder, log = CACHE / file_of(name).stem, CACHE / f"{file_of(name).stem}.log"
    folder.mkdir(parents=True, exist_ok=True)
    for line in ["", *kept(name)]:
        data = to_bytes(from_text(line))
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)  # as libFuzzer names files
    target = receivers.receiver(name)
    child = os.fork()
    if not child:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        flags = {"max_total_time": seconds, "max_len": LONGEST, "print_final_stats": 1, "rss_limit_mb": 8192}
        flags |= {"artifact_prefix": f"{log}.", "timeout": 60, "mutate_depth": 2}
        arguments = [sys.argv[0], *(f"-{key}={value}" for key, value in flags.items()), str(folder)]
        atheris.Setup(arguments, watcher(name, target), custom_mutator=mutator(target))
        atheris.Fuzz()
    _, status = os.waitpid(child, 0)
    said = log.read_text(errors="replace")
    if status:
        note(name, f"the process ended with status {status}: {log}", "")
    executed = re.search(r"number_of_executed_units: (\d+)", said)
    return int(executed[1]) if executed else 0


def watcher(name: str, target: Receiver) -> Any:
    """The function that is called with inputs: it notes each kind of finding once, and goes on."""
    seen, tried = set[str](), itertools.count()

    def one(data: bytes) -> None:
        line = to_text(from_bytes(data))
        wrong = fault(target, line, not next(tried) % MEASURED)
        kind = wrong.split(": ")[0]
        if wrong and kind not in seen:
            seen.add(kind)
            note(name, wrong, line)

    return one


def note(name: str, wrong: str, line: str) -> None:
    with FINDINGS.open("a", encoding="utf-8") as file:
        file.write(f"{name}: {wrong}: {line}\n")


# The few that are kept


def minimized(name: str) -> list[str]:
    """Of inputs kept and found, the shortest first: those that reach a step of the code that no shorter one reached.

    Findings are not among them: whoever mends one puts it into the test.
    """
    folder, target = CACHE / file_of(name).stem, receivers.receiver(name)
    lines = {*kept(name), *(to_text(from_bytes(file.read_bytes())) for file in folder.glob("*"))} - {""}
    lines = {to_text(settled(target, from_text(line))) for line in lines} - {""}
    seen, chosen = steps(target, ""), []
    for line in sorted(lines, key=lambda line: (len(line), line)):
        if len(line) <= LONGEST_KEPT and not fault(target, line) and (new := steps(target, line) - seen):
            seen |= new
            chosen.append(line)
    return chosen


def settled(target: Receiver, edits: Sequence[Edit]) -> list[Edit]:
    """The same edits, with numbers as they come to count, and without those that change nothing."""
    found, parts = list[Edit](), list(target.sections)
    for edit in edits:
        after = edited(parts, [edit])
        if after != parts:
            index = min(edit.section, len(after) - 1)
            size = len(parts[index]) if index < len(parts) else 0
            at = edit.at % (size + 1)
            cut = END if 0 < size <= at + edit.cut else edit.cut
            times = min(edit.times, receivers.MOST_PUT // max(1, len(edit.put)))
            found.append(Edit(index, at, cut if size else 0, edit.put if times else b"", times if edit.put else 1))
        parts = after
    return found


def steps(target: Receiver, line: str) -> set[tuple[str, int, int]]:
    """From which line to which line of fedlib the reading of an input goes."""
    found, last = set[tuple[str, int, int]](), dict[FrameType, int]()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if "/fedlib/" not in frame.f_code.co_filename:
            return None
        found.add((frame.f_code.co_filename, last.get(frame, 0), frame.f_lineno))
        last[frame] = frame.f_lineno
        return trace

    sys.settrace(trace)
    try:
        fault(target, line)
    finally:
        sys.settrace(None)
    return found


# At real size


def measured(names: list[str]) -> Iterator[tuple[str, float, float]]:
    """Most memory in models, and most time in honest messages' times, of each channel's kept inputs."""
    for case, ways in itertools.groupby((name for name in names if name not in receivers.WIRE), key=case_of):
        for name in ways:
            channel = malformed.channels(case, **mutations.real(case))[name.rsplit(" ", 1)[1]]
            honest = mutations.typical(channel, channel.message, 15)
            memory = duration = 0.0
            for line in kept(name):
                message = channel.packed(edited(channel.sections, from_text(line)))
                if wrong := fault(receivers.of_channel(channel), line):
                    note(f"{name}, real size", wrong, line)
                    continue
                held = mutations.peak(channel, message) / channel.model
                took = mutations.typical(channel, message) / honest
                if held > MOST_MEMORY or took > MOST_TIME:
                    note(f"{name}, real size", f"memory of {held:.1f} models, time of {took:.1f} messages", line)
                memory, duration = max(memory, held), max(duration, took)
            yield name, memory, duration
        malformed.channels.cache_clear()


def case_of(name: str) -> str:
    return name.rsplit(" ", 1)[0]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, default=10, help="of fuzzing a target")
    options.add_argument("--targets", nargs="+", default=["*"], help="names, or patterns of them")
    options.add_argument("--minimize", action="store_true", help="write tests/attacks anew, of all that was found")
    options.add_argument("--real", action="store_true", help="measure the kept inputs at real size")
    given = options.parse_args()
    logging.getLogger("fedlib").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    names = [name for name in receivers.NAMES if any(fnmatch.fnmatch(name, pattern) for pattern in given.targets)]
    CACHE.mkdir(parents=True, exist_ok=True)
    FINDINGS.write_text("")
    fuzzes = not (given.minimize or given.real)
    if fuzzes and not atheris:
        raise SystemExit("atheris is not installed: pip install --no-deps atheris==3.0.0")
    for name in names if fuzzes else []:
        print(f"{name:28} {fuzz(name, given.seconds):>9,} inputs", flush=True)
    for name in names if given.minimize else []:
        chosen = minimized(name)
        file_of(name).write_text("".join(f"{line}\n" for line in chosen), encoding="ascii")
        print(f"{name:28} {len(chosen):3} inputs kept", flush=True)
    for name, memory, duration in measured(sorted(names)) if given.real else []:
        print(f"{name:28} memory {memory:.1f} models, time {duration:.1f} messages", flush=True)
    found = FINDINGS.read_text()
    print(f"{found}{len(found.splitlines())} findings")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
