"""A network of a caller's own, as a builder: what it may be, and the digest of the code that it is made of."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedlib.errors import SpecError
from fedlib.rng import Rng

Network = nn.Module | Callable[[], nn.Module]
UNKNOWN = "?"  # ends a digest that does not tell all: some source is not there


@dataclass(frozen=True)
class Given:
    """Stands in the table of networks; called as its builders are, it gives a copy."""

    network: Network
    code: str

    def __call__(self, channels: int, side: int, classes: int, root: Rng) -> Any:
        """What a function makes has initial values by the run's seed; a module keeps those that it has."""
        if isinstance(self.network, nn.Module):
            return copy.deepcopy(self.network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(root.child("initial weights").seed() >> 1)
            return self.network()


def given(network: Any) -> Given:
    """A builder of the network. SpecError: what cannot be federated, with the reason."""
    if not isinstance(network, nn.Module) and not callable(network):
        raise SpecError(f"network: {network!r:.60} is no torch.nn.Module, and no function that makes one")
    made = Given(network, "")(0, 0, 0, Rng(0))
    _require(made)
    parts = [network] if not isinstance(network, nn.Module) else []
    kinds = {type(module) for module in made.modules() if not type(module).__module__.startswith("torch.")}
    content = hashlib.sha256(repr(made).encode())
    if isinstance(network, nn.Module):
        for name, tensor in network.state_dict().items():
            content.update(name.encode() + tensor.cpu().numpy().tobytes())
    return Given(network, code_of([*parts, *sorted(kinds, key=repr)], content.digest()))


def code_of(parts: Sequence[Any], more: bytes = b"") -> str:
    """Sixteen hex digits of the source of functions and classes, and UNKNOWN where one has none; of nothing none."""
    texts = [_source(part) for part in parts]
    digest = hashlib.sha256(more + "\n".join(text or "" for text in texts).encode()).hexdigest()[:16]
    return digest + (UNKNOWN if None in texts else "") if parts or more else ""


def _require(network: Any) -> None:
    """SpecError: a network that cannot be federated, with the reason."""
    if not isinstance(network, nn.Module):
        raise SpecError(f"network: the function gives {type(network).__name__}; expected a torch.nn.Module")
    if not any(p.requires_grad for p in network.parameters()):
        raise SpecError("network: no parameter to train; set requires_grad on some")
    for name, tensor in network.state_dict().items():
        if tensor.device.type != "cpu":
            raise SpecError(f"network: {name} is on {tensor.device}; move the module to the CPU, fedlib moves it on")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise SpecError(f"network: {name} is {tensor.dtype}; call float() on the module: messages hold float32")
        if tensor.is_complex():
            raise SpecError(f"network: {name} is complex; messages hold real numbers")


def _source(part: Any) -> str | None:
    """The text of a function or class; of a class in a notebook that of its methods; None: it is not there."""
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(part)
    methods = [value for value in vars(part).values() if inspect.isfunction(value)] if inspect.isclass(part) else []
    texts = [_source(method) for method in methods]
    return "\n".join(map(str, texts)) if texts and None not in texts else None
