"""A model as a message: clustered tensors by codebook and indexes, the others as float32, and a report beside them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlib.core.plan import Shapes, State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer
from fedlib.errors import SpecError
from fedlib.methods.messages import pack_tensors, unpack_tensors
from fedlib.wire import codebook, container

SECTIONS = ("codebooks", "indexes", "full precision", "report")


def kernels(task: Task, most: int, linear: bool = False) -> dict[str, torch.Size]:
    """Kernels of convolutions over all channels, and matrices of linear layers where they count, with more than `most`
    weights. SpecError where there is none."""
    found = {name: shape for name, shape in _kernels(task.network, most, linear).items() if name in task.weights}
    if not found:
        raise SpecError(
            f"model: has no trained convolution of more than {most} weights; take one that has, or no clusters"
        )
    return found


@functools.lru_cache(maxsize=8)
def _kernels(network: nn.Module, most: int, linear: bool) -> dict[str, torch.Size]:
    kinds = (nn.Conv2d, nn.Linear) if linear else (nn.Conv2d,)
    layers = {f"{name}.weight": m for name, m in network.named_modules() if isinstance(m, kinds)}
    shapes = {name: layer.weight.shape for name, layer in layers.items() if getattr(layer, "groups", 1) == 1}
    return {name: shape for name, shape in shapes.items() if shape.numel() > most}


@dataclass(frozen=True)
class Form:
    """What sender and receiver of one kind of message agree on: which tensors are coded, how long a report may be."""

    kind: str  # method and direction, e.g. "fedzip.up"
    coded: Shapes
    others: Shapes
    most: int  # bytes of the longest report
    fingerprint: bytes

    @classmethod
    def of(cls, kind: str, coded: Shapes, hyper: Any, task: Task, most: int = 0) -> Form:
        others = {name: shape for name, shape in task.tensors.items() if name not in coded}
        return cls(kind, coded, others, most, task.fingerprint(kind.partition(".")[0], hyper))

    def pack(self, state: Mapping[str, Tensor], samples: int = 0, report: bytes = b"") -> bytes:
        """PayloadError where a tensor is not finite, or a coded one has more than 256 values."""
        arrays = [state[name].detach().cpu().numpy() for name in self.coded]
        parts: list[Any] = [*codebook.encode(arrays, list(self.coded)), pack_tensors(state, self.others), report]
        return container.pack(self.kind, self.fingerprint, samples, parts)

    def unpack(self, message: Buffer | memoryview) -> tuple[State, memoryview, int]:
        """Tensors, report and samples. PayloadError for any other message."""
        read = self.parts(message)
        arrays = codebook.decode(read.sections[0], read.sections[1], self.sizes)
        found = {name: torch.from_numpy(a).view(s) for (name, s), a in zip(self.coded.items(), arrays, strict=True)}
        return found | unpack_tensors(read.sections[2], self.others), read.sections[3], read.samples

    def parts(self, message: Buffer | memoryview) -> container.Message:
        limits = [*codebook.limits(self.sizes), 4 * count(self.others), self.most]
        return container.unpack(message, self.kind, self.fingerprint, limits)

    def reported(self, message: bytes, report: bytes) -> bytes:
        """The message with a report in place of its own."""
        read = self.parts(message)
        return container.pack(self.kind, self.fingerprint, read.samples, [*read.sections[:3], report])

    def fixed_bits(self, message: Buffer) -> float:
        """Codebooks in float32, indexes of one width, everything else as it is sent."""
        read = self.parts(message)
        books = [book.size for book in codebook.read_books(read.sections[0], len(self.coded))]
        return float(codebook.fixed_bits(books, self.sizes) + 8 * (len(read.sections[2]) + len(read.sections[3])))

    def bits(self, message: bytes, state: Mapping[str, Tensor], task: Task) -> list[float]:
        """Of a message that says `state`, by each of METERS."""
        report = 8 * container.section_sizes(message)[3]
        return [8.0 * len(message), self.fixed_bits(message), zip_bits(state, task) + report]

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.coded.values()]


# Three meters of a message: its own bytes, indexes of a fixed width, and the model as a compressed file
METERS = ("ours", "fixed", "zip")


def noted(state: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """For the record: bits of the round's broadcast, "sent", and of the next, "bits", by meter."""
    names = {"sent_bits": "sent", "model_bits": "bits"}
    return {key: dict(zip(METERS, state[name].tolist(), strict=True)) for key, name in names.items()}


def zip_bits(state: Mapping[str, Tensor], task: Task) -> float:
    """Of the model as a file of float32 after DEFLATE, which leaves few patterns of four bytes in few bits.

    FedCompress's code packs the model's HDF5 file, whose own structure adds some kilobytes.
    """
    file = b"".join(np.ascontiguousarray(state[name].detach().cpu().numpy(), "<f4").tobytes() for name in task.tensors)
    return 8.0 * len(zlib.compress(file, 6))
