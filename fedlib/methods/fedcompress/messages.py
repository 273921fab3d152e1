"""A model as a message: clustered tensors by codebook and indexes, the others as float32, and a report beside them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.core.method import AnyMethod
from fedlib.core.plan import Shapes, Tensors, count
from fedlib.core.uploads import Buffer
from fedlib.methods.messages import pack_tensors, unpack_tensors
from fedlib.wire import codebook, container

SECTIONS = ("codebooks", "indexes", "full precision", "report")
METERS = ("ours", "fixed", "zip")  # of a message: its own bytes, indexes of a fixed width, the model as compressed file


@dataclass(frozen=True)
class Form:
    """What sender and receiver of one kind of message agree on: which tensors are coded, how long a report may be."""

    method: AnyMethod
    direction: str  # "down", for one
    coded: Shapes
    most: int = 0  # bytes of the longest report

    @property
    def kind(self) -> str:
        return f"{self.method.name}.{self.direction}"

    @property
    def others(self) -> Shapes:
        return {name: shape for name, shape in self.method.task.tensors.items() if name not in self.coded}

    @property
    def sizes(self) -> list[int]:
        return [shape.numel() for shape in self.coded.values()]

    def pack(self, model: Mapping[str, Tensor], samples: int = 0, report: bytes = b"") -> bytes:
        """PayloadError where a tensor is not finite, or a coded one has more than 256 values."""
        arrays = [model[name].detach().cpu().numpy() for name in self.coded]
        parts: list[Any] = [*codebook.encode(arrays, list(self.coded)), pack_tensors(model, self.others), report]
        return container.pack(self.kind, self.method.fingerprint(), samples, parts)

    def unpack(self, message: Buffer | memoryview) -> tuple[Tensors, memoryview, int]:
        """Tensors, report and samples. PayloadError for any other message."""
        read = self.parts(message)
        arrays = codebook.decode(read.sections[0], read.sections[1], self.sizes)
        found = {name: torch.from_numpy(a).view(s) for (name, s), a in zip(self.coded.items(), arrays, strict=True)}
        return found | unpack_tensors(read.sections[2], self.others), read.sections[3], read.samples

    def parts(self, message: Buffer | memoryview) -> container.Message:
        limits = [*codebook.limits(self.sizes), 4 * count(self.others), self.most]
        return container.unpack(message, self.kind, self.method.fingerprint(), limits)

    def fixed_bits(self, message: Buffer) -> float:
        """Codebooks in float32, indexes of one width, everything else as it is sent."""
        codebooks, _, others, report = self.parts(message).sections
        books = [book.size for book in codebook.read_books(codebooks, len(self.coded))]
        return float(codebook.fixed_bits(books, self.sizes) + 8 * (len(others) + len(report)))

    def zip_bits(self, message: Buffer, model: Mapping[str, Tensor]) -> float:
        """The model that the message says as a file of float32 after DEFLATE, which leaves few patterns of four bytes
        in few bits; and the report.

        FedCompress's code packs the model's HDF5 file, whose own structure adds some kilobytes.
        """
        arrays = [model[name].detach().cpu().numpy() for name in self.method.task.tensors]
        file = b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays)
        return 8.0 * (len(zlib.compress(file, 6)) + container.section_sizes(message)[3])


@dataclass(frozen=True)
class Metered:
    """Bits of a server's broadcasts by each of METERS, for the record."""

    coming: tuple[float, ...] = ()
    sent: tuple[float, ...] = ()  # in the round before

    def then(self, form: Form, message: bytes, model: Mapping[str, Tensor]) -> Metered:
        """With a new broadcast, the message that says the model."""
        return Metered((8.0 * len(message), form.fixed_bits(message), form.zip_bits(message, model)), self.coming)

    def notes(self) -> dict[str, dict[str, float]]:
        named = {"sent_bits": self.sent, "model_bits": self.coming}
        return {key: dict(zip(METERS, bits, strict=True)) for key, bits in named.items()}
