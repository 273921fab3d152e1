"""What an unfinished run goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, get_args, get_type_hints

import safetensors.torch
import torch

from fedlib.core.method import AnyMethod, ServerState, split_tensors
from fedlib.core.plan import Tensors
from fedlib.data import sets
from fedlib.data.sources import home
from fedlib.runs.digest import code_of
from fedlib.runs.record import write
from fedlib.runs.spec import Spec

LAYOUT = 3  # of the file; to be raised with it, since the digest leaves this module out
DIGEST = 32  # bytes, of SHA-256, that follow the tensors
log = logging.getLogger("fedlib")
Saved = tuple[ServerState[Any], dict[int, bytes], dict[str, Any]]


class Checkpoint:
    """The state between two rounds, in one file that is replaced as a whole."""

    def __init__(self, spec: Spec, root: Path | None = None) -> None:
        self.file = (root or home()) / ".cache" / "checkpoints" / spec.paper / spec.profile / f"{spec.name}.safetensors"
        # What a half-finished run must agree in to be continued.
        identity = (LAYOUT, spec.key(), code_of(spec), sets.digest(spec.data), torch.__version__)
        self.key = hashlib.sha256(repr(identity).encode()).hexdigest()

    def load(self, method: AnyMethod) -> Saved | None:
        """State, clients' memories and log of the last round that was saved for this very run, if any.

        A file that was changed since is not believed: one line says so, and the run starts from the beginning.
        """
        try:
            content = self.file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s): starting from the beginning", self.file, error.strerror)
            return None
        if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
            log.warning("%s does not fit its digest: ignored, starting from the beginning", self.file)
            return None
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        if metadata["key"] != self.key:
            return None
        tensors = safetensors.torch.load(content[:-DIGEST])
        memories = {int(name): tensor.numpy().tobytes() for name, tensor in take(tensors, "memory/").items()}
        model = {name: tensors[f"model/{name}"] for name in json.loads(metadata["model"])}
        own = revive(method.own_type, json.loads(metadata["own"]), take(tensors, "own/"))
        return ServerState(model, own), memories, json.loads(metadata["log"])

    def save(self, state: ServerState[Any], memories: dict[int, bytes], log: dict[str, Any]) -> None:
        tensors = {f"model/{name}": tensor for name, tensor in state.model.items()}
        own = split_tensors(state.own, tensors, "own/")
        for client, memory in memories.items():
            tensors[f"memory/{client}"] = torch.frombuffer(bytearray(memory), dtype=torch.uint8)
        metadata = {
            "key": self.key,
            "model": json.dumps(list(state.model)),
            "own": json.dumps(own),
            "log": json.dumps(log),
        }
        content = safetensors.torch.save(tensors, metadata)
        write(self.file, content + hashlib.sha256(content).digest())

    def remove(self) -> None:
        """Of a run whose record is saved: a file that stays is in nobody's way."""
        try:
            self.file.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            log.warning("%s cannot be removed (%s); nothing needs it any more", self.file, error.strerror)


def take(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def revive(kind: Any, value: Any, tensors: Tensors, path: str = "") -> Any:
    """The inverse, as a dataclass of this kind, or as it is; lists have become tuples."""
    if path in tensors:
        return tensors[path]
    if not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else value
    made: Any = next((choice for choice in (kind, *get_args(kind)) if dataclasses.is_dataclass(choice)), None)
    if made is None:
        return {name: revive(None, inner, tensors, f"{path}/{name}") for name, inner in value.items()}
    kinds = get_type_hints(made)
    return made(**{name: revive(kinds[name], inner, tensors, f"{path}/{name}") for name, inner in value.items()})
