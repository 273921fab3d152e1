"""What several methods share: named tensors as float32 bytes, and the model as a message."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedlib.core.method import AnyMethod
from fedlib.core.plan import Shapes, Tensors, count
from fedlib.errors import PayloadError
from fedlib.wire import bits, container, floats

NO_MORE: Shapes = {}


def pack_tensors(tensors: Mapping[str, Tensor], shapes: Shapes) -> np.ndarray:
    """The named tensors, in the order of `shapes`, as float32 bytes. PayloadError where one is not finite."""
    return floats.encode([tensors[name].detach().cpu().numpy() for name in shapes], list(shapes))


def unpack_tensors(data: memoryview, shapes: Shapes) -> Tensors:
    """The inverse, copied out of the message. PayloadError: wrong length, or a value that is not finite."""
    arrays = floats.decode(data, list(shapes.values()), list(shapes))
    return {name: torch.tensor(array) for name, array in zip(shapes, arrays, strict=True)}


def pack_seed(seed: int) -> bytes:
    """A seed of 64 bits, as it travels."""
    return seed.to_bytes(8, "little")


def unpack_seed(section: memoryview) -> int:
    """The inverse. PayloadError: another length."""
    if len(section) != 8:
        raise PayloadError(f"seed of {len(section)} bytes where 8 were expected")
    return int.from_bytes(section, "little")


def pack_signs(u: Tensor) -> bytes:
    """One bit an entry [d], which is 1 from zero on."""
    return bits.pack((u >= 0).cpu().numpy())


def unpack_signs(section: memoryview, d: int) -> Tensor:
    """The inverse: -1 or +1 [d] on the CPU. PayloadError."""
    return torch.from_numpy(bits.unpack(section, d)).float().mul_(2).sub_(1)


def pack_broadcast(method: AnyMethod, model: Mapping[str, Tensor], more: Shapes = NO_MORE) -> bytes:
    """The whole model in full precision, or as the run's other method writes it; and more tensors."""
    task = method.task
    if method.writer:
        named = {name: model[name] for name in task.tensors}
        sections: list[bytes | np.ndarray] = [method.writer.write_model(named), pack_tensors(model, more)]
    else:
        sections = [pack_tensors(model, {**task.tensors, **more})]
    return container.pack(f"{method.name}.down", method.fingerprint(), 0, sections)


def unpack_broadcast(method: AnyMethod, message: bytes, more: Shapes = NO_MORE) -> Tensors:
    """The inverse. PayloadError for any other message."""
    task, kind, fingerprint = method.task, f"{method.name}.down", method.fingerprint()
    if method.writer:
        limits = [64 + 4 * count(task.tensors), 4 * count(more)]
        model, rest = container.unpack(message, kind, fingerprint, limits).sections
        return method.writer.read_model(model) | unpack_tensors(rest, more)
    shapes = {**task.tensors, **more}
    arrays = _checked(message, kind, fingerprint, tuple(shapes.items()))
    return {name: torch.tensor(array) for name, array in zip(shapes, arrays, strict=True)}


@functools.lru_cache(maxsize=1)  # all clients of a process read the same broadcast, one after the other
def _checked(
    message: bytes, kind: str, fingerprint: bytes, shapes: tuple[tuple[str, torch.Size], ...]
) -> list[np.ndarray]:
    names, sizes = [name for name, _ in shapes], [shape for _, shape in shapes]
    (section,) = container.unpack(message, kind, fingerprint, [4 * count(dict(shapes))]).sections
    return floats.decode(section, sizes, names)


def positive(x: Tensor) -> Tensor:
    """1 where x > 0 and 0 elsewhere, as floats: on a CPU many times faster than comparisons and torch.where."""
    return torch.sign(torch.relu(x))


def largest(values: Tensor, number: int) -> Tensor:
    """The values, all but the `number` largest by magnitude set to zero."""
    vector = values.flatten()
    kept = torch.topk(vector.abs(), min(number, len(vector))).indices
    return torch.zeros_like(vector).index_copy_(0, kept, vector[kept]).view_as(values)
