"""FedCompress: clients train weights that end in few clusters; the server clusters their average again by distillation.

Tsouvalas, Saeed, Ozcelebi, Meratnia, "Communication-Efficient Federated Learning through Adaptive Weight Clustering and
Server-Side Distillation", ICASSP 2024 (arXiv:2401.14211). Of the paper the abstract could be read; the protocol is that
of its code (`FederatedML/FedCompress`, 8610253).

    clusters of a tensor                -> `fedlib.methods.fedcompress.clustering`
    a client's two phases               -> `phases`, `loss`, `upload`
    score, and the rule that follows it -> `aggregate`, `fedlib.methods.fedcompress.adaptive_clusters`
    self-compression of the average     -> `compressed`, `fedlib.methods.fedcompress.distillation`
    the message                         -> `fedlib.methods.fedcompress.messages`

Clustered are the kernels of convolutions, and of linear layers where it is asked for, each with a codebook of its own;
all other tensors travel as float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fedlib.core.averaging import RunningMean
from fedlib.core.method import Local, ModelWriter, Phase, ServerState, Settings, Sizes, train_model
from fedlib.core.plan import Samples, Shapes, Tensors, count
from fedlib.core.settings import choice, integer, number, switch
from fedlib.core.uploads import Buffer, Update, Uploads
from fedlib.errors import SpecError
from fedlib.methods.fedcompress import adaptive_clusters, augmentation, clustering, distillation, messages
from fedlib.methods.fedcompress.messages import Form, Metered
from fedlib.rng import Rng, Stream

SEEDS = Rng(9)  # of centroids, the same for all clients and rounds as in the code; of foreign images and their order


@dataclass(frozen=True)
class History:
    """What the server keeps beside the model. Accuracies, scores and losses are rounded to float32."""

    clusters: tuple[int, ...]  # in each round so far, and in the one to come
    accuracies: tuple[float, ...] = ()  # on the samples held out, in each round; like the scores only if `adaptive`
    scores: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()  # in each epoch of the last distillation
    average: Tensors = field(default_factory=dict)  # before it, if it is to be compared
    broadcasts: Metered = field(default_factory=Metered)


@dataclass(frozen=True, kw_only=True)
class FedCompress(adaptive_clusters.Rule, distillation.Settings, ModelWriter[History]):
    """With the defaults of the code. Of a client's epochs, those of Spec are the ordinary ones."""

    name, averages = "fedcompress", True
    sections = messages.SECTIONS
    own_type = History

    # straight through clusters; "paper": a pull towards them; "none": no clusters, as FedAvg
    variant: str = choice("code", "paper", "none")
    clustered_epochs: int = integer(5, 1, 10**6)
    clustered_lr: float = number(5e-4, 1e-12, 1e12)
    beta: float = number(1.0, 0, 1e12)  # of the pull, per clustered weight
    decay: float = number(1e-4, 0, 1e12)  # of the summed squares of all kernels and matrices, not halved
    # training images flipped, shifted and cut at a corner as in the code; "random", or "none"
    augment: str = choice("corner", *augmentation.KINDS)
    self_compression: bool = switch(True)  # else the average is broadcast as it is
    # rounds after which the record also has the average's accuracy before it; 0: never
    compare_every: int = integer(0, 0, 10**9)
    layers: str = choice("convolutions", "all")  # whose kernels are clustered; "all": matrices of linear layers too

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least > self.most:
            raise SpecError(f"hyper.least: {self.least} exceeds hyper.most: {self.most}; start with fewer clusters")
        if self.images < self.distil_batch:
            raise SpecError(f"hyper.images: {self.images} make no batch of hyper.distil_batch: {self.distil_batch}")

    @override
    def check(self, settings: Settings) -> None:
        if self.clustered and settings.plan.persistent:
            raise SpecError("persistent: True cannot go with two stages, whose optimizers begin anew; use false")
        if self.adaptive and not settings.held_out:
            raise SpecError(
                f"held_out: {settings.held_out} leaves clients without validation data, by which the number of "
                "clusters is found; hold out 0.1, or set hyper.least = hyper.most"
            )

    # What is clustered, and what travels

    @property
    def clustered(self) -> bool:
        return self.variant != "none"

    @property
    def adaptive(self) -> bool:
        return self.clustered and self.least < self.most

    @functools.cached_property
    def kernels(self) -> Shapes:
        """What clients cluster."""
        return clustering.kernels(self.task, self.most, linear=self.layers == "all") if self.clustered else {}

    @functools.cached_property
    def down(self) -> Form:
        return Form(self, "down", self.kernels if self.self_compression else {}, adaptive_clusters.NUMBER)

    @functools.cached_property
    def up(self) -> Form:
        return Form(self, "up", self.kernels, adaptive_clusters.longest_report(self.task) if self.adaptive else 0)

    # The client

    @override
    def begin(self, message: bytes, shard: Samples, rng: Rng) -> Local:
        """Trained is the model itself. PayloadError where the settings do not allow as many clusters."""
        model, report, _ = self.down.unpack(message)
        local = train_model(self.task, model, len(shard[1]))
        local.frozen["clusters"] = torch.tensor(self.read_number(report), device=self.task.device)
        return local

    @override
    def phases(self) -> Sequence[Phase]:
        """Ordinary epochs, then clustered ones."""
        plan = self.task.plan
        clustered = replace(plan, epochs=self.clustered_epochs, lr=self.clustered_lr)
        return (Phase(plan), Phase(clustered, self.cluster)) if self.clustered else (Phase(plan),)

    def cluster(self, local: Local, rng: Rng) -> None:
        """From now on centroids are trained beside the weights."""
        number = int(local.frozen["clusters"])
        local.trainable |= clustering.first_centroids(local.trainable, self.kernels, number, SEEDS)

    @override
    def draw(self, progress: float, stream: Stream) -> Tensor | None:
        return augmentation.draws(self.augment, self.task, stream)

    @override
    def loss(self, trainable: Tensors, frozen: Tensors, batch: Samples, drawn: Tensor | None) -> Tensor:
        """Cross-entropy of the clustered weights, or of the weights with a pull to the centroids; and decay."""
        task = self.task
        whole = {name: trainable[name] for name in task.weights | task.vectors}
        batch = augmentation.augmented(batch, drawn, self.augment)
        more, centroids = torch.zeros((), device=task.device), clustering.centroids(trainable)
        if self.decay:
            more = more + self.decay * sum(whole[name].square().sum() for name in task.weights)
        if self.variant == "code":
            whole |= {name: clustering.straight_through(whole[name], mu) for name, mu in centroids.items()}
        elif centroids:
            pull = sum(clustering.pull(whole[name], mu) for name, mu in centroids.items())
            more = more + self.beta / count(self.kernels) * pull
        return task.loss(whole | {name: frozen[name] for name in task.statistics}, batch) + more

    @override
    def upload(self, local: Local, held_out: Samples, rng: Rng) -> bytes:
        """Every clustered weight becomes its nearest centroid. The report says of the samples held out how many there
        are and are right, with their embeddings, under the model as it is sent."""
        model, centroids = local.trainable | local.frozen, clustering.centroids(local.trainable)
        model |= {name: clustering.clustered(model[name], mu) for name, mu in centroids.items()}
        report = adaptive_clusters.report(self.task, model, held_out) if self.adaptive else b""
        return self.up.pack(model, local.samples, report)

    # The server

    @override
    def initial(self, rng: Rng) -> ServerState[History]:
        return self.compressed(self.task.initial(), History((self.least,)))  # before anybody has trained it

    @override
    def broadcast(self, state: ServerState[History]) -> bytes:
        """The model, and the number of clusters that the round's clients are to make."""
        return self.down.pack(state.model, report=self.pack_number(state.own.clusters[-1]))

    def read(self, upload: Buffer) -> Update:
        """The model, with what its report says, and the sample count."""
        model, report, samples = self.up.unpack(upload)
        if self.adaptive:
            model |= adaptive_clusters.read_report(report, adaptive_clusters.head(self.task).in_features)
        return model, samples

    @override
    def aggregate(self, state: ServerState[History], uploads: Uploads) -> ServerState[History]:
        """The mean of the models, by samples; then the number of clusters; then that number of clusters in the mean."""
        mean, history = uploads.averager(self.task.tensors, state.model), state.own
        reports = RunningMean(adaptive_clusters.report_shapes(self.task) if self.adaptive else {})
        for tensors, samples in uploads.read(self.read):
            mean.add(tensors, samples)
            reports.add(tensors, 1)
        following = history.clusters[-1]
        if self.adaptive:
            held, right, gram = (reports.sums[name] for name in ("held", "right", "gram"))
            accuracies = (*history.accuracies, float((right / held.clamp(min=1)).float()))
            scores = (*history.scores, float(np.float32(adaptive_clusters.effective_rank(gram))))
            history = replace(history, accuracies=accuracies, scores=scores)
            following = self.following(accuracies, scores, history.clusters, by_accuracy=self.variant == "code")
        return self.compressed(mean.value(), replace(history, clusters=(*history.clusters, following)))

    def compressed(self, average: Tensors, history: History) -> ServerState[History]:
        """What is broadcast in place of an average, by the number of clusters of the round to come."""
        model, numbers = average, history.clusters
        if coded := self.down.coded:
            model, losses = distillation.distil(model, coded, numbers[-1], self, self.task, SEEDS, len(numbers))
            rounded = tuple(float(np.float32(loss)) for loss in losses)
            history = replace(history, losses=rounded, average=average if self.compare_every else {})
        message = self.broadcast(ServerState(model, history))
        return ServerState(model, replace(history, broadcasts=history.broadcasts.then(self.down, message, model)))

    # What the record says

    @override
    def notes(self, state: ServerState[History]) -> dict[str, Any]:
        """Clusters, score and validation accuracy of the round, loss of each epoch of distillation, test accuracy of
        the average before it; bits of the round's broadcast and of the new one by each meter."""
        own, test = state.own, self.task.test
        found: dict[str, Any] = {"clusters": own.clusters[-2]} if self.clustered else {}
        if self.adaptive:
            found |= {"score": round(own.scores[-1], 4), "validation": round(own.accuracies[-1], 5)}
        if own.losses:
            found["losses"] = [float(f"{loss:.5g}") for loss in own.losses]
        if own.average and (len(own.clusters) - 1) % self.compare_every == 0:
            found["before"] = adaptive_clusters.see(self.task, own.average, test)[0] / len(test[1])
        return found | own.broadcasts.notes()

    @override
    def sizes(self, upload: Buffer) -> Sizes:
        """As a compressed file, the code's measure, and the report, which it does not count; and with fixed indexes."""
        return Sizes(self.up.zip_bits(upload, self.read(upload)[0]), {"fixed": self.up.fixed_bits(upload)})

    # For methods that broadcast the model itself: a copy of it in a fixed number of clusters

    @override
    def check_writer(self) -> None:
        if self.adaptive or not self.clustered:
            raise SpecError("downlink.hyper: clusters must be as many in every round; set least = most, variant code")

    @override
    def write_model(self, model: Tensors) -> bytes:
        if self.self_compression:
            model, _ = distillation.distil(model, self.kernels, self.least, self, self.task, SEEDS)
        else:
            model = model | {name: clustering.rounded(model[name], self.least, SEEDS) for name in self.kernels}
        return Form(self, "model", self.kernels).pack(model)

    @override
    def read_model(self, data: Buffer | memoryview) -> Tensors:
        return Form(self, "model", self.kernels).unpack(data)[0]
