"""A partition as a file that other simulators can read: a list of places for each client, as JSON or NPZ."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlib.data import partition
from fedlib.errors import DataError, SpecError, require_name
from fedlib.runs.record import write


def deal(labels: Any, clients: int, kind: str = "iid", seed: int = 0, **parameters: Any) -> list[np.ndarray]:
    """Places of each client's samples, int64, dealt as a run with this partition deals them.

    labels: integers [n]. kind, parameters: one of `fedlib.data.partition.KINDS`, such as dirichlet with beta.
    """
    require_name("kind", kind, partition.KINDS)
    try:
        dealt = partition.make(np.asarray(labels), clients, kind, seed, **parameters)
    except TypeError as error:
        takes = ", ".join(partition.PARAMETERS[kind]) or "no parameter"
        raise SpecError(f"kind: {kind} takes {takes}, and was given {', '.join(parameters) or 'none'}") from error
    return [dealt.indices(client) for client in range(clients)]


def write_partition(path: str | Path, shards: Sequence[Any]) -> None:
    """JSON: a list of lists, client by client; NPZ: an array a client, named by its number. By the file's ending."""
    file, lists = Path(path), [np.asarray(shard).astype(np.int64) for shard in shards]
    if _ending(file) == ".json":
        content = (json.dumps([shard.tolist() for shard in lists]) + "\n").encode()
    else:
        named: dict[str, Any] = {str(client): shard for client, shard in enumerate(lists)}
        np.savez_compressed(packed := io.BytesIO(), **named)
        content = packed.getvalue()
    write(file, content)


def read_partition(path: str | Path) -> list[np.ndarray]:
    """Places of each client's samples, int64. DataError: no such file, or another content."""
    file = Path(path)
    try:
        if _ending(file) == ".json":
            found = json.loads(file.read_text(encoding="utf-8"))
            shards = [np.asarray(shard) for shard in found]
        else:
            with np.load(file, allow_pickle=False) as held:
                shards = [held[str(client)] for client in range(len(held.files))]
        if not all(shard.ndim == 1 and shard.dtype.kind in "iu" and len(shard) for shard in shards):
            raise ValueError("a client's places are no list of integers")
        return [shard.astype(np.int64) for shard in shards]
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{file}: no partition ({why}); write one by write_partition") from error


def _ending(file: Path) -> str:
    if file.suffix not in (".json", ".npz"):
        raise SpecError(f"path: {file.name} must end in .json or .npz")
    return file.suffix
