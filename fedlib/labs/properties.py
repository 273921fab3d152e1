"""Answers that are functions: what they must do, on known vectors and on random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
import torch

from fedlib.labs.answers import NotYet, describe
from fedlib.rng import uniform
from fedlib.wire import bits

ERRORS = 6  # standard errors that a mean may be off: a right function is never refused by chance


@dataclass(frozen=True)
class Property:
    """functions: how many the answer is a tuple of. run: NotYet where they do not do what was asked."""

    run: Callable[..., None]
    functions: int = 1

    def test(self, question: str, answer: Any) -> None:
        functions = answer if isinstance(answer, tuple) else (answer,)
        if len(functions) != self.functions or not all(map(callable, functions)):
            expected = "a function" if self.functions == 1 else f"{self.functions} functions, as (first, second)"
            raise NotYet(f"Expected {expected}; this is {describe(answer)}. Pass the functions, not what they return.")
        self.run(*functions)


def require(right: bool | np.bool_, text: str) -> None:
    if not right:
        raise NotYet(text)


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a student's function returns; what it raises becomes NotYet."""
    try:
        return function(*arguments)
    except Exception as error:
        name = getattr(function, "__name__", "your function")
        raise NotYet(f"{name} raised {type(error).__name__}: {error}. Call it yourself to see where.") from error


def array(result: Any, n: int, kinds: str, what: str) -> np.ndarray:
    """An array [n] of one of the dtype kinds."""
    names = {"b": "bool", "iu": "integers", "f": "floats", "biu": "integers or bool"}
    values = np.asarray(result.detach() if isinstance(result, torch.Tensor) else result)
    right = values.shape == (n,) and values.dtype.kind in kinds
    require(right, f"{what} should be an array of {names[kinds]}, shape ({n},); this is {describe(values)}.")
    return values


def normal(n: int) -> np.ndarray:
    """A known vector, float32 [n]."""
    return np.random.default_rng(7).standard_normal(n).astype(np.float32)


def quantizer(quantize: Callable[..., Any], restore: Callable[..., Any]) -> None:
    """quantize(x, s, rng) -> levels, low, step; restore(levels, low, step) -> x hat, unbiased, within one step."""
    x, rng = normal(400), np.random.default_rng(3)
    for s in (1, 3, 255):
        step, total, draws = float(np.ptp(x)) / s, np.zeros(len(x)), 200
        for _ in range(draws):
            made = call(quantize, x, s, rng)
            three = isinstance(made, tuple | list) and len(made) == 3
            require(three, f"quantize should return levels, low, step; this is {describe(made)}.")
            levels = array(made[0], len(x), "iu", "levels")
            require(levels.min() >= 0 and levels.max() <= s, f"With s = {s} a level lies outside 0 to {s}.")
            hat = array(call(restore, *made), len(x), "f", "what restore returns")
            total += hat
            far = np.abs(hat - x).max() > step * 1.001
            require(not far, f"With s = {s} an entry moved by more than one step: is a step the range divided by s?")
        off = np.abs(total / draws - x).max()
        require(
            off <= ERRORS * step / 2 / np.sqrt(draws),
            f"With s = {s} the mean of {draws} draws is not the entry: up with probability f, the share of the step.",
        )
    flat = np.full(5, 0.25, np.float32)
    hat = np.asarray(call(restore, *call(quantize, flat, 3, rng)))
    require(np.allclose(hat, flat), "A vector of five equal entries does not come back: what is the step there?")


def packing(pack: Callable[..., Any], unpack: Callable[..., Any]) -> None:
    """pack(levels, width) -> bytes, lowest bit first; unpack(data, n, width) -> levels."""
    for width in range(1, 9):
        for n in (1, 7, 8, 100):
            levels = np.random.default_rng(n).integers(0, 2**width, n)
            data = call(pack, levels, width)
            require(isinstance(data, bytes), f"pack should return bytes; this is {describe(data)}.")
            size = bits.size(n, width)
            require(len(data) == size, f"{n} levels of {width} bits fill {size} bytes; pack made {len(data)}.")
            back = array(call(unpack, data, n, width), n, "biu", "what unpack returns")
            require((back == levels).all(), f"{n} levels of {width} bits do not come back as they went.")
            same = data == bits.pack(levels.astype(np.uint8), width)
            require(same, f"Round trip well, but the order of the bits is another ({n} levels of {width} bits).")


def masked(mask: Callable[..., Any]) -> None:
    """mask(scores, chance): True where chance < sigmoid(score)."""
    scores, chance = torch.tensor([-50.0, 50.0, 0.0, 0.0, 1.0]), torch.tensor([0.01, 0.99, 0.49, 0.51, 0.72])
    result = call(mask, scores, chance)
    right = isinstance(result, torch.Tensor) and result.shape == scores.shape and result.is_floating_point()
    require(right, f"draw should return a tensor of floats, shape (5,); this is {describe(result)}.")
    require(
        result.tolist() == [0.0, 1.0, 1.0, 0.0, 1.0],
        "For five known scores and chances the mask is another. It is 1 with probability sigmoid(score), "
        "which is to say: where the chance lies below that number.",
    )


def straight_through(through: Callable[..., Any]) -> None:
    """through(theta, mask): the mask's value, the gradient 1 by theta."""
    theta, mask = torch.tensor([0.2, 0.7, 0.5], requires_grad=True), torch.tensor([1.0, 0.0, 1.0])
    result = call(through, theta, mask)
    right = isinstance(result, torch.Tensor) and torch.allclose(result.detach(), mask)
    require(right, "The value should be the mask's.")
    require(result.requires_grad, "No gradient reaches theta: which part is detached, and which not?")
    (gradient,) = torch.autograd.grad((result * torch.tensor([1.0, 2.0, 3.0])).sum(), theta)
    require(gradient.tolist() == [1.0, 2.0, 3.0], "The derivative by theta should be 1 for each entry.")


def entropy(function: Callable[..., Any]) -> None:
    """H(p) in bits, 0 at both ends."""
    for p, expected in ((0.5, 1.0), (0.25, 0.8112781), (0.75, 0.8112781), (0.01, 0.0807931), (0.0, 0.0), (1.0, 0.0)):
        result = call(function, p)
        number = np.ndim(result) == 0 and isinstance(result, SupportsFloat)
        require(number, f"H should return one number; this is {describe(result)}.")
        right = abs(float(result) - expected) < 1e-6
        require(right, f"At p = {p} the value is another. Is the logarithm to base 2, and are both ends 0?")


def chance(function: Callable[..., Any]) -> None:
    """chance(u, noise): u / noise clipped to 0 and 1."""
    u = np.array([0.5, -0.5, 0.5, 3.0, -1.0], np.float32)
    n = np.array([1.0, 1.0, -1.0, 2.0, -4.0], np.float32)
    result = array(call(function, u, n), 5, "f", "what chance returns")
    require(
        np.allclose(result, [0.5, 0, 0, 1, 0.25]),
        "For five known pairs the chance is another. The mean of mask times noise should be u, and a chance lies "
        "between 0 and 1.",
    )


def found_in_noise(find: Callable[..., Any]) -> None:
    """find(u, noise, rng) -> bool [d], whose mean times the noise is u where that can be, and as near as can be."""
    n = uniform(5, 0, 300) * np.float32(0.1)
    u, rng, draws = n * np.linspace(-1, 2, 300, dtype=np.float32), np.random.default_rng(1), 400
    masks = np.stack([array(call(find, u, n, rng), 300, "b", "the mask") for _ in range(draws)])
    off = np.abs(masks.mean(0) - np.clip(u / n, 0, 1)).max()
    right = off <= ERRORS * 0.5 / np.sqrt(draws)
    require(
        right, f"The mean of {draws} masks is another. Is the noise kept with probability u / noise, within 0 and 1?"
    )


def message(write: Callable[..., Any], read: Callable[..., Any]) -> None:
    """write(seed, mask) -> 8 bytes little-endian and packed bits; read(data, d, magnitude) -> noise times mask."""
    for d, seed in ((5, 1), (64, 2**63 + 5), (1001, 12345)):
        mask = np.random.default_rng(d).random(d) < 0.5
        data = call(write, seed, mask)
        require(isinstance(data, bytes), f"write should return bytes; this is {describe(data)}.")
        size = 8 + bits.size(d)
        require(len(data) == size, f"A message of {d} entries takes {size} bytes; this has {len(data)}.")
        right = data == seed.to_bytes(8, "little") + bits.pack(mask)
        require(
            right, "The length is right, the bytes are not: the seed first, lowest byte first, then the packed mask."
        )
        result = array(call(read, data, d, 0.5), d, "f", "what read returns")
        expected = uniform(seed, 0, d) * np.float32(0.5) * mask
        require(np.allclose(result, expected), "read does not give noise(seed, d, magnitude) times the mask.")


def clipping(clip: Callable[..., Any]) -> None:
    """clip(update, bound): at most `bound` long, in the same direction; a short one as it was."""
    for bound in (0.5, 2.0, 1e6):
        for update in (normal(50), np.zeros(50, np.float32)):
            result = array(call(clip, update, bound), 50, "f", "what clip returns")
            expected = update * min(1.0, bound / max(float(np.linalg.norm(update)), 1e-30))
            require(np.isfinite(result).all(), "An update of zeros gives numbers that are not finite.")
            right = np.allclose(result, expected, rtol=1e-4)
            require(right, "A long update is scaled to the bound as a whole, a shorter one stays as it is.")


def noisy_mean(mean: Callable[..., Any]) -> None:
    """mean(updates, bound, multiplier, rng): sum of clipped updates and noise, over how many there are."""
    updates, rng = [normal(20_000), normal(20_000) * 1e-6, np.zeros(20_000, np.float32)], np.random.default_rng(2)
    exact = (updates[0] * (6 / np.linalg.norm(updates[0])) + updates[1]) / 3
    quiet = array(call(mean, updates, 6.0, 0.0, rng), 20_000, "f", "what noisy_mean returns")
    require(np.allclose(quiet, exact, atol=1e-6), "Without noise it is not the mean of the clipped updates.")
    noise = array(call(mean, updates, 6.0, 2.0, rng), 20_000, "f", "what noisy_mean returns") - exact
    right = abs(float(noise.std()) / 4 - 1) < 0.05 and abs(float(noise.mean())) < 0.2
    require(right, "The deviation of the noise is another: multiplier times bound in the sum, before dividing.")


def codec(encode: Callable[..., Any], decode: Callable[..., Any]) -> None:
    """encode(update, rng) -> bytes, decode(data, d) -> update: from the bytes alone, and in the update's direction."""
    sent = []
    for d in (4736, 1001, 64):
        update = 0.01 * np.random.default_rng(d).standard_t(3, d).astype(np.float32)
        data = call(encode, update, np.random.default_rng(0))
        require(isinstance(data, bytes), f"encode should return bytes; this is {describe(data)}.")
        longest = 4 * d + 64
        require(len(data) <= longest, f"{d} entries became {len(data)} bytes; the server takes at most {longest}.")
        sent.append((update, data))
    for update, data in sent:  # after all were encoded: what encode left in a variable is another update's
        result = array(call(decode, data, len(update)), len(update), "f", "what decode returns")
        require(np.isfinite(result).all(), "What decode returns is not finite.")
        again = np.asarray(call(decode, data, len(update)))
        require((result == again).all(), "The same bytes decode to two updates: chance belongs into encode.")
        cosine = float(result @ update) / max(float(np.linalg.norm(result) * np.linalg.norm(update)), 1e-30)
        require(
            cosine > 0.1, "What is decoded does not point where the update does. Does decode read all from its bytes?"
        )
    zeros = np.zeros(64, np.float32)
    result = np.asarray(call(decode, call(encode, zeros, np.random.default_rng(0)), 64))
    require(np.isfinite(result).all(), "An update of zeros does not survive: look for a division.")


def front(on_front: Callable[..., Any]) -> None:
    """on_front(costs, accuracies) -> bool [n]: no other point is as good in both and better in one."""
    costs, accuracies = [10, 20, 30, 20, 5, 30], [0.7, 0.9, 0.9, 0.8, 0.1, 0.95]
    result = array(call(on_front, costs, accuracies), 6, "b", "what on_front returns")
    right = result.tolist() == [True, True, False, False, True, True]
    require(
        right,
        "Of six known points others are on the front. A point is off it if another is nowhere worse and once better.",
    )
    twice = array(call(on_front, [1, 1], [0.5, 0.5]), 2, "b", "what on_front returns")
    require(twice.all(), "Two points that are equal do not beat each other.")
