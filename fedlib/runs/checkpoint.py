"""What an unfinished run goes on from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fedlib.core.plan import State
from fedlib.data import sets
from fedlib.data.sources import home
from fedlib.runs.digest import code_of
from fedlib.runs.record import write
from fedlib.runs.spec import Spec


class Checkpoint:
    """The state between two rounds, in one file that is replaced as a whole."""

    def __init__(self, spec: Spec, root: Path | None = None) -> None:
        self.file = (root or home()) / ".cache" / "checkpoints" / spec.paper / spec.profile / f"{spec.name}.safetensors"
        # What a half-finished run must agree in to be continued.
        identity = (spec.key(), code_of(spec), sets.digest(spec.data), torch.__version__)
        self.key = hashlib.sha256(repr(identity).encode()).hexdigest()

    def load(self) -> tuple[State, dict[int, bytes], dict[str, Any]] | None:
        """State, clients' memories and log of the last round that was saved for this very run, if any."""
        try:
            with safetensors.safe_open(self.file, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                names, log = json.loads(metadata["state"]), json.loads(metadata["log"])
                memories = {int(name): file.get_tensor(name).numpy().tobytes() for name in {*file.keys()} - {*names}}
                return {name: file.get_tensor(name) for name in names}, memories, log
        except (FileNotFoundError, safetensors.SafetensorError):
            return None

    def save(self, state: State, memories: dict[int, bytes], log: dict[str, Any]) -> None:
        kept = {str(client): torch.frombuffer(bytearray(m), dtype=torch.uint8) for client, m in memories.items()}
        metadata = {"key": self.key, "state": json.dumps(list(state)), "log": json.dumps(log)}
        write(self.file, safetensors.torch.save(state | kept, metadata))

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
