"""What an unfinished run goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedlib.core.method import AnyMethod, ServerState
from fedlib.core.plan import Tensors
from fedlib.data import sets
from fedlib.data.sources import home
from fedlib.runs.digest import code_of
from fedlib.runs.record import write
from fedlib.runs.spec import Spec

LAYOUT = 2  # of the file; to be raised with it, since the digest leaves this module out
Saved = tuple[ServerState[Any], dict[int, bytes], dict[str, Any]]


class Checkpoint:
    """The state between two rounds, in one file that is replaced as a whole."""

    def __init__(self, spec: Spec, root: Path | None = None) -> None:
        self.file = (root or home()) / ".cache" / "checkpoints" / spec.paper / spec.profile / f"{spec.name}.safetensors"
        # What a half-finished run must agree in to be continued.
        identity = (LAYOUT, spec.key(), code_of(spec), sets.digest(spec.data), torch.__version__)
        self.key = hashlib.sha256(repr(identity).encode()).hexdigest()

    def load(self, method: AnyMethod) -> Saved | None:
        """State, clients' memories and log of the last round that was saved for this very run, if any."""
        try:
            with safetensors.safe_open(self.file, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key or not {"model", "own", "log"} <= metadata.keys():
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, safetensors.SafetensorError):
            return None
        own, log = json.loads(metadata["own"]), json.loads(metadata["log"])
        memories = {int(name): tensor.numpy().tobytes() for name, tensor in take(tensors, "memory/").items()}
        model = {name: tensors[f"model/{name}"] for name in json.loads(metadata["model"])}
        return ServerState(model, revive(method.own_type, own, take(tensors, "own/"))), memories, log

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
        write(self.file, safetensors.torch.save(tensors, metadata))

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def take(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def split_tensors(value: Any, tensors: Tensors, path: str) -> Any:
    """As JSON has it, but for the tensors within dataclasses and dicts: these go to `tensors`, each under its place."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: split_tensors(inner, tensors, f"{path}/{name}") for name, inner in value.items()}
    return value


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
