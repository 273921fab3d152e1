"""What an unfinished run goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
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
        memories = {int(name): tensor.numpy().tobytes() for name, tensor in taken(tensors, "memory/").items()}
        model = {name: tensors[f"model/{name}"] for name in json.loads(metadata["model"])}
        return ServerState(model, revived(method.own_type, own, taken(tensors, "own/"))), memories, log

    def save(self, state: ServerState[Any], memories: dict[int, bytes], log: dict[str, Any]) -> None:
        tensors = {f"model/{name}": tensor for name, tensor in state.model.items()}
        tensors |= {f"own/{name}": tensor for name, tensor in tensors_in(state.own)}
        for client, memory in memories.items():
            tensors[f"memory/{client}"] = torch.frombuffer(bytearray(memory), dtype=torch.uint8)
        metadata = {
            "key": self.key,
            "model": json.dumps(list(state.model)),
            "own": json.dumps(plain(state.own)),
            "log": json.dumps(log),
        }
        write(self.file, safetensors.torch.save(tensors, metadata))

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def taken(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors within a dataclass, its dataclasses and its dicts, with their places."""
    if isinstance(value, Tensor):
        yield path, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), f"{path}/{field.name}")
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from tensors_in(inner, f"{path}/{name}")


def plain(value: Any) -> Any:
    """All but the tensors, as JSON has it."""
    if isinstance(value, Tensor):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {name: plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def revived(kind: Any, value: Any, tensors: Tensors, path: str = "") -> Any:
    """The inverse of both, as a dataclass of this kind, or as it is; lists have become tuples."""
    if path in tensors:
        return tensors[path]
    if not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else value
    made: Any = next((one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one)), None)
    if made is None:
        return {name: revived(None, inner, tensors, f"{path}/{name}") for name, inner in value.items()}
    kinds = get_type_hints(made)
    return made(**{name: revived(kinds[name], inner, tensors, f"{path}/{name}") for name, inner in value.items()})
