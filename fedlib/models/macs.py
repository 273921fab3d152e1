"""Multiply-accumulates of training on one example, for networks of which a part is frozen.

A product of an input and weights takes as many again for the gradient with respect to the input, and once more for the
gradient with respect to the weights. Automatic differentiation says which of the two are formed: that for frozen
weights is not, and that for the input only if something trained lies below it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one example."""

    forward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.input_gradient + self.weight_gradient

    def __add__(self, other: Macs) -> Macs:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Macs(*(a + b for a, b in pairs))


def count(network: nn.Module, x: Tensor, frozen: Collection[str] = ()) -> dict[str, Macs]:
    """Cost by the name of the weights, in the order of their use; products without weights, as of attention, under "".

    x: [n, ...], of which the first example's shape counts. Entries of padding count as others do; biases, norms,
    pooling and the optimizer are left out. Sees linear layers, two-dimensional convolutions and matrix products.
    """
    # On the device "meta" tensors have shapes and no entries: nothing is computed.
    tensors = {name: b.detach().to("meta") for name, b in network.named_buffers()}
    for name, p in network.named_parameters():
        tensors[name] = p.detach().to("meta").requires_grad_(name not in frozen)
    with _Products(tensors) as products:
        functional_call(network, tensors, (x[:1].to("meta"),))
    return products.found


def total(counts: Mapping[str, Macs]) -> Macs:
    return sum(counts.values(), Macs())


class _Products(TorchFunctionMode):
    """Sees every call of torch made inside it: `found` is what the products among them cost."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        self.found: dict[str, Macs] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in TERMS:
            first, second = args[:2]
            cost = result.numel() * TERMS[func](first, second)
            name = self.names.get(id(second), "")
            gradients = [(first, ""), (second, name)]
            inputs = sum(cost for operand, of in gradients if operand.requires_grad and not of)
            weights = cost if name and second.requires_grad else 0
            self.found[name] = self.found.get(name, Macs()) + Macs(cost, inputs, weights)
        return result


# function -> products that make up one entry of its result
TERMS: dict[Callable[..., Any], Callable[[Tensor, Tensor], int]] = {
    nn.functional.linear: lambda x, weight: weight.shape[1],
    nn.functional.conv2d: lambda x, weight: weight[0].numel(),
    torch.matmul: lambda a, b: a.shape[-1],
    Tensor.matmul: lambda a, b: a.shape[-1],
    Tensor.__matmul__: lambda a, b: a.shape[-1],
}
