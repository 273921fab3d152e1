"""What several test files do with a run: its job, its first message, the repeatable part of its record, a break."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from fedlib.core.client import Job, Memories, Upload
from fedlib.engines.in_process import Engine, InProcess
from fedlib.runs import build, record, rounds
from fedlib.runs.spec import Spec

CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]


def job_of(spec: Spec, where: torch.device = CPU) -> Job:
    return build.job(spec, where)


def message_of(job: Job, round: int = 1) -> bytes:
    """The broadcast of the model that runs begin with, as that of a round."""
    return rounds.broadcast(job.method, rounds.initial(job), round)


def ran(spec: Spec, root: Path, engine: Engine | None = None) -> dict[str, Any]:
    """What another run of the spec would give too. The engine stays open."""
    return record.stable(rounds.run(spec, engine or InProcess(CPU), root=root))


class Stopping(InProcess):
    """The reference engine; it notes the rounds that it is asked for, and loses power in one of them."""

    def __init__(self, at: int = 0) -> None:
        super().__init__(CPU)
        self.at = at
        self.asked: list[int] = []

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        self.asked.append(round)
        if round == self.at:
            raise InterruptedError
        return super().train(job, message, round, cohort, memories)
