"""FedDQ and the schedules around it: every tensor of an update is quantized, with a width that may change by the round.

Qu, Song, Tsui, "FedDQ: Communication-Efficient Federated Learning with Descending Quantization", GLOBECOM 2022
(arXiv:2110.02291). Of the paper, the abstracts could be read; the rule is that of its code (`lqu-001/FedDQ`, 8946cc1).

    the number of bits   -> `schedules` in this room: the range rule, fixed widths, AdaQuantFL's, and a loss-based one
    the quantizers       -> `quantizers` in this room
    the message          -> `fedlib.wire.levels`
    a round              -> `FedDQ.begin`, `upload`, `aggregate`

Up travel integers of the stated width and a few numbers a tensor; the server steps by the mean of what it reads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.averaging import RunningMean
from fedlib.core.method import Draws, Local, ModelWriter, ServerState, Sizes, train_model
from fedlib.core.plan import Samples, Shapes, Tensors, count
from fedlib.core.settings import choice, number, switch
from fedlib.core.uploads import Buffer, Update, Uploads
from fedlib.errors import PayloadError, require_name, require_number
from fedlib.methods.feddq.schedules import Rule
from fedlib.methods.messages import pack_broadcast, pack_tensors, unpack_broadcast, unpack_tensors
from fedlib.rng import Rng
from fedlib.wire import bits, container, entropy, levels
from fedlib.wire.levels import Levels

INTERVALS: Shapes = {"intervals": torch.Size([])}  # for this round, of the schedules that the server sets
LOSS: Shapes = {"loss": torch.Size([])}


@dataclass(frozen=True)
class Course:
    """What the server knows of the rounds beside the model; numbers of the last one are means over its clients."""

    intervals: int  # for the next round, of schedules that follow the loss
    first_loss: float = 0.0  # of the first round; 0: none yet
    loss: float = 0.0  # of the model that clients received
    widths: tuple[float, ...] = ()  # bits an entry of each tensor
    ranges: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FedDQ(Rule, ModelWriter[Course]):
    """Unlike in the paper's code, biases are sent."""

    name = "feddq"
    sections = ("headers", "levels", "scales", "loss")
    plain = True
    averages = True
    own_type = Course

    # or "kept": as two of the three scripts, all but the weights stays as it was (code)
    biases: str = choice("sent", "kept")
    coding: str = choice("packed", "entropy")  # or "entropy"
    # the same rule for the broadcast model, nearest: its resolution; 0 sends float32 (project)
    downlink: float = number(0.0, 0, 1e12)
    report: bool = switch(False)  # clients send the loss of what they received, whether the schedule needs it or not

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.downlink:
            require_number("hyper.downlink", self.downlink, 1e-12, 1e12)

    @property
    def reports(self) -> bool:
        return self.report or self.follows_loss

    @property
    def uploaded(self) -> dict[str, torch.Size]:
        """The tensors that are sent, in their order."""
        return self.task.tensors if self.biases == "sent" else self.task.weights

    # Tensors as sections of a message

    def pack(self, tensors: Tensors, intervals: int, rng: Rng) -> list[bytes | np.ndarray]:
        """Headers, levels and scales."""
        each = [self.quantize(x, intervals, rng.child(name)) for name, x in tensors.items()]
        parts = [part for part, _ in each]
        scales = b"".join(scale.tobytes() for _, scale in each)
        return [levels.headers(parts), levels.pack(parts, self.coding == "entropy"), scales]

    def open(self, message: Buffer | memoryview, kind: str, shapes: Shapes, *limits: int) -> container.Message:
        """Headers and levels of tensors, and sections that have their limits in bytes. PayloadError."""
        longest = [levels.HEADER.size * len(shapes), sum(2 * shape.numel() + 64 for shape in shapes.values())]
        return container.unpack(message, kind, self.fingerprint(), [*longest, *limits])

    def unpack(self, head: memoryview, body: memoryview, shapes: Shapes) -> list[Levels]:
        sizes = [shape.numel() for shape in shapes.values()]
        return levels.unpack(head, body, sizes, self.coding == "entropy")

    def pack_model(self, model: Tensors) -> list[bytes | np.ndarray]:
        """All tensors, by a rule that draws nothing and has no scales."""
        return self.pack({name: model[name] for name in self.task.tensors}, 0, Rng(0))[:2]

    def unpack_model(self, head: memoryview, body: memoryview) -> Tensors:
        return self.restore(self.unpack(head, body, self.task.tensors), self.task.tensors)

    # Down

    @override
    def initial(self, rng: Rng) -> ServerState[Course]:
        return ServerState(self.task.initial(), Course(min(self.first, self.most_intervals)))

    @override
    def broadcast(self, state: ServerState[Course]) -> bytes:
        intervals = {"intervals": torch.tensor(float(state.own.intervals))}
        if not self.downlink:
            return pack_broadcast(self, state.model | intervals, INTERVALS)
        parts = [*self.downward.pack_model(state.model), pack_tensors(intervals, INTERVALS)]
        return container.pack("feddq.down", self.fingerprint(), 0, parts)

    @property
    def downward(self) -> FedDQ:
        """What quantizes the broadcast."""
        return dataclasses.replace(
            self, schedule="range", quantizer="affine_nearest", resolution=self.downlink, coding="packed"
        )

    @override
    def check_writer(self) -> None:
        rules, nearest = ("range", "fixed"), ("affine_nearest", "symmetric_nearest")
        require_name("downlink.hyper.schedule", self.schedule, rules)
        require_name("downlink.hyper.quantizer", self.quantizer, nearest)  # the same model rounded twice is the same

    @override
    def write_model(self, model: Tensors) -> bytes:
        return container.pack("feddq.model", self.fingerprint(), 0, self.pack_model(model))

    @override
    def read_model(self, data: Buffer | memoryview) -> Tensors:
        return self.unpack_model(*self.open(data, "feddq.model", self.task.tensors).sections)

    # At a client

    @override
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        """Beside the model stands what it was at the start of the round; and its training loss, where asked for."""
        if self.downlink:
            *rounded, rest = self.open(message, "feddq.down", self.task.tensors, 4).sections
            model = self.downward.unpack_model(*rounded) | unpack_tensors(rest, INTERVALS)
        else:
            model = unpack_broadcast(self, message, INTERVALS)
        intervals = float(model.pop("intervals"))
        if not (intervals.is_integer() and 1 <= intervals < 2**bits.WIDEST):
            raise PayloadError(f"intervals: {intervals}, expected an integer from 1 to {2**bits.WIDEST - 1}")
        local = train_model(self.task, model, len(shard[1]))
        here = local.trainable | local.frozen
        local.frozen |= {f"from {name}": here[name].detach().clone() for name in self.uploaded}
        local.frozen["intervals"] = torch.tensor(int(intervals), device=self.task.device)
        if self.reports:
            local.frozen["loss"] = self.training_loss(here, shard)
        return local

    @torch.no_grad()
    def training_loss(self, model: Tensors, shard: Samples) -> Tensor:
        """Mean loss of the received model on a client's samples."""
        self.task.network.eval()
        batches = zip(*(part.split(500) for part in shard), strict=True)
        losses = [self.task.objective.total(self.task.logits(model, x), y) for x, y in batches]
        return torch.stack(losses).sum() / len(shard[1])

    @override
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Draws) -> Tensor:
        return self.task.loss(trainable | {name: frozen[name] for name in self.task.statistics}, batch)

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        """Each tensor's change since the broadcast, quantized; then the loss that was measured, if any."""
        here = local.trainable | local.frozen
        changes = {name: here[name].detach() - here[f"from {name}"] for name in self.uploaded}
        report = pack_tensors(here, LOSS) if self.reports else b""
        parts = [*self.pack(changes, int(here["intervals"]), rng.child("upload")), report]
        return container.pack("feddq.up", self.fingerprint(), local.samples, parts)

    # The server

    @override
    def aggregate(self, state: ServerState[Course], uploads: Uploads) -> ServerState[Course]:
        """w + mean of the updates, by samples. A running variance that rounding made negative becomes 0."""
        about = dict.fromkeys(("widths", "ranges"), torch.Size([len(self.uploaded)]))
        mean, told = uploads.averager(self.uploaded), RunningMean({**about, **(LOSS if self.reports else {})})
        for tensors, samples in uploads.read(self.read_update):
            mean.add(tensors, samples)
            told.add(tensors, samples)
        average = mean.value() | told.value()
        model = state.model | {name: state.model[name] + average[name] for name in self.uploaded}
        for name in self.task.statistics:
            if name.endswith("running_var"):
                model[name] = model[name].clamp(min=0)
        widths, ranges = (tuple(average[what].tolist()) for what in about)
        loss = float(average["loss"]) if self.reports else 0.0
        first = state.own.first_loss or loss
        intervals = self.next_intervals(loss, first) if self.follows_loss else state.own.intervals
        return ServerState(model, Course(intervals, first, loss, widths, ranges))

    def read_update(self, upload: Buffer) -> Update:
        """Update's tensors with their `widths` [tensors] and `ranges` [tensors], the loss if any, the sample count."""
        parts, scales, report, samples = self.open_upload(upload)
        tensors = self.restore(parts, self.uploaded, scales)
        tensors["widths"] = torch.tensor([float(part.width) for part in parts])
        tensors["ranges"] = torch.tensor([self.range_of(part) for part in parts])
        if self.reports:
            tensors |= unpack_tensors(report, LOSS)
            if tensors["loss"] < 0:
                raise PayloadError(f"loss: {float(tensors['loss'])}, expected none below 0")
        return tensors, samples

    def open_upload(self, upload: Buffer) -> tuple[list[Levels], memoryview, memoryview, int]:
        """An upload's levels, its scales, the client's report, the sample count. PayloadError for any other message."""
        read = self.open(upload, "feddq.up", self.uploaded, 4 * count(self.uploaded), 4 * self.reports)
        head, body, scales, report = read.sections
        return self.unpack(head, body, self.uploaded), scales, report, read.samples

    # For the record

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        """Entries times their width, and 32 bits a scale: what FedDQ's code counts, no header.

        Others: the levels' empirical entropy, by a histogram for each tensor.
        """
        parts, scales, _, _ = self.open_upload(upload)
        paper = sum(len(part.levels) * part.width for part in parts) + 8 * len(scales)
        bound = sum(entropy.entropy_bits(np.bincount(part.levels)) for part in parts if part.width)
        return Sizes(float(paper), {"entropy": float(bound)})

    @override
    def notes(self, state: ServerState[Course]) -> dict[str, Any]:
        """In the mean over the round's clients: bits an entry and range of each tensor, and the loss, if measured."""
        said: dict[str, Any] = {
            what: {name: float(f"{value:.6g}") for name, value in zip(self.uploaded, values, strict=True)}
            for what, values in (("widths", state.own.widths), ("ranges", state.own.ranges))
        }
        return said | ({"loss": state.own.loss} if self.reports else {})
