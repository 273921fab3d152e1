"""One cohort over several processes, GPUs or machines that `torchrun` has started: rank 0 is the server, and all train.

    torchrun --nproc-per-node 8 -m fedlib run fedmrn --engine ranks

Each rank trains its part of a cohort in process, on the GPU of its own number where there are GPUs. What passes between
them are the messages that would pass anyway, as bytes in host memory (gloo). The server reads uploads in the cohort's
order, so that on a CPU records are those of one process to the byte.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from fedlib.core import client
from fedlib.core.client import Job, Memories, Upload
from fedlib.core.plan import Tensors
from fedlib.engines import cuda_device
from fedlib.engines.in_process import Engine, InProcess, mean, memory_of
from fedlib.errors import RunError

LONGEST = datetime.timedelta(days=7)  # that a rank waits for its next job
END = None


class Ranks(Engine):
    """Rank 0 gives jobs, as any engine does; the others `serve` until it is closed."""

    def __init__(self, where: torch.device) -> None:
        if not dist.is_available() or not dist.is_torchelastic_launched():
            raise RunError("engine: ranks are started by torchrun: torchrun --nproc-per-node 2 -m fedlib run ...")
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if where.type == "cuda":
            cuda_device.prepare(where)
        dist.init_process_group("gloo", timeout=LONGEST)
        self.device, self.local = where, InProcess(where)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.job: Job | None = None

    @property
    @override
    def name(self) -> str:
        return f"Ranks: {self.count} x {type(self.local).__name__}"

    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        self.job = job
        jobs = [(round, number, memory_of(memories, number)) for number in cohort]
        yield from zip(cohort, self._map(train, message, jobs), strict=True)

    @override
    def evaluate(self, job: Job, model: Tensors) -> tuple[float, ...]:
        self.job = job
        held = {name: tensor.cpu().numpy() for name, tensor in model.items()}
        return mean(self._map(evaluate, held, [(index,) for index in client.chunks(job.task)]))

    def _map(self, work: Callable[..., Any], shared: Any, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Results in the order of the jobs."""
        assert self.job is not None
        try:
            dist.broadcast_object_list([(work, self.job.rebuild, self.job.key, shared, jobs)])
            parts: list[list[Any]] = [[] for _ in range(self.count)]
            dist.gather_object(self._own(work, shared, jobs), parts)
        except (RuntimeError, EOFError) as error:
            self.count = 0
            raise RunError(
                f"a rank died, or its machine is gone ({str(error).splitlines()[0]:.100}); what was recorded is kept, "
                "and the same command goes on from the last checkpoint"
            ) from error
        for part in parts:
            for result in part:
                if isinstance(result, Failed):
                    raise RunError(f"a rank failed: {result.why}")
        return [parts[index % self.count][index // self.count] for index in range(len(jobs))]

    def _own(self, work: Callable[..., Any], shared: Any, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Results of this rank's jobs."""
        try:
            return [work(self.local, self.job, shared, *each) for each in jobs[self.rank :: self.count]]
        except Exception as error:  # told to rank 0, which ends all
            return [Failed(f"{type(error).__name__}: {error}"[:300])]

    def serve(self) -> None:
        """Of all ranks but the first: do one job after the other, until rank 0 has closed."""
        torch.set_num_threads(1 if self.device.type == "cpu" else torch.get_num_threads())
        while True:
            given: list[Any] = [END]
            try:
                dist.broadcast_object_list(given)
                if given[0] is END:
                    return
                work, rebuild, key, shared, jobs = given[0]
                if self.job is None or self.job.key != key:
                    self.job = rebuild(key, self.device)
                dist.gather_object(self._own(work, shared, jobs))
            except RuntimeError as error:
                self.count = 0
                raise RunError(f"rank {self.rank}: rank 0 is gone ({str(error).splitlines()[0]:.100})") from error

    @override
    def close(self) -> None:
        if self.count and dist.is_initialized():
            if not self.rank:
                dist.broadcast_object_list([END])
            dist.destroy_process_group()


class Failed:
    """Why a rank could not do its jobs."""

    def __init__(self, why: str) -> None:
        self.why = why


def train(local: InProcess, job: Job, message: bytes, *rest: Any) -> Upload:
    return local.client(job, message, *rest)


def evaluate(local: InProcess, job: Job, model: dict[str, Any], index: int) -> tuple[list[float], int]:
    held = {name: torch.from_numpy(array).to(local.device) for name, array in model.items()}
    return client.evaluate(job.task, held, index)
