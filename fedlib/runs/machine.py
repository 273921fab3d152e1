"""Where and when a record was made: device, versions and commit."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fedlib.runs.digest import PACKAGE

PACKAGES = ("torch", "torchvision", "numpy", "constriction", "safetensors")


def made(device: torch.device, engine: str, seconds: float) -> dict[str, Any]:
    """Where and when: the part of a record that another run of the same spec does not share."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({processor()})",
        "engine": engine,
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
    }


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "absent"


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
