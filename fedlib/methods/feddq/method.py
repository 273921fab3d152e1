"""FedDQ and the schedules around it: every tensor of an update is quantized, with a width that may change by the round.

Qu, Song, Tsui, "FedDQ: Communication-Efficient Federated Learning with Descending Quantization", GLOBECOM 2022
(arXiv:2110.02291). Of the paper, the abstracts could be read; the rule is that of its code (`lqu-001/FedDQ`, 8946cc1).

    the number of bits   -> `schedules` in this room: the range rule, fixed widths, AdaQuantFL's, and a loss-based one
    the quantizers       -> `quantizers` in this room
    the message          -> `fedlib.wire.levels`
    a round              -> `survey`, `finish`, `server`

The server steps by the mean of the updates that it reads; nothing but integers of the stated width, and two numbers a
tensor, travels up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import Shapes, State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import PayloadError, require_name
from fedlib.methods.feddq import quantizers
from fedlib.methods.feddq.schedules import Hyper as Hyper
from fedlib.methods.feddq.schedules import bounded
from fedlib.methods.feddq.schedules import next_intervals as next_intervals
from fedlib.methods.feddq.schedules import width as width
from fedlib.methods.messages import NO_MORE, pack_model, pack_tensors, unpack_model, unpack_tensors
from fedlib.rng import Rng
from fedlib.wire import bits, container, entropy, levels
from fedlib.wire.levels import Levels

SECTIONS = ("headers", "levels", "scales", "loss")
INTERVALS: Shapes = {"intervals": torch.Size([])}  # for this round, of the schedules that the server sets
LOSS: Shapes = {"loss": torch.Size([])}


def initial(hyper: Hyper, task: Task, rng: Rng) -> State:
    """The model; and, of schedules that follow the loss, the intervals of the first round and no loss yet."""
    shapes = about(hyper, task)
    start = {"intervals": float(bounded(hyper.first, hyper))}
    return task.initial() | {name: torch.full(shape, start.get(name, 0.0)) for name, shape in shapes.items()}


def about(hyper: Hyper, task: Task) -> Shapes:
    """What the server's state holds beside the model: for the record, and for the next round."""
    tensors = torch.Size([len(travelling(hyper, task))])
    losses = {**LOSS, "first loss": torch.Size([])} if hyper.reports else {}
    return {"widths": tensors, "ranges": tensors, **losses, **INTERVALS}


def travelling(hyper: Hyper, task: Task) -> dict[str, torch.Size]:
    """The tensors that are sent, in their order."""
    return task.tensors if hyper.biases == "sent" else task.weights


def models(state: State, hyper: Hyper, task: Task, rng: Rng) -> list[State]:
    return [{name: state[name] for name in task.tensors}]


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    if not hyper.downlink:
        return pack_model("feddq.down", state, 0, hyper, task, INTERVALS)
    rule = Hyper(quantizer="affine_nearest", resolution=hyper.downlink, least=hyper.least, most=hyper.most)
    parts: list[Any] = [*_model(state, rule, task), pack_tensors(state, INTERVALS)]
    return container.pack("feddq.down", task.fingerprint("feddq", hyper), 0, parts)


def received(message: Buffer, hyper: Hyper, task: Task) -> State:
    """The broadcast model and the round's intervals. PayloadError for any other message."""
    if not hyper.downlink:
        model = unpack_model(message, "feddq.down", hyper, task, INTERVALS)[0]
    else:
        limits = [levels.HEADER.size * len(task.tensors), 2 * count(task.tensors), 4]
        read = container.unpack(message, "feddq.down", task.fingerprint("feddq", hyper), limits)
        model = _tensors(read.sections[0], read.sections[1], None, task.tensors, "affine_nearest", False)[0]
        model |= unpack_tensors(read.sections[2], INTERVALS)
    intervals = float(model["intervals"])
    if not (intervals.is_integer() and 1 <= intervals < 2**bits.WIDEST):
        raise PayloadError(f"intervals: {intervals}, expected an integer from 1 to {2**bits.WIDEST - 1}")
    return model


def check_writer(hyper: Hyper) -> None:
    rules, nearest = ("range", "fixed"), ("affine_nearest", "symmetric_nearest")
    require_name("downlink.hyper.schedule", hyper.schedule, rules)
    require_name("downlink.hyper.quantizer", hyper.quantizer, nearest)  # the same model rounded twice is the same


def write_model(model: State, hyper: Hyper, task: Task) -> bytes:
    """Of methods that broadcast the model itself, any one in few levels."""
    return container.pack("feddq.model", task.fingerprint("feddq", hyper), 0, _model(model, hyper, task))


def read_model(data: Buffer | memoryview, hyper: Hyper, task: Task) -> State:
    limits = [levels.HEADER.size * len(task.tensors), sum(2 * s.numel() + 64 for s in task.tensors.values())]
    head, body = container.unpack(data, "feddq.model", task.fingerprint("feddq", hyper), limits).sections
    return _tensors(head, body, None, task.tensors, hyper.quantizer, hyper.coding == "entropy")[0]


def _model(model: State, rule: Hyper, task: Task) -> list[Any]:
    """All tensors, rounded by a rule that draws nothing, as two sections."""
    sent = [quantized(model[name], 0, rule, Rng(0))[0] for name in task.tensors]
    return [levels.headers(sent), levels.pack(sent, rule.coding == "entropy")]


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    """Trained is the model itself; frozen stand its statistics, and what everything was at the start of the round."""
    model = {name: tensor.to(task.device) for name, tensor in received(message, hyper, task).items()}
    frozen = {f"from {name}": model[name].clone() for name in travelling(hyper, task)} | {
        name: model[name] for name in (*task.statistics, *INTERVALS)
    }
    return {name: model[name].requires_grad_() for name in task.weights | task.vectors}, frozen


def survey(trainable: State, frozen: State, shard: tuple[Tensor, Tensor], hyper: Hyper, task: Task) -> State:
    """The training loss of the received model, where it is asked for."""
    if not hyper.reports:
        return {}
    task.network.eval()
    model = trainable | {name: frozen[name] for name in task.statistics}
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(task.logits(model, x), y, reduction="sum")
            for x, y in zip(*(part.split(500) for part in shard), strict=True)
        ]
    return {"loss": torch.stack(losses).sum() / len(shard[1])}


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> None:
    return None


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], drawn: None, hyper: Hyper, task: Task
) -> Tensor:
    return task.loss(trainable | {name: frozen[name] for name in task.statistics}, batch)


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    """Each tensor's change since the broadcast, quantized; then the loss that was measured, if any."""
    local, sent, scales = trainable | frozen, [], []
    for name in travelling(hyper, task):
        x = local[name].detach() - frozen[f"from {name}"]
        found, own = quantized(x, int(frozen["intervals"]), hyper, rng.child("upload", name))
        sent.append(found)
        scales.append(own)
    parts = [levels.headers(sent), levels.pack(sent, hyper.coding == "entropy"), b"".join(s.tobytes() for s in scales)]
    report = pack_tensors(frozen, LOSS) if hyper.reports else b""
    return container.pack("feddq.up", task.fingerprint("feddq", hyper), samples, [*parts, report])


def quantized(x: Tensor, intervals: int, hyper: Hyper, rng: Rng) -> tuple[Levels, np.ndarray]:
    """One tensor by schedule and quantizer; and its scales, of the norm quantizers. `intervals`: set by the server."""
    low, span = quantizers.extent(x)
    if hyper.schedule == "range":
        intervals = 2 ** width(span, hyper) - 1
    elif hyper.schedule == "fixed":
        intervals = 2**hyper.width - 1
    none = np.empty(0, np.float32)
    if hyper.quantizer in quantizers.NORMED:
        return quantizers.normed(x, intervals, rng, _bucket(hyper))
    if span < quantizers.NOTHING:
        return constant(low), none
    if hyper.quantizer == "symmetric_nearest":
        return quantizers.symmetric(x, span, intervals.bit_length()), none
    return quantizers.affine(x, low, span, intervals, rng if hyper.quantizer == "affine_stochastic" else None), none


def constant(value: float) -> Levels:
    """A tensor of one value."""
    return Levels(0, value, 0.0, np.empty(0, np.uint8))


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    """w + mean of the updates, by samples. A running variance that rounding made negative becomes 0."""
    shapes = travelling(hyper, task)
    kept = {name: shape for name, shape in about(hyper, task).items() if name in ("widths", "ranges", "loss")}
    mean = RunningMean({**shapes, **kept})
    for tensors, samples in uploads.read(lambda upload: read_update(upload, hyper, task)):
        mean.add(tensors, samples)
    average = mean.value()
    new = state | {name: average[name] for name in kept} | {name: state[name] + average[name] for name in shapes}
    for name in task.statistics:
        if name.endswith("running_var"):
            new[name] = new[name].clamp(min=0)
    if hyper.schedule in ("ascending", "loss"):
        loss = float(average["loss"])
        first = float(state["first loss"]) or loss
        new |= {"first loss": torch.tensor(first), "intervals": torch.tensor(float(next_intervals(loss, first, hyper)))}
    return new


def read_update(upload: Buffer, hyper: Hyper, task: Task) -> tuple[State, int]:
    """The update's tensors with their `widths` [tensors] and `ranges` [tensors], the loss if any, the sample count."""
    head, body, scales, loss, samples = _sections(upload, hyper, task)
    shapes = travelling(hyper, task)
    tensors, found = _tensors(head, body, scales, shapes, hyper.quantizer, hyper.coding == "entropy")
    about_them = {
        "widths": torch.tensor([float(t.width) for t in found]),
        "ranges": torch.tensor([_range(t, hyper) for t in found]),
    }
    reported = unpack_tensors(loss, LOSS if hyper.reports else NO_MORE)
    if hyper.reports and reported["loss"] < 0:
        raise PayloadError(f"loss: {float(reported['loss'])}, expected none below 0")
    return tensors | about_them | reported, samples


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    """Entries times their width, and 32 bits a scale: what FedDQ's code counts, no header."""
    head, _, scales, _, _ = _sections(upload, hyper, task)
    sizes = [shape.numel() for shape in travelling(hyper, task).values()]
    widths = [width for width, _, _ in levels.read_headers(head, len(sizes))]
    return float(sum(n * b for n, b in zip(sizes, widths, strict=True)) + 8 * len(scales))


def other_bits(upload: Buffer, hyper: Hyper, task: Task) -> dict[str, float]:
    """The levels' empirical entropy: a histogram for each tensor."""
    head, body, _, _, _ = _sections(upload, hyper, task)
    found = levels.unpack(head, body, _sizes(hyper, task), hyper.coding == "entropy")
    return {"entropy": float(sum(entropy.entropy_bits(np.bincount(t.levels)) for t in found if t.width))}


def notes(state: State, hyper: Hyper, task: Task) -> dict[str, Any]:
    """In the mean over the round's clients: bits an entry and range of each tensor, and the loss, where measured."""
    names = list(travelling(hyper, task))
    found: dict[str, Any] = {
        what: {name: float(f"{value:.6g}") for name, value in zip(names, state[what], strict=True)}
        for what in ("widths", "ranges")
    }
    if hyper.reports:
        found["loss"] = float(state["loss"])
    return found


def _sizes(hyper: Hyper, task: Task) -> list[int]:
    return [shape.numel() for shape in travelling(hyper, task).values()]


def _bucket(hyper: Hyper) -> int:
    return quantizers.BUCKET if hyper.quantizer == "buckets" else 0


def _sections(upload: Buffer, hyper: Hyper, task: Task) -> tuple[memoryview, memoryview, memoryview, memoryview, int]:
    sizes = _sizes(hyper, task)
    scales = 4 * sum(quantizers.scales_of(n, _bucket(hyper)) for n in sizes) * (hyper.quantizer in quantizers.NORMED)
    limits = [levels.HEADER.size * len(sizes), sum(2 * n + 64 for n in sizes), scales, 4 * hyper.reports]
    read = container.unpack(upload, "feddq.up", task.fingerprint("feddq", hyper), limits)
    if len(read.sections[2]) != scales:
        raise PayloadError(f"scales: {len(read.sections[2])} bytes, expected {scales}")
    head, body, scale, loss = read.sections
    return head, body, scale, loss, read.samples


def _tensors(
    head: memoryview,
    body: memoryview,
    scales: memoryview | None,
    shapes: Mapping[str, torch.Size],
    quantizer: str,
    coded: bool,
) -> tuple[State, Sequence[Levels]]:
    """The tensors by name, and their levels."""
    sizes = [shape.numel() for shape in shapes.values()]
    found = levels.unpack(head, body, sizes, coded)
    tensors: State = {}
    numbers, start = np.frombuffer(scales or b"", "<f4"), 0
    if not np.isfinite(numbers).all():
        raise PayloadError("scales: not finite, only finite numbers travel")
    for (name, shape), n, part in zip(shapes.items(), sizes, found, strict=True):
        if quantizer in quantizers.NORMED:
            bucket = quantizers.BUCKET if quantizer == "buckets" else 0
            end = start + quantizers.scales_of(n, bucket)
            tensors[name] = quantizers.restored_normed(part, n, numbers[start:end], bucket).view(shape)
            start = end
        else:
            tensors[name] = quantizers.restored(part, n, quantizer).view(shape)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise PayloadError(f"{name}: levels and header give numbers that are not finite")
    return tensors, found


def _range(found: Levels, hyper: Hyper) -> float:
    """Of the tensor that was quantized: its highest entry has the highest level. A norm quantizer does not tell."""
    if hyper.quantizer in quantizers.NORMED or not found.width:
        return 0.0
    highest = 2**found.width - 1 if hyper.quantizer == "symmetric_nearest" else int(found.levels.max())
    return found.second * highest
