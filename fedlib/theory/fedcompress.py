"""Clusters, codebooks and distillation: the numbers behind the chapter of that name.

The method is that of Tsouvalas et al., arXiv:2401.14211 (`fedlib.methods.fedcompress`); its clusters, score, rule and
distillation are the library's, here they are measured.

    least distortion, at high rate and exactly       -> `HIGH_RATE`, `least_distortion`
    one tensor, a network, averages of clients       -> `points`, `sizes`, `averaged`
    straight through: fixed centroids, moving ones   -> `bounced`, `three_weights`
    four histories for the rule                      -> `TRACES`, `followed`
    a trained network, and its BatchNorm statistics  -> `digits`, `restated`, `absorbed`
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fedlib.core import client
from fedlib.core.method import Phase, train_model
from fedlib.core.plan import Tensors
from fedlib.core.task import Task
from fedlib.methods.fedcompress import clustering, distillation
from fedlib.methods.fedcompress.adaptive_clusters import Rule
from fedlib.rng import Rng
from fedlib.runs import build
from fedlib.runs.spec import Spec
from fedlib.wire import codebook, entropy

_CUT = math.erf(math.sqrt(2 / 3)) ** 3 / (math.erf(math.sqrt(2)) - 4 * math.exp(-2) / math.sqrt(2 * math.pi))
_NORMAL = math.sqrt(3) * math.pi / 2
HIGH_RATE = {"normal": _NORMAL, "Laplace": 4.5, "cut normal": _NORMAL * _CUT}  # (integral of p^(1/3))^3 / 12 at
# variance 1; cut off at two deviations, as the library's initial kernels are
GAP = math.pi * math.e / 6  # uniform quantizer with an entropy coder over the bound, many bits
F64 = torch.float64


def least_distortion(number: int, steps: int = 4000) -> float:
    """Of any so many values for a standard normal number: Lloyd's steps on the law itself, not on draws."""
    share = (torch.arange(number, dtype=F64) + 0.5) / number
    centroids = math.sqrt(3) * torch.special.ndtri(share)  # at high rate they lie by p^(1/3): a wider normal law
    infinite = torch.tensor([math.inf], dtype=F64)
    for _ in range(steps):
        edges = torch.cat([-infinite, (centroids[1:] + centroids[:-1]) / 2, infinite])
        chance = torch.special.ndtr(edges).diff()
        centroids = -(torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)).diff() / chance
    return 1 - float((chance * centroids**2).sum())


def drawn(law: str, n: int, rng: Rng) -> Tensor:
    """So many numbers of variance 1, float32: normal or Laplace."""
    generator = rng.torch()
    if law == "normal":
        return torch.randn(n, generator=generator)
    u = torch.rand(n, generator=generator, dtype=F64) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)).float()


def nearest(tensor: Tensor, centroids: np.ndarray) -> Tensor:
    return clustering.clustered(tensor, torch.from_numpy(centroids))


def described(tensor: Tensor, centroids: np.ndarray) -> dict[str, float]:
    """With the nearest of ascending centroids: distortion over variance, index entropy and bytes in bits a weight."""
    line = clustering.Line.of(tensor)
    found = nearest(tensor, centroids).numpy().ravel()
    counts = np.unique(found, return_counts=True)[1]
    sent = sum(map(len, codebook.encode([found])))
    distortion = clustering.distortion(line, centroids) / float(tensor.double().var(unbiased=False))
    return {"D": distortion, "entropy": entropy.entropy_bits(counts) / found.size, "sent": 8 * sent / found.size}


def points(tensor: Tensor, numbers: Sequence[int], steps: Sequence[int], rng: Rng) -> pd.DataFrame:
    """A row for each number of clusters and of Lloyd's steps after k-means++: columns C, steps, D, entropy, sent."""
    rows, line = [], clustering.Line.of(tensor)
    for number in numbers:
        begun = clustering.seeds(tensor, number, rng)
        for n in steps:
            rows.append({"C": number, "steps": n} | described(tensor, clustering.lloyd(line, begun, n)))
    return pd.DataFrame(rows)


def evenly(tensor: Tensor, step: float) -> dict[str, float]:
    """With multiples of a step over the whole range, as many as that takes."""
    low, high = (round(float(end) / step) for end in tensor.aminmax())
    return described(tensor, (np.arange(low, high + 1) * step).astype(np.float32))


def kernels(state: Mapping[str, Tensor]) -> list[str]:
    """Names of all kernels of convolutions."""
    return [name for name, tensor in state.items() if tensor.ndim == 4]


def clustered_by(state: Tensors, number: int, rng: Rng) -> Tensors:
    """The model with each kernel's weights at the nearest of so many k-means++ centroids."""
    return state | {name: nearest(state[name], clustering.seeds(state[name], number, rng)) for name in kernels(state)}


def sizes(state: Tensors, number: int, rng: Rng) -> dict[str, float]:
    """Bytes of a model clustered by k-means++ alone: as it is sent, with indexes of a fixed width, as a file of float32
    after DEFLATE, and with indexes of a byte each after DEFLATE, or after its Huffman code alone; and the mean entropy
    of an index and mean distortion over variance, kernels weighted by their entries."""
    found, names = clustered_by(state, number, rng), kernels(state)
    arrays = [found[name].numpy() for name in names]
    split = [codebook.split(a) for a in arrays]
    n, books = sum(a.size for a in arrays), 4 * sum(book.size for book, _ in split)
    others = 4 * sum(tensor.numel() for name, tensor in state.items() if name not in names)
    off = [float((found[name] - state[name]).double().square().sum() / state[name].double().var()) for name in names]
    return {
        "sent": sum(map(len, codebook.encode(arrays))) + others,
        "fixed": codebook.fixed_bits([book.size for book, _ in split], [a.size for a in arrays]) / 8 + others,
        "file": deflated(file_of(found)),
        "bytes": sum(deflated(index.tobytes()) for _, index in split) + books + others,
        "huffman": sum(deflated(index.tobytes(), zlib.Z_HUFFMAN_ONLY) for _, index in split) + books + others,
        "entropy": sum(entropy.entropy_bits(np.bincount(index)) for _, index in split) / n,
        "D": sum(off) / n,
    }


def file_of(state: Tensors) -> bytes:
    return b"".join(tensor.numpy().astype("<f4").tobytes() for tensor in state.values())


def deflated(file: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> int:
    """Bytes after DEFLATE, level 6."""
    coder = zlib.compressobj(6, strategy=strategy)
    return len(coder.compress(file)) + len(coder.flush())


def averaged(start: Tensor, most: int, number: int, drift: float, shared: bool, rng: Rng) -> pd.DataFrame:
    """Clients' weights are start [n] plus drift times normal numbers; each clusters its own, by shared or own draws.

    A row for each K up to `most`: distinct values of the average, and the mean square of its error (from the average
    of the weights before clustering) and mean square error of one model, both over the variance of start.
    """
    generator = rng.child("drift").torch()
    total, off = torch.zeros_like(start, dtype=F64), torch.zeros_like(start, dtype=F64)
    rows, alone, variance = [], 0.0, float(start.double().var(unbiased=False))
    for k in range(most):
        weights = start + drift * torch.randn(start.shape, generator=generator)
        own = rng.child("centroids", 0 if shared else k)
        found = nearest(weights, clustering.seeds(weights, number, own))
        error = found.double() - weights.double()
        total, off, alone = total + found.double(), off + error, alone + float(error.square().mean())
        distinct = len(torch.unique((total / (k + 1)).float()))
        mse = float((off / (k + 1)).square().mean())
        rows.append({"K": k + 1, "distinct": distinct, "mse": mse / variance, "one": alone / (k + 1) / variance})
    return pd.DataFrame(rows)


def bounced(target: float, rate: float, steps: int, values: tuple[float, float] = (-1.0, 1.0)) -> np.ndarray:
    """The clustered values of one weight under gradient steps on (q - target)^2 / 2, its two centroids fixed."""
    weight, found = torch.tensor([0.3], dtype=F64), []
    centroids = torch.tensor(values, dtype=F64)
    for _ in range(steps):
        weight.requires_grad_()
        q = clustering.straight_through(weight, centroids)
        (gradient,) = torch.autograd.grad((q - target).square().sum() / 2, [weight])
        found.append(q.item())
        weight = weight.detach() - rate * gradient
    return np.array(found)


def three_weights(targets: Tensor, curvature: Tensor, centroids: Tensor, rate: float, steps: int) -> pd.DataFrame:
    """Three weights start at their targets; they and two centroids take gradient steps on sum h (q - t)^2 / 2. A row a
    step: loss, centroids, weights."""
    weights, centroids, rows = targets.clone(), centroids.clone(), []
    for _ in range(steps):
        pair = [weights.requires_grad_(), centroids.requires_grad_()]
        loss = (curvature * (clustering.straight_through(*pair) - targets).square()).sum() / 2
        rows.append([loss.item(), *centroids.tolist(), *weights.tolist()])
        weights, centroids = (p.detach() - rate * g for p, g in zip(pair, torch.autograd.grad(loss, pair), strict=True))
    return pd.DataFrame(rows, columns=["loss", "c1", "c2", "w1", "w2", "w3"])


def saturating(level: float, gain: float, after: float) -> Callable[[int], float]:
    return lambda r: level + gain * (1 - math.exp(-r / after))


TRACES: dict[str, tuple[Callable[[int], float], ...]] = {  # accuracy and score of rounds 1 to 100
    "both flat": (lambda r: 0.5, lambda r: 20.0),
    "accuracy rising by 0.011": (lambda r: 0.011 * r, lambda r: 20.0),
    "saturating after 6 and 10 rounds": (saturating(0, 0.85, 6), saturating(24, 3, 10)),
    "saturating after 12 and 20 rounds": (saturating(0, 0.90, 12), saturating(24, 3, 20)),
}


def followed(trace: str, rule: Rule, rounds: int = 100) -> list[int]:
    """Clusters in force in each round, and in the one after the last."""
    histories = [[value(r) for r in range(1, rounds + 1)] for value in TRACES[trace]]
    numbers = [rule.least]
    for r in range(1, rounds + 1):
        numbers.append(rule.following(histories[0][:r], histories[1][:r], numbers))
    return numbers


def digits(epochs: int, seed: int) -> tuple[Task, Tensors]:
    """scikit-learn's digits, and `pooled4` trained on all training images by Adam, 64 a step."""
    labels = dict.fromkeys(("paper", "name", "group", "label", "split"), "theory")
    settings = dict(method="fedavg", hyper={}, data="digits", model="pooled4", partition={"kind": "iid", "seed": 0})
    counts = dict(clients=1, cohort=1, rounds=1, epochs=epochs, batch=64, evaluate_every=1, seed=seed)
    spec = Spec(**labels, **settings, **counts, profile="smoke", lr=1e-3, optimizer="adam")  # type: ignore[arg-type]
    job = build.job(spec, torch.device("cpu"))
    task, phase = job.task, Phase(job.task.plan)
    local = train_model(task, task.initial(), len(task.train[1]))
    member = client.Member(0, Rng(seed), task.train, local, None)
    client.enter(member, 0, phase)
    client.train(job.method, phase, [member])
    return task, {name: tensor.detach() for name, tensor in (local.trainable | local.frozen).items()}


def accuracy(task: Task, state: Tensors) -> float:
    """Share of the test images, BatchNorm with the state's statistics."""
    return client.evaluate(task, state, 0)[0][0] / len(task.test[1])


def restated(task: Task, state: Tensors, images: Tensor, batch: int = 128) -> Tensors:
    """The model with the statistics of these images in place of its own."""
    found = {name: tensor.clone() for name, tensor in state.items()}
    distillation.recalibrate(found, images, batch, task)
    return found


@torch.no_grad()
def absorbed(task: Task, state: Tensors, images: Tensor) -> Tensors:
    """The same function with the statistics of these images: scale and shift of each BatchNorm make up for them."""
    found, layers = dict(state), {n: m for n, m in task.network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
        for name, layer in layers.items()
    ]
    task.network.eval()
    task.logits(state, images)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        mean, variance = inputs[name].mean((0, 2, 3)), inputs[name].var((0, 2, 3))
        scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + layer.eps).sqrt()
        found[f"{name}.weight"] = scale * (variance + layer.eps).sqrt()
        found[f"{name}.bias"] = state[f"{name}.bias"] + scale * (mean - state[f"{name}.running_mean"])
        found |= {f"{name}.running_mean": mean, f"{name}.running_var": variance}
    return found
