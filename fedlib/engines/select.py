"""Where clients run. A client is a function from bytes to bytes, so no method knows; all engines give the same record.

    InProcess  one client after the other in this process: the reference (fedlib.engines.in_process)
    Pool       worker processes of one thread each: fastest on a CPU (fedlib.engines.pool)
    Graphed    for a GPU: one client after the other, a whole local step in one launch (fedlib.engines.cuda_graph)
    Stacked    for a GPU: the clients of a round side by side (fedlib.engines.vmapped)
    Auto       on a CPU: starts in process, measures the first round, and takes the pool when it pays
    Ranks      processes that torchrun has started, on one machine or several (fedlib.engines.ranks)
    Flower     nodes on any machines, which train their own clients or any (fedlib.engines.flower)
    Fastest    on a GPU: tries in process, graphed and stacked in the first rounds, and keeps the fastest

On a CPU every client trains with one thread, in whichever engine, so that sums are formed in the same order. Only
Stacked sums in another order, and agrees within rounding, as all engines do on a GPU.
"""

from __future__ import annotations

import os
import sys

import torch

from fedlib.engines import cuda_device, freed_memory
from fedlib.engines.automatic import Auto, Fastest
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import Engine, InProcess
from fedlib.engines.pool import Pool
from fedlib.engines.ranks import Ranks
from fedlib.engines.vmapped import Stacked
from fedlib.errors import RunError

ENGINES = ("auto", "process", "pool", "stacked", "graphed", "ranks", "flower")  # as the command line names them


def device(name: str = "auto") -> torch.device:
    """`auto` is the GPU where there is one. RunError at once when CUDA is asked for and absent."""
    kind, _, index = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise RunError(f"device: {name!r} is unknown; allowed: auto, cpu, cuda, or one of several, such as cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RunError(f"device: {name} was asked for, but torch finds no CUDA device; use --device cpu or auto")
    if index:
        if int(index) >= (found := torch.cuda.device_count()):
            raise RunError(f"device: {name} is not there; torch finds {found}, from cuda:0 to cuda:{found - 1}")
        return torch.device("cuda", int(index))
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def check(name: str = "auto", on: str = "auto", processes: int | None = None) -> torch.device:
    """The device of such an engine. RunError where it cannot be opened."""
    where = device(on)
    if name not in ENGINES:
        raise RunError(f"engine: {name!r} is unknown; allowed: {', '.join(ENGINES)}")
    if processes is not None and processes < 1:
        raise RunError(f"processes: {processes} must be at least 1")
    if name == "pool" and where.type == "cuda":
        raise RunError("engine: pool runs on the CPU only; use --engine process or --device cpu")
    return where


def open_engine(name: str = "auto", on: str = "auto", processes: int | None = None) -> Engine:
    """One of ENGINES; use it as a context manager. `stacked` and `graphed` work on a CPU too, and gain little there."""
    where = check(name, on, processes)
    if name == "flower":
        raise RunError("engine: flower is for python -m fedlib run, which is told of its nodes")
    if name == "ranks":
        return Ranks(where)
    if where.type == "cuda":
        cuda_device.prepare(where)
    else:
        freed_memory.keep()
    if name == "pool":
        return Pool(processes or cores())
    if name == "stacked":
        return Stacked(where)
    if name == "graphed":
        return Graphed(where)
    if name == "auto" and where.type == "cuda":
        return Fastest([InProcess(where), Graphed(where), Stacked(where)])
    if name == "auto" and cores() > 1:
        return Auto(processes or cores())
    return InProcess(where)
