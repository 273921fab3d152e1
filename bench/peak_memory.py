"""Bytes of the tensors that are alive while code runs, and their peak: exact, and the same on every run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Inside `with`, counts what torch's operations make, backward passes included; and `held`, from the start.

    Each storage counts in full from the operation that makes it until nothing refers to it: a variable, a view, or what
    autograd keeps for the backward pass. What a kernel allocates for itself and frees before it returns is not seen.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._alive = weakref.WeakSet[torch.UntypedStorage](tensor.untyped_storage() for tensor in held)
        self.peak = self.now  # bytes

    @property
    def now(self) -> int:
        """Bytes alive."""
        return sum(storage.nbytes() for storage in self._alive)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive.update(leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.peak = max(self.peak, self.now)
        return result
