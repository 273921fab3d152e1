"""FedPT: a part of the network stays at random values that are made from a seed and never sent.

Sidahmed, Xu, Garg, Cao, Chen, "Efficient and Private Federated Learning with Partially Trainable Networks"
(arXiv:2110.03450). Of the paper the abstract could be read; the skeleton is generalised federated averaging (Reddi et
al., "Adaptive Federated Optimization", ICLR 2021), as in the code around it (`google-research/federated`, a5af8c4).

    which tensors are frozen      -> `fedlib.models.freezing`
    their values, from the seed   -> `fixed`, by `fedlib.models.initializers`
    a client                      -> `start`, `objective`, `finish`
    the server's optimizer        -> `server`, `moved`
    training in private           -> `fedlib.methods.fedpt.private_server`

Gradients, optimizer states and noise exist for the trained tensors only, on both sides.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import PayloadError, RunError, SpecError, require_name, require_number
from fedlib.methods.fedpt import mechanisms, private_server
from fedlib.methods.messages import pack_tensors, unpack_tensors
from fedlib.models import initializers
from fedlib.models.freezing import frozen_names
from fedlib.rng import Rng
from fedlib.wire import container

if TYPE_CHECKING:
    from fedlib.runs.spec import Spec

SECTIONS = ("fingerprint of the frozen part", "trained part")
OPTIMIZERS = ("sgd", "adam", "yogi")
summary, notes = private_server.summary, private_server.notes


@dataclass(frozen=True)
class Hyper:
    """Server optimizers with the defaults of the code around the paper: plain averaging, or Keras' Adam."""

    policy: str = "none"  # what is frozen: a name of `fedlib.models.freezing`
    law: str = "he"  # initial values, frozen or not: "he", "glorot" or "torch"
    scale: float = 1.0  # by which frozen weights are multiplied; a power of two keeps them exact
    optimizer: str = "sgd"  # of the server
    server_lr: float = 1.0
    momentum: float = 0.0  # of sgd
    beta1: float = 0.9  # first moment of the others
    beta2: float = 0.999  # second moment
    epsilon: float = 1e-3  # in units of a parameter; that of the code's example for text, far above Keras' own
    correction: bool = True  # of the moments' bias, as in Keras; without it as in Reddi et al., but from zero moments
    weighting: str = "samples"  # or "clients"
    mechanism: str = "none"  # of privacy for whole clients: noise each round, "dp_fedavg", or in a tree, "dp_ftrl"
    clip_norm: float = 0.0  # largest norm of an update over all trained tensors, in units of a parameter
    noise_multiplier: float = 0.0  # deviation of the noise in the sum of updates over clip_norm
    delta: float = 0.0  # of the guarantee

    def __post_init__(self) -> None:
        require_name("hyper.law", self.law, initializers.LAWS)
        require_name("hyper.optimizer", self.optimizer, OPTIMIZERS)
        require_name("hyper.weighting", self.weighting, ("samples", "clients"))
        require_number("hyper.scale", self.scale, 2.0**-20, 2.0**20)
        if self.scale != 1 and self.policy == "none":
            raise SpecError(f"hyper.scale: {self.scale} is for frozen weights, and policy none has none; leave it at 1")
        require_number("hyper.server_lr", self.server_lr, 1e-9, 1e6)
        require_number("hyper.epsilon", self.epsilon, 1e-12, 1e6)
        for field in ("momentum", "beta1", "beta2"):
            require_number(f"hyper.{field}", getattr(self, field), 0, 0.999999)
        if not isinstance(self.correction, bool):
            raise SpecError(f"hyper.correction: {self.correction!r} must be true or false")
        private_server.validate(self)

    @property
    def private(self) -> bool:
        return self.mechanism != "none"


def check(hyper: Hyper, spec: Spec) -> None:
    if spec.frozen != "none":
        raise SpecError(f"frozen: {spec.frozen!r} is for methods that train all; fedpt freezes by hyper.policy")
    private_server.check(hyper, spec)


def trained(hyper: Hyper, task: Task) -> dict[str, torch.Size]:
    """The tensors that travel. SpecError: BatchNorm, or a policy that does not fit the network."""
    if task.statistics:
        raise SpecError("model: BatchNorm's statistics are neither trained nor frozen; take a network with GroupNorm")
    frozen = frozen_names(hyper.policy, task.parameters)
    return {name: shape for name, shape in task.parameters.items() if name not in frozen}


@functools.lru_cache(maxsize=2)
def fixed(
    seed: int, law: str, scale: float, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> tuple[dict[str, Tensor], bytes]:
    """The frozen tensors on the CPU, from nothing but the seed, and 8 bytes that tell them from any others."""
    tensors = {name: initializers.values(seed, name, shape, law) for name, shape in shapes}
    tensors = {name: tensor * scale if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return tensors, digest.digest()


def frozen_part(seed: int, hyper: Hyper, task: Task) -> tuple[dict[str, Tensor], bytes]:
    travels = trained(hyper, task)
    shapes = tuple((name, tuple(shape)) for name, shape in task.parameters.items() if name not in travels)
    return fixed(seed, hyper.law, hyper.scale, shapes)


def slots(hyper: Hyper, task: Task) -> dict[str, torch.Size]:
    """What the server's optimizer keeps: one or two tensors for each trained one, and the number of rounds."""
    if hyper.mechanism == "dp_ftrl":
        return {"rounds": torch.Size([])}
    orders = {"sgd": ("first",) if hyper.momentum else ()}.get(hyper.optimizer, ("first", "second"))
    shapes = {f"{which} {name}": shape for which in orders for name, shape in trained(hyper, task).items()}
    return shapes | {"rounds": torch.Size([])}


def initial(hyper: Hyper, task: Task, rng: Rng) -> State:
    """The trained tensors, the seed of all, and an optimizer that has seen nothing."""
    seed = initializers.number(
        Rng(rng.base)
    )  # that of the network's own initial weights: with its law they are the same
    start = {name: initializers.values(seed, name, shape, hyper.law) for name, shape in trained(hyper, task).items()}
    state = start | {name: torch.zeros(shape) for name, shape in slots(hyper, task).items()}
    state["seed"] = torch.frombuffer(bytearray(seed.to_bytes(8, "little")), dtype=torch.uint8)
    state["fingerprint"] = torch.frombuffer(bytearray(frozen_part(seed, hyper, task)[1]), dtype=torch.uint8)
    return state | private_server.initial(start, hyper, task, rng)


def seed_of(state: State) -> int:
    return int.from_bytes(state["seed"].numpy().tobytes(), "little")


def models(state: State, hyper: Hyper, task: Task, rng: Rng) -> list[State]:
    whole = frozen_part(seed_of(state), hyper, task)[0] | state
    return [{name: whole[name].clone() for name in task.parameters}]


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    """RunError where a run goes on from a checkpoint, and the seed no longer makes the frozen part of its beginning."""
    seed = seed_of(state)
    _, fingerprint = frozen_part(seed, hyper, task)
    if fingerprint != state["fingerprint"].numpy().tobytes():
        raise RunError("the frozen part is not that of the checkpoint; remove .cache/checkpoints, and train again")
    parts: list[Any] = [seed.to_bytes(8, "little") + fingerprint, pack_tensors(state, trained(hyper, task))]
    return container.pack("fedpt.down", task.fingerprint("fedpt", hyper), 0, parts)


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    """PayloadError where the frozen part that the client makes is not the server's."""
    travels = trained(hyper, task)
    read = container.unpack(message, "fedpt.down", task.fingerprint("fedpt", hyper), [16, 4 * count(travels)])
    if len(read.sections[0]) != 16:
        raise PayloadError(f"seed and fingerprint of {len(read.sections[0])} bytes, expected 16")
    frozen, fingerprint = frozen_part(int.from_bytes(read.sections[0][:8], "little"), hyper, task)
    _same(fingerprint, read.sections[0][8:])
    model = {name: t.to(task.device) for name, t in unpack_tensors(read.sections[1], travels).items()}
    held = {name: tensor.to(task.device) for name, tensor in frozen.items()}  # shared by all clients: none writes
    held |= {f"from {name}": tensor.clone() for name, tensor in model.items()}
    held["fingerprint"] = torch.frombuffer(bytearray(fingerprint), dtype=torch.uint8).to(task.device)
    return {name: tensor.requires_grad_() for name, tensor in model.items()}, held


def _same(own: bytes, given: memoryview) -> None:
    if own != given:
        raise PayloadError(
            f"frozen part {own.hex()}, the other side's is {bytes(given).hex()}: another seed, law or version of it"
        )


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> None:
    return None


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], drawn: None, hyper: Hyper, task: Task
) -> Tensor:
    whole = frozen | trainable
    return task.loss({name: whole[name] for name in task.parameters}, batch)


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    """The change of the trained tensors, as float32; in private training clipped, and without the number of samples."""
    change = {name: tensor.detach() - frozen[f"from {name}"] for name, tensor in trainable.items()}
    if hyper.private:
        samples, (change, _) = 1, mechanisms.clip(change, hyper.clip_norm)
    parts: list[Any] = [frozen["fingerprint"].cpu().numpy().tobytes(), pack_tensors(change, trained(hyper, task))]
    return container.pack("fedpt.up", task.fingerprint("fedpt", hyper), samples, parts)


def read_update(upload: Buffer, fingerprint: bytes, hyper: Hyper, task: Task) -> tuple[State, int]:
    travels = trained(hyper, task)
    read = container.unpack(upload, "fedpt.up", task.fingerprint("fedpt", hyper), [8, 4 * count(travels)])
    _same(fingerprint, read.sections[0])
    return unpack_tensors(read.sections[1], travels), read.samples


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    _, fingerprint = frozen_part(seed_of(state), hyper, task)
    travels = trained(hyper, task)

    def decode(upload: Buffer) -> tuple[State, int]:
        return read_update(upload, fingerprint, hyper, task)

    if hyper.private:
        state, total = private_server.gather(state, uploads, decode, hyper, count(travels))
        if hyper.mechanism == "dp_ftrl":
            return private_server.ftrl(state, total, hyper, task.cohort, travels)
        return moved(state, private_server.mean(state, total, hyper, task.cohort, travels), hyper)
    mean = RunningMean(travels)
    for tensors, samples in uploads.read(decode):
        mean.add(tensors, samples if hyper.weighting == "samples" else 1)
    return moved(state, mean.value(), hyper)


def moved(state: State, change: Mapping[str, Tensor], hyper: Hyper) -> State:
    """The state after the server's optimizer has taken `change`, minus which is its gradient."""
    new = dict(state)
    new["rounds"] = state["rounds"] + 1
    for name, d in change.items():
        if hyper.optimizer == "sgd":
            if hyper.momentum:
                d = new[f"first {name}"] = hyper.momentum * state[f"first {name}"] + d
            new[name] = state[name] + hyper.server_lr * d
            continue
        first = new[f"first {name}"] = hyper.beta1 * state[f"first {name}"] + (1 - hyper.beta1) * d
        second, square = state[f"second {name}"], d * d
        if hyper.optimizer == "adam":
            second = hyper.beta2 * second + (1 - hyper.beta2) * square
        else:  # Yogi: the second moment moves by a fixed share of the square, up or down
            second = second - (1 - hyper.beta2) * torch.sign(second - square) * square
        new[f"second {name}"] = second
        rate = hyper.server_lr
        if hyper.correction:
            n = float(new["rounds"])
            rate *= (1 - hyper.beta2**n) ** 0.5 / (1 - hyper.beta1**n)
        new[name] = state[name] + rate * first / (second.sqrt() + hyper.epsilon)
    return new


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    """Trained entries times 32: the inverse of the paper's reduction, as far as its abstract tells."""
    return 32.0 * count(trained(hyper, task))
