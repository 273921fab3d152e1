"""Where a benchmark's numbers go: bench/results/<name>.json, with the machine and the versions that made them."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from fedlib.runs.machine import processor
from fedlib.runs.record import write


def save(name: str, measured: dict[str, Any], packages: tuple[str, ...] = ("torch", "numpy")) -> None:
    versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}
    content = {"cpu": processor(), "versions": versions} | measured
    target = Path(__file__).parent / "results" / f"{name}.json"
    write(target, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    print(f"kept in bench/results/{target.name}")
