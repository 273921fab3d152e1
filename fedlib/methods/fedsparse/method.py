"""FedPM: Isik, Pase, Gunduz, Weissman, Zorzi, "Sparse Random Networks for Communication-Efficient Federated Learning",
ICLR 2023 (code: `BerivanIsik/sparse-random-networks`, cf6b549); and its regularized form: Mestoukirdi, Esrafilian,
Gesbert, Li, Gresset, "Communication-Efficient Federated Learning via Regularized Sparse Random Networks", IEEE
Communications Letters 2024, of which the abstract alone could be read: its penalty here is the one that agrees with it.

    fixed random weights, scores s, theta = sigma(s)  -> `fedlib.methods.fedsparse.masks.fixed_weights`, `begin`
    mask m ~ Bern(theta), straight-through            -> `mask`, `loss`
    penalty on the keep-probabilities theta           -> `regularizer`
    upload of one mask                                -> `upload`
    mean of masks, or mode of a Beta posterior        -> `aggregate`

lam = 0 is FedPM. `threshold` is FedMask, `top` keeps the largest scores; all else is FedPM's. Biases are masked too.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.averaging import RunningMean
from fedlib.core.method import Local, Method, ServerState, Sizes
from fedlib.core.plan import Samples, Shapes, Tensors, all_finite, count
from fedlib.core.settings import choice, integer, number
from fedlib.core.uploads import Buffer, Update, Uploads
from fedlib.errors import PayloadError, SpecError
from fedlib.methods.fedsparse import masks
from fedlib.methods.messages import pack_seed, positive, unpack_seed
from fedlib.rng import Rng, Stream, normal
from fedlib.wire import container
from fedlib.wire.contexts import BUCKETS, buckets

FEW = 10  # kept weights below which a layer counts as collapsed
MASKS = 5  # of an evaluation by sampling
log = logging.getLogger("fedlib")


@dataclass(frozen=True)
class Own:
    """What the server keeps beside theta; all but the seed for the Bayesian aggregation alone."""

    seed: int  # of the fixed weights, 64 bits
    rounds: int = 0  # so far
    masks: int = 0  # received since the posterior last started afresh
    kept: Tensor | None = None  # [n]: in how many of these masks each entry is 1


@dataclass(frozen=True, kw_only=True)
class FedPM(Method[Own]):
    """The server's model is `theta` [n], the probabilities with which the network's parameters are kept."""

    name = "fedpm"
    sections = ("ones", "mask")
    own_type = Own

    lam: float = number(1.0, 0, 1e6)  # weight of the penalty; 0 is FedPM
    # or the entropy of the mean, "pooled_entropy", or the mean of entropies, "mean_entropy"
    penalty: str = choice("mean_prob", "pooled_entropy", "mean_entropy")
    # "threshold": theta > 1/2; "top": the share `keep` of each layer with the largest theta
    masking: str = choice("bernoulli", "threshold", "top")
    keep: float = number(0.5, 1e-6, 1)
    ste: str = choice("identity", "prob")  # gradient of the mask by theta: 1, or "prob": theta, as in the code
    weight_scale: str = choice("kaiming", *masks.SCALES)  # "fedpm" as in the code; "critical": neutral at theta = 1/2
    aggregation: str = choice("mean", "bayes")  # or "bayes"
    weighting: str = choice("samples", "clients")  # of the mean; or "clients"
    prior: float = number(1.0, 1, 1e6)  # alpha = beta of the Beta prior
    reset_period: int = integer(1, 1, 10**9)  # rounds after which the posterior starts afresh; 1 in the code
    delta: float = number(1e-3, 1e-9, 0.49)  # how far from 0 and 1 a score is made of theta; 0.01 in the code
    soften: float = number(0.0, 0, 0.49)  # what a 0 counts in the server's mean, and a 1 less than 1; 0.01 in the code
    # contexts of the mask's coder: none; "layers"; "global": the theta that both sides know
    coding: str = choice("pooled", "layers", "global")
    # theta as float32; or "levels": the values that occur, and which one each entry has
    downlink: str = choice("full", "levels")
    # mean over five masks; "mean": weights times theta; "threshold": theta > 1/2
    evaluated: str = choice("sampled", "mean", "threshold")

    # The network: fixed weights, and which of them are kept

    @property
    def shapes(self) -> Shapes:
        """All parameters in the network's order, weights before bias: the order of a mask's bits."""
        if self.task.statistics:
            raise SpecError(
                "model: fedpm masks networks without BatchNorm, whose statistics depend on the mask; use another"
            )
        return self.task.parameters

    @property
    def n(self) -> int:
        return count(self.shapes)

    def weights(self, seed: int, device: torch.device | str = "cpu") -> Tensor:
        """The fixed weights w [n], which the caller must not change."""
        return masks.kept_weights(seed, self.weight_scale, tuple(self.shapes.items()), str(device))

    def mask(self, theta: Tensor, chance: Tensor) -> Tensor:
        """The mask of a forward pass [n], ones and zeros; `chance` [n] is uniform on [0, 1)."""
        if self.masking == "bernoulli":
            return positive(theta - chance)
        if self.masking == "threshold":
            return positive(theta - 0.5)
        sizes = [shape.numel() for shape in self.shapes.values()]
        return torch.cat([masks.largest(part, self.keep) for part in theta.split(sizes)])

    def draw_mask(self, theta: Tensor, stream: Stream) -> Tensor:
        """A mask [n], ones and zeros; m ~ Bern(theta) unless `masking` has its own rule."""
        return self.mask(theta, stream.uniform(*theta.shape))

    def regularizer(self, theta: Tensor) -> Tensor:
        """What lam weighs, between 0 and 1: a stand-in for the bits a parameter of the mask."""
        if self.penalty == "mean_prob":
            return theta.mean()
        if self.penalty == "pooled_entropy":
            return masks.binary_entropy(theta.mean())
        return masks.binary_entropy(theta).mean()

    # The method

    @override
    def initial(self, rng: Rng) -> ServerState[Own]:
        """theta of standard normal scores."""
        theta = torch.sigmoid(torch.from_numpy(normal(rng.child("scores").seed(), 0, self.n)))
        return ServerState({"theta": theta}, Own(rng.child("fixed weights").seed()))

    @override
    def broadcast(self, state: ServerState[Own]) -> bytes:
        sections = [pack_seed(state.own.seed), *masks.pack_theta(state.model["theta"], self.downlink == "levels")]
        return container.pack("fedpm.down", self.fingerprint(), 0, sections)

    @override
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        limits = [8, 4 * self.n]
        if self.downlink == "levels" and len(container.section_sizes(message)) == 3:
            limits.append(4 * self.n)
        first, *packed = container.unpack(message, "fedpm.down", self.fingerprint(), limits).sections
        seed, theta = unpack_seed(first), masks.unpack_theta(packed, self.n).to(self.task.device)
        clamped = theta.double().clamp(self.delta, 1 - self.delta)  # float32 has no 1 - 1e-9
        s = torch.logit(clamped).float().requires_grad_()
        return Local({"s": s}, {"w": self.weights(seed, self.task.device), "theta": theta}, len(shard[1]), seed)

    @override
    def draw(self, progress: float, stream: Stream) -> Tensor:
        return stream.uniform(self.n if self.masking == "bernoulli" else 1)

    @override
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Tensor) -> Tensor:
        theta = torch.sigmoid(trainable["s"])
        mask = self.mask(theta.detach(), drawn)
        through = theta if self.ste == "identity" else theta * theta / 2
        kept = mask + (through - through.detach())  # the mask to the bit, with the gradient of `through`
        loss = self.task.loss(masks.layers(frozen["w"] * kept, self.shapes), batch)
        return loss + self.lam * self.regularizer(theta) if self.lam else loss

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        s = local.trainable["s"].detach()
        if not all_finite(s):
            raise PayloadError("scores are not finite: local training diverged; lower the learning rate")
        mask = self.draw_mask(torch.sigmoid(s), rng.child("upload").stream(self.task.device)).bool().cpu().numpy()
        sections = masks.pack_mask(mask, self.contexts(local.frozen["theta"].cpu()))
        # A mask means nothing over the weights of another seed.
        return container.pack("fedpm.up", self.fingerprint(f"fedpm {local.seed}"), local.samples, sections)

    def contexts(self, theta: Tensor) -> np.ndarray | None:
        """Which entries share a model of the coder [n]: all, those of a tensor, or those of about the same theta."""
        if self.coding == "pooled":
            return None
        if self.coding == "layers":
            sizes = [shape.numel() for shape in self.shapes.values()]
            return np.repeat(np.arange(len(sizes)), sizes)
        side = (theta > 0.5).numpy()
        return BUCKETS * side.astype(np.int64) + buckets(torch.minimum(theta, 1 - theta).numpy(), 2 / 3)

    @override
    def aggregate(self, state: ServerState[Own], uploads: Uploads) -> ServerState[Own]:
        n, own = self.n, state.own
        contexts, fingerprint = self.contexts(state.model["theta"]), self.fingerprint(f"fedpm {own.seed}")

        def read(upload: Buffer) -> Update:
            message = container.unpack(upload, "fedpm.up", fingerprint, [4, 64 + n // 8])
            return {"theta": masks.unpack_mask(message.sections, n, contexts)}, message.samples

        weighted = self.weighting == "samples" and self.aggregation == "mean"
        mean = RunningMean({"theta": torch.Size([n])})
        for tensors, samples in uploads.read(read):
            mean.add(tensors, samples if weighted else 1)
        theta, received = mean.value()["theta"], mean.total
        if self.aggregation == "mean":
            return ServerState({"theta": self.soften + (1 - 2 * self.soften) * theta}, own)
        kept = (theta * received).round()  # whole again: equal counts give equal theta
        if own.rounds % self.reset_period and own.kept is not None:
            kept, received = kept + own.kept, received + own.masks
        alpha = self.soften * received + (1 - 2 * self.soften) * kept + self.prior
        mode = (alpha - 1) / (torch.tensor([float(received)]) + 2 * self.prior - 2)
        return ServerState({"theta": mode}, Own(own.seed, own.rounds + 1, received, kept))

    # What is evaluated, stored, and said of a round

    @override
    def models(self, state: ServerState[Own], rng: Rng) -> list[Tensors]:
        """The networks whose mean accuracy counts; theta is not clamped here."""
        theta, w = state.model["theta"], self.weights(state.own.seed)
        if self.evaluated == "mean":
            kept = [theta]
        elif self.evaluated == "threshold":
            kept = [positive(theta - 0.5)]
        else:
            draws = MASKS if self.masking == "bernoulli" else 1
            kept = [self.draw_mask(theta, rng.child(i).stream()) for i in range(draws)]
        return [masks.layers(w * mask, self.shapes) for mask in kept]

    def save_model(self, state: ServerState[Own], rng: Rng) -> bytes:
        """The final model as a file: the seed of its weights, and one mask drawn from theta, coded."""
        mask = self.draw_mask(state.model["theta"], rng.stream()).bool().numpy()
        sections = [pack_seed(state.own.seed), *masks.pack_mask(mask, None)]
        return container.pack("fedpm.model", self.fingerprint(), 0, sections)

    def load_model(self, file: bytes) -> Tensors:
        """The network's tensors, from the file alone. PayloadError for any other file."""
        seed, *mask = container.unpack(file, "fedpm.model", self.fingerprint(), [8, 4, 64 + self.n // 8]).sections
        return masks.layers(self.weights(unpack_seed(seed)) * masks.unpack_mask(mask, self.n, None), self.shapes)

    @override
    def notes(self, state: ServerState[Own]) -> dict[str, Any]:
        """Mean theta of each tensor of weights, bytes of the model's file, tensors that keep fewer than ten weights."""
        parts = masks.layers(state.model["theta"], self.shapes)
        said: dict[str, Any] = {"density": {name: round(float(parts[name].mean()), 6) for name in self.task.weights}}
        said["model file"] = len(self.save_model(state, Rng(state.own.seed)))
        if collapsed := [name for name in self.task.weights if float(parts[name].sum()) < FEW]:
            said["collapsed"] = collapsed
            names = ", ".join(collapsed)
            log.warning("fewer than %d weights are kept in %s: the network may have collapsed", FEW, names)
        return said

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        """n H(k / n) of a mask with k ones; and by the formula of the official code, whose masks hold 0.01 and 0.99.

        It adds log2 n for an upload, and never falls below 0.0808 bits a parameter.
        """
        n, ones = self.n, masks.count_ones(upload)
        official = n * masks.bits_a_parameter(0.01 + 0.98 * ones / n) + math.log2(n)
        return Sizes(n * masks.bits_a_parameter(ones / n), {"official code": official})
