"""Where and when a record was made: devices, versions and commit."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fedlib.engines import cuda_device
from fedlib.runs.digest import PACKAGE

PACKAGES = ("torch", "torchvision", "numpy", "constriction", "safetensors")


def joined(before: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """What has computed so far, in its order, and now goes on: a name; of a GPU also what its numbers hang on."""
    now: dict[str, Any] = {"name": f"cpu ({processor()})"}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        now = {"name": card.name, "memory": card.total_memory, "driver": _driver(), "cuda": torch.version.cuda}
        now |= {"cudnn": torch.backends.cudnn.version(), "precision": cuda_device.precision()}
    return before if before[-1:] == [now] else [*before, now]


def made(devices: list[dict[str, Any]], engine: str, seconds: float) -> dict[str, Any]:
    """Where and when: the part of a record that another run of the same spec does not share."""
    gpus = [device for device in devices if len(device) > 1]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "device": ", then ".join(name for name, _ in itertools.groupby(device["name"] for device in devices)),
        **({"gpus": gpus} if gpus else {}),
        "engine": engine,
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }


def version(package: str) -> str:
    """That is installed; "absent" where it is not."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "absent"


def _driver() -> str:
    """Of the GPU: torch does not tell it."""
    with contextlib.suppress(OSError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
        if not done.returncode and done.stdout.strip():
            return done.stdout.split()[0]
    return "unknown"


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, with a plus sign when tracked files differ from it; of another repository around: none."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    with contextlib.suppress(OSError):
        if Path(git("rev-parse", "--show-toplevel") or "/").resolve() == PACKAGE.parent:
            return (git("rev-parse", "--verify", "-q", "HEAD") or "unknown") + (
                "+" if git("status", "--porcelain", "-uno") else ""
            )
    return "unknown"
