"""FedPT: a part of the network stays at random values that are made from a seed and never sent.

Sidahmed, Xu, Garg, Cao, Chen, "Efficient and Private Federated Learning with Partially Trainable Networks"
(arXiv:2110.03450). Of the paper the abstract could be read; the skeleton is generalised federated averaging (Reddi et
al., "Adaptive Federated Optimization", ICLR 2021), as in the code around it (`google-research/federated`, a5af8c4).

    which tensors are frozen      -> `fedlib.models.freezing`
    their values, from the seed   -> `make_frozen`, by `fedlib.models.initializers`
    a client                      -> `begin`, `loss`, `upload`
    the server's optimizer        -> `aggregate`, `server_step`
    training in private           -> `fedlib.methods.fedpt.private_server`

Gradients, optimizer states and noise exist for the trained tensors only, on both sides.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.method import Draws, Local, ServerState, Settings, Sizes
from fedlib.core.plan import Samples, Shapes, Tensors, count
from fedlib.core.settings import choice, number, switch
from fedlib.core.uploads import Buffer, Update, Uploads
from fedlib.errors import PayloadError, RunError, SpecError
from fedlib.methods.fedpt import mechanisms
from fedlib.methods.fedpt.private_server import PrivateServer
from fedlib.methods.messages import pack_seed, pack_tensors, unpack_seed, unpack_tensors
from fedlib.models import initializers
from fedlib.models.freezing import frozen_names
from fedlib.rng import Rng
from fedlib.wire import container

Named = tuple[tuple[str, torch.Size], ...]


@dataclass(frozen=True)
class Own:
    """What the server keeps beside the trained tensors."""

    seed: int  # of all initial values
    fingerprint: str  # of the frozen part, hexadecimal
    first: Tensors  # moments of the server's optimizer, by the names of the trained tensors
    second: Tensors
    noise: int  # seed of the noise in private training, which no message holds
    ftrl: mechanisms.Ftrl | None
    rounds: int = 0  # that are done
    clipped: float = 0.0  # share of the last round's updates, in private training


@dataclass(frozen=True, kw_only=True)
class FedPT(PrivateServer[Own]):
    """Server optimizers have the defaults of the code around the paper: plain averaging, or Keras' Adam."""

    name = "fedpt"
    sections = ("fingerprint of the frozen part", "trained part")
    own_type = Own

    policy: str = "none"  # what is frozen: a name of `fedlib.models.freezing`
    law: str = choice("he", *initializers.LAWS)  # initial values, frozen or not: "he", "glorot" or "torch"
    scale: float = number(1.0, 2.0**-20, 2.0**20)  # factor on frozen weights; a power of two keeps them exact
    optimizer: str = choice("sgd", "adam", "yogi")  # of the server
    server_lr: float = number(1.0, 1e-9, 1e6)
    momentum: float = number(0.0, 0, 0.999999)  # of sgd
    beta1: float = number(0.9, 0, 0.999999)  # first moment of the others
    beta2: float = number(0.999, 0, 0.999999)  # second moment
    epsilon: float = number(1e-3, 1e-12, 1e6)  # in units of a parameter; of the code's example for text, not Keras'
    correction: bool = switch(True)  # of the moments' bias, as in Keras; else as in Reddi et al., but from zero moments
    weighting: str = choice("samples", "clients")  # or "clients"
    mechanism: str = choice("none", "dp_fedavg", "dp_ftrl")  # of privacy for clients: noise each round, or in a tree
    clip_norm: float = 0.0  # largest norm of an update over all trained tensors, in units of a parameter
    noise_multiplier: float = 0.0  # deviation of the noise in the sum of updates over clip_norm
    delta: float = 0.0  # of the guarantee

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale != 1 and self.policy == "none":
            raise SpecError(f"hyper.scale: {self.scale} is for frozen weights, and policy none has none; leave it at 1")

    @override
    def check(self, settings: Settings) -> None:
        if settings.frozen != "none":
            raise SpecError(f"frozen: {settings.frozen!r} is for methods that train all; fedpt freezes by hyper.policy")
        super().check(settings)

    # The two parts of the network

    @functools.cached_property
    def trained(self) -> Shapes:
        """The tensors that travel. SpecError: BatchNorm, or a policy that does not fit the network."""
        if self.task.statistics:
            raise SpecError("model: BatchNorm's statistics are neither trained nor frozen; take one with GroupNorm")
        frozen = frozen_names(self.policy, self.task.parameters)
        return {name: shape for name, shape in self.task.parameters.items() if name not in frozen}

    def frozen_part(self, seed: int, device: torch.device | str = "cpu") -> tuple[Tensors, bytes]:
        """Its tensors, which the caller must not change, and their fingerprint."""
        frozen = tuple((name, shape) for name, shape in self.task.parameters.items() if name not in self.trained)
        return make_frozen(seed, self.law, self.scale, frozen, str(device))

    @property
    def slots(self) -> int:
        """k: number of tensors that the server's optimizer keeps for each trained one."""
        if self.optimizer == "sgd":
            return int(self.momentum > 0 and self.mechanism != "dp_ftrl")
        return 2

    @override
    def initial(self, rng: Rng) -> ServerState[Own]:
        """RunError: noise without the package that tells its epsilon."""
        seed = initializers.number(Rng(rng.base))  # that of the network's own weights: with its law they are the same
        model = {name: initializers.values(seed, name, shape, self.law) for name, shape in self.trained.items()}
        first, second = ({name: torch.zeros(s) for name, s in self.trained.items() if self.slots > n} for n in (0, 1))
        noise = self.noise_seed(rng) if self.private else 0
        ftrl = mechanisms.ftrl_start(mechanisms.flatten(model)) if self.mechanism == "dp_ftrl" else None
        fingerprint = self.frozen_part(seed)[1].hex()
        return ServerState(model, Own(seed, fingerprint, first, second, noise, ftrl))

    @override
    def models(self, state: ServerState[Own], rng: Rng) -> list[Tensors]:
        whole = self.frozen_part(state.own.seed)[0] | state.model
        return [{name: whole[name].clone() for name in self.task.parameters}]

    # Messages

    @override
    def broadcast(self, state: ServerState[Own]) -> bytes:
        """RunError where a run goes on from a checkpoint, and the seed no longer makes the frozen part of its start."""
        _, fingerprint = self.frozen_part(state.own.seed)
        if fingerprint.hex() != state.own.fingerprint:
            raise RunError("the frozen part is not that of the checkpoint; remove .cache/checkpoints, and train again")
        head = pack_seed(state.own.seed) + fingerprint
        return container.pack("fedpt.down", self.fingerprint(), 0, [head, pack_tensors(state.model, self.trained)])

    @override
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        """PayloadError where the frozen part that the client makes is not the server's."""
        limits = [16, 4 * count(self.trained)]
        head, values = container.unpack(message, "fedpt.down", self.fingerprint(), limits).sections
        made, fingerprint = self.frozen_part(seed := unpack_seed(head[:8]), self.task.device)  # all clients share them
        compare(fingerprint, head[8:])
        model = {name: t.to(self.task.device) for name, t in unpack_tensors(values, self.trained).items()}
        frozen = made | {f"from {name}": tensor.clone() for name, tensor in model.items()}
        return Local({name: tensor.requires_grad_() for name, tensor in model.items()}, frozen, len(shard[1]), seed)

    @override
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Draws) -> Tensor:
        whole = frozen | trainable
        return self.task.loss({name: whole[name] for name in self.task.parameters}, batch)

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        """The change of the trained tensors as float32; in private training clipped, and without the sample count."""
        change = {name: tensor.detach() - local.frozen[f"from {name}"] for name, tensor in local.trainable.items()}
        samples = local.samples
        if self.private:
            samples, (change, _) = 1, mechanisms.clip(change, self.clip_norm)
        _, mark = self.frozen_part(local.seed)
        return container.pack("fedpt.up", self.fingerprint(), samples, [mark, pack_tensors(change, self.trained)])

    def read(self, upload: Buffer, own: Own) -> Update:
        """The change of the trained tensors and the sample count."""
        read = container.unpack(upload, "fedpt.up", self.fingerprint(), [8, 4 * count(self.trained)])
        fingerprint, values = read.sections
        compare(bytes.fromhex(own.fingerprint), fingerprint)
        return unpack_tensors(values, self.trained), read.samples

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        """Trained entries times 32: the inverse of the paper's reduction, as far as its abstract tells."""
        return Sizes(32.0 * count(self.trained))

    # The server

    @override
    def aggregate(self, state: ServerState[Own], uploads: Uploads) -> ServerState[Own]:
        if self.private:
            return self.aggregate_in_private(state, uploads)
        mean = uploads.averager(self.trained)
        for change, samples in uploads.read(lambda upload: self.read(upload, state.own)):
            mean.add(change, samples if self.weighting == "samples" else 1)
        return self.server_step(state, mean.value())

    def aggregate_in_private(self, state: ServerState[Own], uploads: Uploads) -> ServerState[Own]:
        """A round of DP-FedAvg, or of DP-FTRL-M with one tree for the whole run."""
        shapes, cohort, std = self.trained, self.task.cohort, self.noise_multiplier * self.clip_norm
        total, clipped = self.gather(uploads, lambda upload: self.read(upload, state.own), count(shapes))
        own = dataclasses.replace(state.own, clipped=clipped)
        noise = Rng(own.noise)
        if own.ftrl is None:
            mean = mechanisms.private_mean(total, noise.child("round", own.rounds), std, cohort)
            return self.server_step(ServerState(state.model, own), mechanisms.unflatten(mean.float(), shapes))
        rounds, rates = own.rounds + 1, {"lr": self.server_lr, "momentum": self.momentum}
        tree = mechanisms.tree_noise(noise.child("tree"), rounds, len(total), std / cohort)
        ftrl, point = mechanisms.ftrl_step(own.ftrl, -total / cohort, tree, **rates)
        return ServerState(mechanisms.unflatten(point, shapes), dataclasses.replace(own, rounds=rounds, ftrl=ftrl))

    def server_step(self, state: ServerState[Own], change: Tensors) -> ServerState[Own]:
        """The state after the server's optimizer has taken `change`, minus which is its gradient."""
        own, model = state.own, dict(state.model)
        first, second, n = dict(own.first), dict(own.second), own.rounds + 1
        for name, d in change.items():
            if self.optimizer == "sgd":
                if self.momentum:
                    d = first[name] = self.momentum * first[name] + d
                model[name] = model[name] + self.server_lr * d
                continue
            first[name], square = self.beta1 * first[name] + (1 - self.beta1) * d, d * d
            if self.optimizer == "adam":
                second[name] = self.beta2 * second[name] + (1 - self.beta2) * square
            else:  # Yogi: the second moment moves by a fixed share of the square, up or down
                second[name] = second[name] - (1 - self.beta2) * torch.sign(second[name] - square) * square
            rate = self.server_lr
            if self.correction:
                rate *= (1 - self.beta2**n) ** 0.5 / (1 - self.beta1**n)
            model[name] = model[name] + rate * first[name] / (second[name].sqrt() + self.epsilon)
        return ServerState(model, dataclasses.replace(own, rounds=n, first=first, second=second))

    @override
    def notes(self, state: ServerState[Own]) -> dict[str, Any]:
        """In private training the share of the round's updates that were clipped."""
        return {"clipped": state.own.clipped} if self.private else {}


@functools.lru_cache(maxsize=2)  # of one run: at the server and on its clients' device
def make_frozen(seed: int, law: str, scale: float, shapes: Named, device: str = "cpu") -> tuple[Tensors, bytes]:
    """The frozen tensors, from nothing but the seed, and 8 bytes that tell them from any others."""
    if device != "cpu":
        made, fingerprint = make_frozen(seed, law, scale, shapes, "cpu")
        return {name: tensor.to(device) for name, tensor in made.items()}, fingerprint
    tensors = {name: initializers.values(seed, name, shape, law) for name, shape in shapes}
    tensors = {name: tensor * scale if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return tensors, digest.digest()


def compare(own: bytes, given: memoryview) -> None:
    """PayloadError where the fingerprints of the two sides' frozen parts differ."""
    if own != given:
        raise PayloadError(f"frozen part {own.hex()}, the other side's is {given.hex()}: another seed, law or version")
