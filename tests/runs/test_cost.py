"""Memory and work of a run do not grow with the clients that exist."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from common import ROOT
from jobs import MakeSpec, ran

from fedlib.runs.spec import Spec


def crowd(tiny: MakeSpec, clients: int, rounds: int) -> Spec:
    return tiny(clients=clients, partition={"kind": "resampled", "size": 40, "seed": 1}, cohort=5, rounds=rounds)


def test_memory_and_work_do_not_grow_with_the_population(tiny: MakeSpec, tmp_path: Path) -> None:
    def cost(clients: int) -> tuple[int, int]:
        """Peak of Python's and numpy's memory in bytes, and how many Python functions were called in the rounds."""
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        tracemalloc.start()
        sys.setprofile(count)
        try:
            ran(crowd(tiny, clients, rounds=2), tmp_path)
        finally:
            sys.setprofile(None)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return peak, calls

    ran(crowd(tiny, 100, rounds=2), tmp_path)  # caches and late imports
    (peak, calls), (large_peak, large_calls) = cost(100), cost(100_000)
    # One byte a client would be 100 kB; a list of them 800 kB.
    assert large_peak - peak < 90_000
    assert abs(large_calls - calls) < 0.02 * calls


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_process_with_a_hundred_thousand_clients_is_no_larger(tiny: MakeSpec, tmp_path: Path) -> None:
    program = """
import json, resource, sys, torch
from pathlib import Path
from fedlib.engines.in_process import InProcess
from fedlib.runs import rounds
from fedlib.runs.spec import Spec
rounds.run(Spec.from_dict(json.loads(sys.argv[1])), InProcess(torch.device("cpu")), root=Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    sizes = []
    for clients in (100, 100_000):
        spec = crowd(tiny, clients, rounds=3)
        command = [sys.executable, "-c", program, spec.key(), str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
        sizes.append(int(done.stdout))
    assert sizes[1] - sizes[0] < 30_000  # kB, of some 500,000: room for the allocator's whims
