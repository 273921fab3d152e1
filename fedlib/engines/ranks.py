"""One cohort over several processes, GPUs or machines that `torchrun` has started: rank 0 is the server, and all train.

    torchrun --nproc-per-node 8 -m fedlib run fedmrn --engine ranks

Each rank trains its part of a cohort, one client after the other, on the GPU of its own number where there are GPUs.
What passes between ranks are the messages that would pass anyway, as bytes in host memory (gloo). The server reads
uploads in the cohort's order, so that on a CPU records are those of one process to the byte; it holds a whole cohort's.
"""

from __future__ import annotations

import datetime
import logging
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

LONGEST = datetime.timedelta(days=1)  # that a rank waits for another; a connection that closes ends it at once
END = None
log = logging.getLogger("fedlib")


class Ranks(Engine):
    """Rank 0 gives jobs, as any engine does; the others `serve` until it is closed."""

    def __init__(self, where: torch.device) -> None:
        if not dist.is_available() or not dist.is_torchelastic_launched():
            raise RunError("engine: ranks are started by torchrun: torchrun --nproc-per-node 2 -m fedlib run ...")
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if where.type == "cuda":
            cuda_device.prepare(where)
        try:
            dist.init_process_group("gloo", timeout=LONGEST)
        except (RuntimeError, ValueError) as error:
            raise RunError(f"engine: the ranks do not find each other ({_first_line(error)})") from error
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
        if not self.count:
            raise RunError("the ranks are gone; call the command again")
        count, parts = self.count, [list[Any]() for _ in range(self.count)]
        self.count = 0  # until the others have answered: what comes in between leaves them waiting for something else
        try:
            given = work, self.job.rebuild, self.job.key, shared
            dist.broadcast_object_list([(*given, jobs)])
            dist.gather_object(self._own(*given, jobs[::count]), parts)
        except (RuntimeError, EOFError) as error:
            raise RunError(
                f"a rank died, or its machine is gone ({_first_line(error)}); what was recorded is kept, and the same "
                "command goes on from the last checkpoint"
            ) from error
        self.count = count
        for rank, part in enumerate(parts):
            if part and isinstance(part[-1], Failed):
                raise RunError(f"rank {rank} failed: {part[-1].why}")
        return [parts[index % count][index // count] for index in range(len(jobs))]

    def _own(self, work: Callable[..., Any], rebuild: Any, key: str, shared: Any, jobs: Sequence[Any]) -> list[Any]:
        """Results of this rank's jobs; the last one says so if it could not do them."""
        results: list[Any] = []
        try:
            if self.job is None or self.job.key != key:
                self.job = rebuild(key, self.device)
            for each in jobs:
                results.append(work(self.local, self.job, shared, *each))
        except Exception as error:  # told to rank 0, which ends all
            log.debug("rank %d", self.rank, exc_info=True)
            results.append(Failed(f"{type(error).__name__}: {error}"[:300]))
        return results

    def serve(self) -> None:
        """Of all ranks but the first: do one job after the other, until rank 0 has closed."""
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            while (given := self._received()) is not END:
                dist.gather_object(self._own(*given))
            dist.barrier()
        except (RuntimeError, EOFError) as error:
            self.count = 0
            raise RunError(f"rank {self.rank}: rank 0 is gone ({_first_line(error)})") from error

    def _received(self) -> Any:
        given: list[Any] = [END]
        dist.broadcast_object_list(given)
        if given[0] is END:
            return END
        *rest, jobs = given[0]
        return *rest, jobs[self.rank :: self.count]

    @override
    def close(self) -> None:
        if self.count and dist.is_initialized():
            if not self.rank:
                dist.broadcast_object_list([END])
                dist.barrier()  # so that nobody leaves before all have read it
            dist.destroy_process_group()


class Failed:
    """Why a rank could not do its jobs."""

    def __init__(self, why: str) -> None:
        self.why = why


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def train(local: InProcess, job: Job, message: bytes, *rest: Any) -> Upload:
    return local.client(job, message, *rest)


def evaluate(local: InProcess, job: Job, model: dict[str, Any], index: int) -> tuple[list[float], int]:
    held = {name: torch.from_numpy(array).to(local.device) for name, array in model.items()}
    return client.evaluate(job.task, held, index)
