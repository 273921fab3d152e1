"""Runs of FedDQ step by step, and what its messages say, read without the library."""

import struct
from typing import Any, NamedTuple

import numpy as np
import torch

from fedlib.core.client import EVERYONE, Job
from fedlib.core.method import ServerState
from fedlib.engines.in_process import InProcess
from fedlib.methods.feddq.method import Course, FedDQ
from fedlib.runs import build, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

ENGINE = InProcess(torch.device("cpu"))


class Run(NamedTuple):
    """A run before its first round."""

    spec: Spec
    job: Job
    state: ServerState[Course]

    @property
    def method(self) -> FedDQ:
        assert isinstance(self.job.method, FedDQ)
        return self.job.method

    @property
    def message(self) -> bytes:
        return rounds.broadcast(self.method, self.state, 1)

    def uploads(self, message: bytes, round: int, clients: list[int]) -> list[bytes]:
        message = container.address(message, round, EVERYONE)
        found = [upload for _, upload in ENGINE.train(self.job, message, round, clients)]
        assert all(isinstance(upload, bytes) for upload in found)
        return found  # type: ignore[return-value]

    def one_round(
        self, state: ServerState[Course], number: int, parts: dict[str, int] | None = None
    ) -> tuple[ServerState[Course], dict[str, Any]]:
        return rounds.one_round(self.spec, self.job, ENGINE, state, number, {} if parts is None else parts)


def begin(spec: Spec) -> Run:
    job = build.job(spec, ENGINE.device)
    return Run(spec, job, rounds.initial(job))


def sections(message: bytes) -> list[bytes]:
    sizes = container.section_sizes(message)
    ends = np.cumsum(sizes) + len(message) - 4 - sum(sizes)
    return [message[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]


def headers(message: bytes) -> list[tuple[int, float, float]]:
    """Width, lowest entry and step of each tensor."""
    return list(struct.iter_unpack("<Bff", sections(message)[0]))


def meant(message: bytes, shapes: dict[str, torch.Size]) -> dict[str, np.ndarray]:
    """An affine, packed upload's update in float64, read bit by bit."""
    body, found, start = sections(message)[1], {}, 0
    for (name, shape), (width, low, step) in zip(shapes.items(), headers(message), strict=True):
        n, k = shape.numel(), np.zeros(shape.numel())
        for shift, w in ((0, min(width, 8)), (8, width - 8)):
            if w > 0:
                size = -(-n * w // 8)
                run = np.unpackbits(np.frombuffer(body[start : start + size], np.uint8), count=n * w, bitorder="little")
                k += (run.reshape(n, w) @ (1 << np.arange(w))) * 2.0**shift
                start += size
        found[name] = (low + k * step).reshape(shape)
    assert start == len(body)
    return found
