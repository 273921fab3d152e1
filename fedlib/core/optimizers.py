"""Local optimizers as functions on tensors: all engines take the same steps; what they keep can outlive a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedlib.core.plan import Plan, Tensors, layers

OPTIMIZERS = ("sgd", "adam")
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam: Kingma, Ba, ICLR 2015, the values of its Algorithm 1


def moments(plan: Plan, trainable: Mapping[str, Tensor], kept: bytes = b"") -> Tensors:
    """What the optimizer keeps between steps: with momentum one tensor a tensor; for Adam two, and the count of steps.

    kept: the bytes of earlier moments, to go on from; without them all is zero.
    ValueError where a tensor's entries do not lie in memory in their order: torch's kernel for Adam would mix them up
    without a word.
    """
    strided = [name for name, t in trainable.items() if not t.is_contiguous()]
    if strided:
        raise ValueError(f"{strided[0]}: strides {trainable[strided[0]].stride()}; call contiguous() on it first")
    orders = ("first",) if plan.optimizer == "sgd" else ("first", "second")
    shapes = {f"{which} {name}": t.shape for which in orders for name, t in trainable.items()}
    if plan.optimizer == "adam":
        shapes["steps"] = torch.Size([])
    where = next(iter(trainable.values())).device
    if not kept:
        return {name: torch.zeros(shape, device=where) for name, shape in shapes.items()}
    vector = torch.frombuffer(bytearray(kept), dtype=torch.float32).to(where)
    return {name: tensor.clone() for name, tensor in layers(vector, shapes).items()}


def packed(state: Tensors) -> bytes:
    """Moments as bytes."""
    return torch.cat([tensor.flatten() for tensor in state.values()]).cpu().numpy().tobytes()


@torch.no_grad()
def step(plan: Plan, trainable: Mapping[str, Tensor], gradients: Sequence[Tensor], state: Tensors) -> None:
    """One step, in place. Stacked clients: every tensor, the count of steps included, has them as first dimension."""
    if plan.optimizer == "adam":
        _adam(plan, trainable, gradients, state)
        return
    if plan.momentum:
        firsts = [state[f"first {name}"] for name in trainable]
        torch._foreach_mul_(firsts, plan.momentum)
        torch._foreach_add_(firsts, list(gradients))
        gradients = firsts
    # What torch.optim.SGD does, without its bookkeeping.
    torch._foreach_add_(list(trainable.values()), list(gradients), alpha=-plan.lr)


def _adam(plan: Plan, trainable: Mapping[str, Tensor], gradients: Sequence[Tensor], state: Tensors) -> None:
    steps = state["steps"]
    if not steps.ndim:  # torch's own kernel, in one pass over memory: all must lie in it alike, as kernels' may not
        gradients = [gradient.contiguous() for gradient in gradients]
        firsts, seconds = ([state[f"{which} {name}"] for name in trainable] for which in ("first", "second"))
        options: dict[str, Any] = dict(lr=plan.lr, beta1=BETA1, beta2=BETA2, eps=EPSILON, weight_decay=0.0)
        options |= dict(amsgrad=False, maximize=False)
        torch._fused_adam_(
            *(list(trainable.values()), list(gradients), firsts, seconds, [], [steps.add_(1)] * len(trainable)),
            **options,
        )
        return
    steps.add_(1)
    corrections = [1 - beta ** steps.double() for beta in (BETA1, BETA2)]
    for (name, p), g in zip(trainable.items(), gradients, strict=True):
        first, second = state[f"first {name}"], state[f"second {name}"]
        first.lerp_(g, 1 - BETA1)
        second.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        one, two = (c.to(p.dtype).reshape(c.shape + (1,) * (p.ndim - c.ndim)) for c in corrections)
        size = (second / two).sqrt_().add_(EPSILON)
        p.sub_((first * (plan.lr / one)).div_(size))
