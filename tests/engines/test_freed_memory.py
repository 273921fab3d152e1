"""What a step gives back is not asked of the system again: page faults of steps after the first, with and without."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from fedlib.engines import freed_memory
assert sys.argv[1] == "as it is" or freed_memory.keep()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step(): return torch.ones(10 << 20).sum()  # larger than what glibc learns to keep by itself
for _ in range(10): step()
before = count()
for _ in range(10): step()
print(count() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_steps_after_the_first_ask_for_no_memory() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("as it is", "kept")
    }
    if faults["as it is"] < 1000:
        pytest.skip("this system gives memory in large pages")
    assert faults["kept"] < faults["as it is"] / 3, faults
