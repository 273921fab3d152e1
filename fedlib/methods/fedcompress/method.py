"""FedCompress: clients train weights that end in few clusters; the server clusters their average again by distillation.

Tsouvalas, Saeed, Ozcelebi, Meratnia, "Communication-Efficient Federated Learning through Adaptive Weight Clustering and
Server-Side Distillation", ICASSP 2024 (arXiv:2401.14211). Of the paper the abstract could be read; the protocol is that
of its code (`FederatedML/FedCompress`, 8610253).

    clusters of a tensor                -> `fedlib.methods.fedcompress.clustering`
    a client's two phases               -> `stages`, `enter`, `objective`, `finish`
    score, and the rule that follows it -> `assess`, `server`, `fedlib.methods.fedcompress.adaptive_clusters`
    self-compression of the average     -> `compressed`, `fedlib.methods.fedcompress.distillation`
    the message                         -> `fedlib.methods.fedcompress.messages`

Clustered are the kernels of convolutions, and of linear layers where it is asked for, each with a codebook of its own;
all other tensors travel as float32.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedlib.core.averaging import RunningMean
from fedlib.core.plan import Plan, Shapes, State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Buffer, Uploads
from fedlib.errors import PayloadError, SpecError, require_name, require_number
from fedlib.methods.fedcompress import adaptive_clusters, augmentation, clustering, distillation, messages
from fedlib.rng import Rng
from fedlib.wire import container

if TYPE_CHECKING:
    from fedlib.runs.spec import Spec

SECTIONS = messages.SECTIONS
VARIANTS = ("code", "paper", "none")
CHUNK = 500  # samples held out that are looked at together
SEEDS = Rng(9)  # of centroids, the same for all clients and rounds as in the code; of foreign images and their order
_CLUSTERS = struct.Struct("<H")


@dataclass(frozen=True)
class Hyper(adaptive_clusters.Rule, distillation.Settings):
    """With the defaults of the code. Of a client's epochs, those of Spec are the ordinary ones."""

    variant: str = "code"  # straight through clusters; "paper": a pull towards them; "none": no clusters, as FedAvg
    clustered_epochs: int = 5
    clustered_lr: float = 5e-4
    beta: float = 1.0  # of the pull, per clustered weight
    decay: float = 1e-4  # of the summed squares of all kernels and matrices, not halved
    augment: str = "corner"  # training images flipped, shifted and cut at a corner as in the code; "random", or "none"
    self_compression: bool = True  # else the average is broadcast as it is
    compare_every: int = 0  # rounds after which the record also has the average's accuracy before it; 0: never
    layers: str = "convolutions"  # whose kernels are clustered; "all": matrices of linear layers too

    def __post_init__(self) -> None:
        adaptive_clusters.Rule.__post_init__(self)
        distillation.Settings.__post_init__(self)
        require_name("hyper.variant", self.variant, VARIANTS)
        require_name("hyper.augment", self.augment, augmentation.KINDS)
        require_name("hyper.layers", self.layers, ("convolutions", "all"))
        for field in ("beta", "decay"):
            require_number(f"hyper.{field}", getattr(self, field), 0, 1e12)
        require_number("hyper.clustered_lr", self.clustered_lr, 1e-12, 1e12)
        require_number("hyper.clustered_epochs", self.clustered_epochs, 1, 10**6, integer=True)
        require_number("hyper.compare_every", self.compare_every, 0, 10**9, integer=True)
        if not isinstance(self.self_compression, bool):
            raise SpecError(f"hyper.self_compression: {self.self_compression!r} must be true or false")

    @property
    def clustered(self) -> bool:
        return self.variant != "none"

    @property
    def adaptive(self) -> bool:
        return self.clustered and self.least < self.most


def check(hyper: Hyper, spec: Spec) -> None:
    if hyper.clustered and spec.persistent:
        raise SpecError("persistent: True cannot go with two stages, whose optimizers begin anew; use false")
    if hyper.adaptive and not spec.held_out:
        raise SpecError(
            f"held_out: {spec.held_out} leaves clients without validation data, by which the number of clusters is "
            "found; hold out 0.1, or set hyper.least = hyper.most"
        )


def kernels(hyper: Hyper, task: Task) -> Shapes:
    """What clients cluster."""
    return messages.kernels(task, hyper.most, linear=hyper.layers == "all") if hyper.clustered else {}


def kept(hyper: Hyper, task: Task) -> Shapes:
    """What is clustered in a broadcast."""
    return kernels(hyper, task) if hyper.self_compression else {}


def form(direction: str, hyper: Hyper, task: Task) -> messages.Form:
    """Of messages "down" and "up"."""
    if direction == "down":
        return messages.Form.of("fedcompress.down", kept(hyper, task), hyper, task, _CLUSTERS.size)
    most = adaptive_clusters.report_bytes(len(task.train[0]), _head(task).in_features) if hyper.adaptive else 0
    return messages.Form.of("fedcompress.up", kernels(hyper, task), hyper, task, most)


def broadcast(state: State, hyper: Hyper, task: Task) -> bytes:
    """The model, and how many clusters the round's clients shall make."""
    return form("down", hyper, task).pack(state, report=_CLUSTERS.pack(int(state["clusters"][-1])))


def start(message: bytes, hyper: Hyper, task: Task, rng: Rng) -> tuple[State, State]:
    """Trained is the model itself. PayloadError where the clusters are so many as the hyper-parameters do not allow."""
    model, report, _ = form("down", hyper, task).unpack(message)
    number = int.from_bytes(report, "little")
    if not hyper.least <= number <= hyper.most:
        raise PayloadError(f"clusters: {number}, expected {hyper.least} to {hyper.most}")
    local = {name: tensor.to(task.device) for name, tensor in model.items()}
    frozen = {name: local[name] for name in task.statistics} | {"clusters": torch.tensor(number, device=task.device)}
    return {name: local[name].requires_grad_() for name in task.weights | task.vectors}, frozen


def stages(hyper: Hyper, plan: Plan) -> list[Plan]:
    """Ordinary epochs, then clustered ones, each with an optimizer that begins anew."""
    clustered = dataclasses.replace(plan, epochs=hyper.clustered_epochs, lr=hyper.clustered_lr)
    return [plan, clustered] if hyper.clustered else []


def enter(stage: int, trainable: State, frozen: State, hyper: Hyper, task: Task, rng: Rng) -> None:
    """From the second stage on the centroids are trained beside the weights."""
    if stage:
        trainable.update(clustering.first_centroids(trainable, kernels(hyper, task), int(frozen["clusters"]), SEEDS))


def draws(progress: float, hyper: Hyper, task: Task, generator: torch.Generator) -> Tensor | None:
    return augmentation.draws(hyper.augment, task, generator)


def objective(
    trainable: State, frozen: State, batch: tuple[Tensor, Tensor], drawn: Tensor | None, hyper: Hyper, task: Task
) -> Tensor:
    """Cross-entropy of the clustered weights, or of the weights themselves with a pull to the centroids; and decay."""
    whole = {name: trainable[name] for name in task.weights | task.vectors}
    batch = augmentation.augmented(batch, drawn, hyper.augment)
    more, centroids = torch.zeros((), device=task.device), clustering.centroids(trainable)
    if hyper.decay:
        more = more + hyper.decay * sum(whole[name].square().sum() for name in task.weights)
    if hyper.variant == "code":
        whole |= {name: clustering.straight_through(whole[name], mu) for name, mu in centroids.items()}
    elif centroids:
        pull = sum(clustering.pull(whole[name], mu) for name, mu in centroids.items())
        more = more + hyper.beta / count(kernels(hyper, task)) * pull
    return task.loss(whole | {name: frozen[name] for name in task.statistics}, batch) + more


def finish(trainable: State, frozen: State, samples: int, hyper: Hyper, task: Task, rng: Rng) -> bytes:
    """Every clustered weight has become its nearest centroid. Nothing is reported yet."""
    model = trainable | frozen
    model |= {name: clustering.clustered(model[name], mu) for name, mu in clustering.centroids(trainable).items()}
    return form("up", hyper, task).pack(model, samples)


@torch.no_grad()
def assess(upload: bytes, held: tuple[Tensor, Tensor], hyper: Hyper, task: Task) -> bytes:
    """With a report on the samples held out: how many, how many right, and their embeddings under the model as sent.

    Embeddings are what enters the last layer.
    """
    if not hyper.adaptive:
        return upload
    message = form("up", hyper, task)
    right, z = seen(message.unpack(upload)[0], held, task)
    return message.reported(upload, adaptive_clusters.pack_report(z, right))


@torch.no_grad()
def seen(model: State, samples: tuple[Tensor, Tensor], task: Task) -> tuple[int, Tensor]:
    """How many samples a model gets right, and what enters its last layer [n, d], on the CPU; in evaluation mode."""
    task.network.eval()
    there = {name: model[name].to(task.device) for name in task.tensors}
    right, entered = 0, [torch.empty(0, _head(task).in_features)]
    with _head(task).register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].cpu())):
        for x, y in zip(*(part.split(CHUNK) for part in samples), strict=True):
            if len(x):
                right += int((task.logits(there, x).argmax(1) == y).sum())
    return right, torch.cat(entered)


def _head(task: Task) -> nn.Linear:
    """SpecError where the last layer is none that embeddings enter."""
    head = list(task.network.children())[-1]
    if not isinstance(head, nn.Linear):
        raise SpecError("model: does not end in a linear layer, whose inputs are the embeddings that are scored")
    return head


def read_upload(upload: Buffer, hyper: Hyper, task: Task) -> tuple[State, int]:
    """The model, with what its report says, and the sample count."""
    model, report, samples = form("up", hyper, task).unpack(upload)
    return model | (adaptive_clusters.read_report(report, _head(task).in_features) if hyper.adaptive else {}), samples


def initial(hyper: Hyper, task: Task, rng: Rng) -> State:
    """The model, compressed before anybody has trained it, and an empty history."""
    history = {"accuracies": torch.empty(0), "scores": torch.empty(0)} if hyper.adaptive else {}
    return compressed(task.initial(), [hyper.least], hyper, task) | history


def server(state: State, uploads: Uploads, hyper: Hyper, task: Task) -> State:
    """The mean of the models, by samples; then the number of clusters; then so many clusters in the mean."""
    mean = RunningMean(task.tensors)
    held = right = 0.0
    gram: Tensor | float = 0.0
    for tensors, samples in uploads.read(lambda upload: read_upload(upload, hyper, task)):
        mean.add(tensors, samples)
        if hyper.adaptive:
            held, right, gram = held + float(tensors["held"]), right + float(tensors["right"]), gram + tensors["gram"]
    numbers, history = [int(c) for c in state["clusters"]], {}
    following = numbers[-1]
    if isinstance(gram, Tensor):
        found = {"accuracies": right / max(held, 1), "scores": adaptive_clusters.effective_rank(gram)}
        history = {name: torch.cat([state[name], torch.tensor([value])]) for name, value in found.items()}
        accuracies, scores = history["accuracies"].tolist(), history["scores"].tolist()
        following = hyper.following(accuracies, scores, numbers, by_accuracy=hyper.variant == "code")
    return compressed(mean.value(), [*numbers, following], hyper, task) | history | {"sent": state["bits"]}


def compressed(average: State, numbers: Sequence[int], hyper: Hyper, task: Task) -> State:
    """What is broadcast in place of an average, and what the record shall say of it; numbers: of clusters, by round."""
    state, losses = average, list[float]()
    if kept(hyper, task):
        state, losses = distillation.distil(average, kept(hyper, task), numbers[-1], hyper, task, SEEDS, len(numbers))
        if hyper.compare_every:
            state |= {f"average {name}": tensor for name, tensor in average.items()}
    state = state | {"clusters": torch.tensor(numbers, dtype=torch.float32), "losses": torch.tensor(losses)}
    bits = form("down", hyper, task).bits(broadcast(state, hyper, task), state, task)
    return state | {"bits": torch.tensor(bits, dtype=torch.float64)}


def models(state: State, hyper: Hyper, task: Task, rng: Rng) -> list[State]:
    return [{name: state[name] for name in task.tensors}]


def notes(state: State, hyper: Hyper, task: Task) -> dict[str, Any]:
    """Clusters, score and validation accuracy of the round, loss of each epoch of distillation, test accuracy of the
    average before it; bits of the round's broadcast and of the new one by each meter."""
    found: dict[str, Any] = {"clusters": int(state["clusters"][-2])} if hyper.clustered else {}
    if hyper.adaptive:
        found |= {"score": round(float(state["scores"][-1]), 4), "validation": round(float(state["accuracies"][-1]), 5)}
    if len(state["losses"]):
        found["losses"] = [float(f"{loss:.5g}") for loss in state["losses"]]
    round_ = len(state["clusters"]) - 1
    if kept(hyper, task) and hyper.compare_every and round_ % hyper.compare_every == 0:
        average = {name: state[f"average {name}"] for name in task.tensors}
        found["before"] = seen(average, task.test, task)[0] / len(task.test[1])
    return found | messages.noted(state)


def paper_bits(upload: Buffer, hyper: Hyper, task: Task) -> float:
    """Of the model as a compressed file, as the code measures it, and of the report, which the code does not count."""
    report = container.section_sizes(upload)[3]
    return messages.zip_bits(read_upload(upload, hyper, task)[0], task) + 8 * report


def other_bits(upload: Buffer, hyper: Hyper, task: Task) -> dict[str, float]:
    """Codebooks with indexes of fixed width."""
    return {"fixed": form("up", hyper, task).fixed_bits(upload)}


# For methods that broadcast the model itself: a copy of it in a fixed number of clusters


def check_writer(hyper: Hyper) -> None:
    if hyper.adaptive or not hyper.clustered:
        raise SpecError("downlink.hyper: clusters must be as many in every round; set least = most, and variant code")


def write_model(model: State, hyper: Hyper, task: Task) -> bytes:
    coded = kernels(hyper, task)
    if hyper.self_compression:
        model, _ = distillation.distil(model, coded, hyper.least, hyper, task, SEEDS)
    else:
        model = model | {name: clustering.rounded(model[name], hyper.least, SEEDS) for name in coded}
    return messages.Form.of("fedcompress.model", coded, hyper, task).pack(model)


def read_model(data: Buffer | memoryview, hyper: Hyper, task: Task) -> State:
    return messages.Form.of("fedcompress.model", kernels(hyper, task), hyper, task).unpack(data)[0]
