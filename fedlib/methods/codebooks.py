"""A model as a message: clustered tensors by codebook and indexes, the others as float32, and a report beside them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlib.errors import SpecError
from fedlib.methods.parts import Shapes, pack_tensors, unpack_tensors
from fedlib.task import State, Task, count
from fedlib.uploads import Buffer
from fedlib.wire import codebook, container

SECTIONS = ("codebooks", "indexes", "full precision", "report")


def kernels(task: Task, most: int) -> dict[str, torch.Size]:
    """Kernels of convolutions over all channels, with more than `most` weights. SpecError where there is none."""
    found = _kernels(task.network, most)
    if not found:
        raise SpecError(f"model: has no convolution of more than {most} weights; take one that has, or no clusters")
    return found


@functools.lru_cache(maxsize=8)
def _kernels(network: nn.Module, most: int) -> dict[str, torch.Size]:
    layers = {f"{name}.weight": m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    shapes = {name: layer.weight.shape for name, layer in layers.items() if layer.groups == 1}
    return {name: shape for name, shape in shapes.items() if shape.numel() > most}


def pack(
    kind: str, state: Mapping[str, Tensor], coded: Shapes, samples: int, report: bytes, hyper: Any, task: Task
) -> bytes:
    """PayloadError where a tensor is not finite, or a coded one has more than 256 values."""
    arrays = [state[name].detach().cpu().numpy() for name in coded]
    sections: list[Any] = [*codebook.encode(arrays, list(coded)), pack_tensors(state, _others(coded, task)), report]
    return container.pack(kind, task.fingerprint(kind.partition(".")[0], hyper), samples, sections)


def unpack(
    message: Buffer, kind: str, coded: Shapes, most: int, hyper: Any, task: Task
) -> tuple[State, memoryview, int]:
    """Tensors, report (of at most so many bytes) and samples. PayloadError for any other message."""
    read = sections(message, kind, coded, most, hyper, task)
    arrays = codebook.decode(read.sections[0], read.sections[1], _sizes(coded))
    found = {name: torch.from_numpy(a).view(s) for (name, s), a in zip(coded.items(), arrays, strict=True)}
    return found | unpack_tensors(read.sections[2], _others(coded, task)), read.sections[3], read.samples


def sections(message: Buffer, kind: str, coded: Shapes, most: int, hyper: Any, task: Task) -> container.Message:
    limits = [*codebook.limits(_sizes(coded)), 4 * count(_others(coded, task)), most]
    return container.unpack(message, kind, task.fingerprint(kind.partition(".")[0], hyper), limits)


def reported(message: bytes, kind: str, coded: Shapes, report: bytes, hyper: Any, task: Task) -> bytes:
    """The message with another report."""
    read = sections(message, kind, coded, 0, hyper, task)
    return container.pack(
        kind, task.fingerprint(kind.partition(".")[0], hyper), read.samples, [*read.sections[:3], report]
    )


def _others(coded: Shapes, task: Task) -> dict[str, torch.Size]:
    return {name: shape for name, shape in task.tensors.items() if name not in coded}


def _sizes(coded: Shapes) -> list[int]:
    return [shape.numel() for shape in coded.values()]


# Three meters of a message: its own bytes, indexes of a fixed width, and the model as a compressed file


METERS = ("ours", "fixed", "zip")


def bits(
    message: Buffer, kind: str, state: Mapping[str, Tensor], coded: Shapes, most: int, hyper: Any, task: Task
) -> list[float]:
    """Of a broadcast, by each meter."""
    fixed = fixed_bits(message, kind, coded, most, hyper, task)
    return [8.0 * len(message), fixed, zip_bits(state, task) + 8 * container.section_sizes(message)[3]]


def noted(state: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """For the record: bits of the round's broadcast, "sent", and of the next, "bits", by meter."""
    names = {"sent_bits": "sent", "model_bits": "bits"}
    return {key: dict(zip(METERS, state[name].tolist(), strict=True)) for key, name in names.items()}


def fixed_bits(message: Buffer, kind: str, coded: Shapes, most: int, hyper: Any, task: Task) -> float:
    """Codebooks in float32, indexes of one width, everything else as it is sent."""
    read = sections(message, kind, coded, most, hyper, task)
    books = [book.size for book in codebook.read_books(read.sections[0], len(coded))]
    return float(codebook.fixed_bits(books, _sizes(coded)) + 8 * (len(read.sections[2]) + len(read.sections[3])))


def zip_bits(state: Mapping[str, Tensor], task: Task) -> float:
    """Of the model as a file of float32 after DEFLATE, which leaves few patterns of four bytes in few bits.

    FedCompress's code packs the model's HDF5 file, whose own structure adds some kilobytes.
    """
    file = b"".join(np.ascontiguousarray(state[name].detach().cpu().numpy(), "<f4").tobytes() for name in task.tensors)
    return 8.0 * len(zlib.compress(file, 6))
