"""Commands of `python -m fedlib` in processes of their own, which may be limited, stopped and killed.

They are forked from a process that has imported everything, so that each begins at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import multiprocessing
import os
import resource
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

IMPORTED = ["fedlib.__main__", "fedlib.claims.score", "fedlib.labs.notebooks", "fedlib.pages.execute"]
IMPORTED += ["fedlib.runs.proof", "sklearn.datasets", "torch._dynamo"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads do not survive a fork
RUN = ("run", "tiny", "--profile", "smoke", "--device", "cpu", "--engine", "process")
Before = Callable[[], object]


class Said(NamedTuple):
    status: int
    out: str
    err: str


class Begun:
    """A command at work, or a function of a module that takes the command's place."""

    def __init__(
        self, *arguments: str, home: Path, before: Sequence[Before] = (), call: Callable[[list[str]], int] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.answer, theirs = context.Pipe(duplex=False)
        self.process: ForkServerProcess = context.Process(target=_call, args=(theirs, arguments, home, before, call))
        old = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update(ONE_THREAD)  # seen by the server, which begins with the first of these
        try:
            self.process.start()
        finally:
            for name, value in old.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def wait(self, seconds: float | None = 120) -> Said | None:
        """How it ended, of a killed one the signal alone; None: it is not done yet."""
        if not self.answer.poll(seconds):
            return None
        with contextlib.suppress(EOFError):
            said = Said(*self.answer.recv())
            self.process.join()
            return said
        self.process.join()
        return Said(self.process.exitcode or 0, "", "")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Begun:
        return self

    def __exit__(self, *error: object) -> None:
        """Whatever happened, it is not waited for at the end of all tests."""
        self.kill()


def called(*arguments: str, home: Path, before: Sequence[Before] = ()) -> Said:
    said = Begun(*arguments, home=home, before=before).wait()
    assert said is not None
    return said


def _call(
    answer: Connection,
    arguments: tuple[str, ...],
    home: Path,
    before: Sequence[Before],
    call: Callable[[list[str]], int] | None,
) -> None:
    os.setsid()
    os.environ["FEDLIB_HOME"] = str(home)
    from fedlib.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            for prepare in before:
                prepare()
            status = (call or main)(list(arguments))
        except BaseException:
            traceback.print_exc()
            status = 1
    answer.send((status, out.getvalue(), err.getvalue()))


# What may be done before a command begins


def save_often() -> None:
    """Checkpoints after every round."""
    from fedlib.runs import rounds

    assert rounds.run.__kwdefaults__ is not None
    rounds.run.__kwdefaults__["save_every"] = 0.0


def save_never() -> None:
    """No checkpoint, however long it takes."""
    from fedlib.runs import rounds

    assert rounds.run.__kwdefaults__ is not None
    rounds.run.__kwdefaults__["save_every"] = math.inf


def fill_disk(size: int) -> None:
    """No file grows past so many bytes: writing more fails like on a full disk (Python ignores SIGXFSZ)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """The same for this process, and for a while."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill_disk(size)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def give_up_rights() -> None:
    """Root without its capabilities is held to permissions as others are."""
    if sys.platform == "linux" and not os.geteuid():
        ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # version 3, this process; none at all


def die_when_done() -> None:
    """SIGKILL between the end of a write and the change of the file's name."""
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


# What may be done after one was killed


def age(root: Path) -> list[Path]:
    """What it left in the middle of a write, made two hours old: the next start sweeps it."""
    left = [path for path in root.rglob("*") if path.name.startswith((".", "fetch-")) and path.name != ".cache"]
    for path in (inner for each in left for inner in (each, *each.rglob("*"))):
        os.utime(path, (time.time() - 7200,) * 2)
    return left
