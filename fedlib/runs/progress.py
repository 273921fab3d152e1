"""One progress line a run, with accuracy and bytes so far; nothing where standard error is not a terminal.

Runs side by side (fedlib.runs.grid) show none: their parent tells when each is done.
"""

from __future__ import annotations

import multiprocessing
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fedlib.runs.spec import Spec


class Bar:
    def __init__(self, spec: Spec, done: list[dict[str, Any]]) -> None:
        self.line: tqdm[Any] | None = None
        if multiprocessing.parent_process() is None:
            self.line = tqdm(
                total=spec.rounds, initial=len(done), desc=spec.name, unit="round", disable=None, leave=False
            )
        self.bytes = sum(entry["uplink_bytes"] for entry in done)

    def show(self, entry: dict[str, Any]) -> None:
        self.bytes += entry["uplink_bytes"]
        if self.line is None:
            return
        if entry["accuracy"] is not None:
            self.line.set_postfix_str(f"accuracy {entry['accuracy']:.1%}, uplink {self.bytes / 1e6:.1f} MB")
        self.line.update()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.line is not None:
            self.line.close()
