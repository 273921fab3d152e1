"""What killed commands left in a project, and its removal."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from fedlib.data import sets
from fedlib.runs import record
from fedlib.runs.experiments import papers

# Folders below the project's root in which a write that was killed may have left something.
WRITTEN = (
    *("records", "scores", "book/papers", "book/compare", "experiments", "published", "bench/results"),
    *(".cache/checkpoints", ".cache/proofs", ".cache/shares"),
)


def sweep(root: Path) -> None:
    """Remove what killed commands left. A fetch that lives changes a file within minutes, or gives its server up."""
    for folder in WRITTEN:
        record.sweep(root / folder)
    if not papers():  # whose .cache this is, nobody knows
        return
    files = (root / entry.folder / path for entry in sets.ENTRIES.values() for path, _ in entry.files)
    parts = (left for file in files for left in file.parent.glob(f".{file.name}.*.part"))
    for left in (*(root / ".cache").glob("fetch-????????"), *parts):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (left, *left.rglob("*")))
            if abs(time.time() - newest) > 3600:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
