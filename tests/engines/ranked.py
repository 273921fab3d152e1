"""For torchrun: `ranked.py FOLDER CASE...` makes known answers by ranks, and rank 0 keeps the numbers."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from known_answers import CASES, TINY, numbers
from typing_extensions import override

from fedlib.core.client import Job, Memories, Upload
from fedlib.data import sets
from fedlib.engines.ranks import Ranks
from fedlib.errors import RunError
from fedlib.runs import rounds
from fedlib.runs.spec import Spec

MORTAL, BARE = "--mortal", "--bare"  # rank 1 dies in the second round, or knows no data set


class Watched(Ranks):
    @override
    def train(
        self, job: Job, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        if round == 2:
            (folder / "second round").touch()
        return super().train(job, message, round, cohort, memories)

    @override
    def _own(self, *given: Any) -> list[Any]:
        if MORTAL in sys.argv and self.rank and (folder / "second round").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._own(*given)


folder, names = Path(sys.argv[1]), [name for name in sys.argv[2:] if not name.startswith("--")]
with Watched(torch.device("cpu")) as engine:
    if engine.rank:
        if BARE in sys.argv:
            sets.ENTRIES.clear()
        engine.serve()
    else:
        for name in names:
            try:
                made = rounds.run(Spec.from_dict(TINY | CASES[name]), engine, root=folder, save_every=0)
                (folder / f"{name}.json").write_text(json.dumps(numbers(made)))
            except RunError as error:
                (folder / "error").write_text(str(error))
                raise SystemExit(2) from None
