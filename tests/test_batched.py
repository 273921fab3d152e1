"""The engines for a GPU, on a CPU: Graphed gives the reference's bytes, Stacked its numbers within rounding."""

import contextlib
import dataclasses
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlib.core import client as client_side
from fedlib.core import optimizers
from fedlib.core.plan import Plan
from fedlib.core.task import Task
from fedlib.data import images, partition, sets
from fedlib.engines.automatic import Fastest
from fedlib.engines.cuda_graph import WARM_UP, Graphed
from fedlib.engines.gpu_steps import Batched, Member, progress, same
from fedlib.engines.in_process import InProcess, Memories, Upload, task_of
from fedlib.engines.select import ENGINES, open_engine
from fedlib.engines.vmapped import Stacked, groups, together
from fedlib.errors import PayloadError, RunError
from fedlib.methods import registry
from fedlib.models import cnn, initializers
from fedlib.models.registry import MODELS
from fedlib.rng import Rng
from fedlib.runs import record, rounds
from fedlib.runs.spec import Spec

MakeSpec = Callable[..., Spec]
CPU = torch.device("cpu")
# How far rounding may take trained tensors, relative to how far they moved. What decides against a threshold (a ReLU,
# a mask's draw) falls on its other side once in millions, which one client in thirty shows: 1e-3 was seen, 1e-6 else.
ROUNDING, TOLERANCE = 1e-5, 5e-3
# Of clients 0 to 9 these have, in batches of 76: client 0 and 8 one batch; 1 a last batch of one image; 2 four batches.
SIZES = [57, 153, 235, 151, 137, 157, 148, 147, 75, 177]
UNEQUAL: dict[str, Any] = dict(partition={"kind": "dirichlet", "beta": 0.3, "seed": 7}, epochs=2, batch=76)
COHORT = [3, 1, 8, 0, 2]
# FedCompress without clusters: what engines do with those has a test of its own.
OWN: dict[str, dict[str, Any]] = {"fedcompress": {"hyper": {"variant": "none", "augment": "random"}}}
SETTINGS: list[dict[str, Any]] = [{"method": name, **OWN.get(name, {})} for name in registry.METHODS] + [
    {"method": "fedmrn", "hyper": {"mask": "signed", "noise": "gauss", "magnitude": 0.05}},
    {"method": "fedpm", "hyper": {"ste": "prob", "weight_scale": "fedpm"}, "optimizer": "adam"},
    {"method": "fedpm", "hyper": {"masking": "threshold", "aggregation": "bayes"}, "optimizer": "adam"},
    {"method": "fedpm", "hyper": {"masking": "top", "penalty": "mean_entropy"}, "optimizer": "adam"},
    {"method": "feddq", "hyper": {"schedule": "ascending", "quantizer": "norm", "most": 15}, "momentum": 0.5},
    {"method": "fedpt", "hyper": {"policy": "random/0.5"}},
]
NAMES = [
    *registry.METHODS,
    "fedmrn signed",
    "fedpm adam",
    "fedpm threshold",
    "fedpm top",
    "feddq ascending",
    "fedpt random",
]
SPOILT = 5  # the client whose images are huge in data set "spoilt"

# Slow where torch has no batching rule; a test below says where that is.
each_method = pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
each_model = pytest.mark.parametrize("model", ["mlp", "slice", "biased"])


def fits(setting: dict[str, Any], model: str = "slice") -> str:
    """That model; for methods that refuse BatchNorm, one without; for FedPM one where pooling and ReLU break no ties.

    Weights -c and +c on the 17 greys of digits give many sums that are equal but for their rounding.
    """
    if setting["method"] == "fedpt" and model == "slice":
        return "biased"
    return "smooth" if setting["method"] == "fedpm" and model != "mlp" else model


each_engine = pytest.mark.parametrize("kind", [Graphed, Stacked])


def slice_of_cnn(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """Two of CNN4's blocks: convolution, BatchNorm, ReLU, pooling; then the classifier."""
    return initializers.normal_weights(cnn._blocks((4, 6), 1, channels, side, classes), deviation=0.3, root=root)


def biased(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """CNN2 made narrow: convolution and linear layer with biases."""
    convolution, linear = nn.Conv2d(channels, 4, 3), nn.Linear(4 * ((side - 2) // 2) ** 2, classes)
    network = nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear)
    return initializers.normal_weights(network, deviation=0.2, root=root)


def smooth(channels: int, side: int, classes: int, root: Rng) -> nn.Sequential:
    """The same with tanh and the mean of four."""
    convolution, linear = nn.Conv2d(channels, 4, 3), nn.Linear(4 * ((side - 2) // 2) ** 2, classes)
    network = nn.Sequential(convolution, nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), linear)
    return initializers.normal_weights(network, deviation=0.2, root=root)


def spoilt_digits(folder: Path) -> images.Arrays:
    x, y, test_x, test_y = images.read_digits(folder)
    x = x.astype(np.float32)
    x[partition.iid(y, 10, 1)[SPOILT]] *= 1e30
    return x, y, test_x, test_y


@pytest.fixture(scope="module", autouse=True)
def small_world() -> Iterator[None]:
    """Networks and a data set of this file's own, by name; one thread, as `rounds.run` sets it."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "slice", slice_of_cnn)
        patch.setitem(MODELS, "biased", biased)
        patch.setitem(MODELS, "smooth", smooth)
        patch.setitem(
            sets.ENTRIES, "spoilt", dataclasses.replace(sets.ENTRIES["digits"], name="spoilt", read=spoilt_digits)
        )
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


def parts(spec: Spec, where: torch.device = CPU) -> tuple[Task, Any, Any, bytes]:
    """Task, method, settings, and the first round's message."""
    task = task_of(spec.key(), where)
    method, hyper = registry.METHODS[spec.method], registry.hyper(spec.method, spec.hyper)
    return task, method, hyper, method.broadcast(registry.initial(spec, task), hyper, task)


def started(spec: Spec, round: int, cohort: Sequence[int], where: torch.device = CPU) -> list[Member]:
    task, method, hyper, message = parts(spec, where)
    members = []
    for client in cohort:
        rng = Rng(spec.seed).child("client", round, client)
        trainable, frozen = method.start(message, hyper, task, rng)
        indices, moments = torch.from_numpy(task.partition.indices(client)), optimizers.moments(task.plan, trainable)
        members.append(Member(trainable, frozen, indices, rng, moments))
    return members


def trained(spec: Spec, engine: Batched | None, round: int, cohort: Sequence[int], where: torch.device = CPU) -> Any:
    """Trainable and other tensors of each client before training, and after it by the engine or by `client.train`."""
    task, method, hyper, _ = parts(spec, where)
    members = started(spec, round, cohort, where)
    before = [snapshot(member) for member in members]
    if engine is None:
        for member, client in zip(members, cohort, strict=True):
            shard = task.shard(client)
            client_side.train(method, member.trainable, member.frozen, shard, hyper, task, member.rng)
        return before, [snapshot(member) for member in members]
    after = []
    task.network.train()
    for some in [members] if engine.stack is None else [[member] for member in members]:
        engine.fit(method, hyper, task, some)
        after += [snapshot(member) for member in some]
    return before, after


def snapshot(member: Member) -> torch.Tensor:
    """All floating tensors of a client as one vector."""
    tensors = [*member.trainable.values(), *member.frozen.values()]
    return torch.cat([t.detach().cpu().flatten().double() for t in tensors if t.is_floating_point()])


def distance(found: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> float:
    """How far two results are apart, relative to how far training moved."""
    moved = float((expected - before).norm())
    assert moved > 0
    return float((found - expected).norm()) / moved


# Same numbers


def test_the_cohort_has_the_sizes_that_matter(tiny: MakeSpec) -> None:
    task, *_ = parts(tiny(**UNEQUAL))
    assert [len(task.partition.indices(client)) for client in range(10)] == SIZES
    assert SIZES[1] % 76 == 1
    assert max(SIZES[0], SIZES[8]) < 76


@each_method
@each_model
def test_graphed_on_a_cpu_gives_the_bytes_of_one_process(tiny: MakeSpec, setting: dict[str, Any], model: str) -> None:
    spec, other = (tiny(**UNEQUAL, **setting, model=fits(setting, model), lr=lr) for lr in (0.1, 0.3))
    reference, graphed = InProcess(CPU), Graphed(CPU)
    # Another run in between, and a round left half-way: nothing of them may stay in the static tensors.
    for each, round in ((spec, 1), (other, 1), (spec, 2)):
        *_, message = parts(each)
        left = iter(graphed.train(each, message, 9, COHORT))
        next(left)
        assert list(graphed.train(each, message, round, COHORT)) == list(reference.train(each, message, round, COHORT))
        next(left)
    *_, message = parts(spec)
    assert graphed.client(spec, message, 1, 2) == reference.client(spec, message, 1, 2)
    assert graphed.client(spec, message, 1, 2) != graphed.client(spec, message, 2, 2)  # the comparison can fail


@each_method
@each_model
def test_stacked_trains_as_one_process_does(tiny: MakeSpec, setting: dict[str, Any], model: str) -> None:
    spec = tiny(**UNEQUAL, **setting, model=fits(setting, model))
    before, expected = trained(spec, None, 1, COHORT)
    _, found = trained(spec, Stacked(CPU), 1, COHORT)
    _, others = trained(spec, None, 2, COHORT)  # same shards, other draws
    distances = [distance(f, e, b) for f, e, b in zip(found, expected, before, strict=True)]
    assert max(distances) < TOLERANCE
    assert statistics.median(distances) < ROUNDING
    for client, b, e, o in zip(COHORT, before, expected, others, strict=True):
        if SIZES[client] > spec.batch:  # another batch order or other draws would be noticed
            assert distance(o, e, b) > 2 * TOLERANCE


@each_method
@pytest.mark.parametrize("model", ["mlp", "slice"])
@pytest.mark.parametrize("stack", [1, 2, None])
def test_a_round_of_stacked_ends_in_the_state_of_one_process(
    tiny: MakeSpec, setting: dict[str, Any], model: str, stack: int | None
) -> None:
    spec = tiny(**UNEQUAL, **setting, model=fits(setting, model), cohort=5)
    task, *_ = parts(spec)
    begin = registry.initial(spec, task)
    expected, reference = rounds.one_round(spec, task, InProcess(CPU), dict(begin), 1, {})
    found, entry = rounds.one_round(spec, task, Stacked(CPU, stack), dict(begin), 1, {})
    assert entry["clients"] == reference["clients"]
    # Entropy-coded uploads may differ by the bytes of a level that rounds the other way.
    assert entry["uplink_bytes"] == pytest.approx(reference["uplink_bytes"], rel=1e-2)
    assert entry["downlink_bytes"] == reference["downlink_bytes"]
    names = begin.keys() - {"seed", "bits", "clusters", "losses"}  # the model, and not what is known of it
    before, after, other = (torch.cat([s[n].flatten() for n in sorted(names)]) for s in (begin, expected, found))
    assert distance(other, after, before) < 0.05  # a level or a mask entry that falls on its other side is a whole one


@each_method
def test_stacked_answers_in_the_order_of_the_cohort_with_messages_of_the_same_size(
    tiny: MakeSpec, setting: dict[str, Any]
) -> None:
    spec = tiny(**UNEQUAL, **setting)
    *_, message = parts(spec)
    expected = dict(InProcess(CPU).train(spec, message, 1, range(10)))
    for stack in (None, 3):
        for cohort in (COHORT, COHORT[::-1], [7], [8, 9]):
            found = list(Stacked(CPU, stack).train(spec, message, 1, cohort))
            assert [client for client, _ in found] == cohort
            sizes = [len(expected[client]) for client in cohort]  # type: ignore[arg-type]
            assert [len(upload) for _, upload in found] == pytest.approx(sizes, rel=1e-2)  # type: ignore[arg-type]


@each_method
def test_a_run_with_graphed_has_the_record_of_one_process(
    tiny: MakeSpec, tmp_path: Path, setting: dict[str, Any]
) -> None:
    spec = tiny(**setting)
    found, expected = (
        json.dumps(record.stable(rounds.run(spec, engine, root=tmp_path))) for engine in (Graphed(CPU), InProcess(CPU))
    )
    assert found == expected


# Clients that fail, and none


@each_engine
@pytest.mark.parametrize("setting", [s for s in SETTINGS if "optimizer" not in s], ids=lambda s: s["method"])
def test_a_client_that_diverges_does_not_disturb_the_others(
    tiny: MakeSpec, setting: dict[str, Any], kind: type[Any]
) -> None:
    # Scores take more: the gradient of a huge image, but not of the others, times the largest learning rate overflows.
    own: dict[str, dict[str, Any]] = {"fedpm": {"model": "mlp", "lr": 1e12}, "fedpt": {"model": "biased"}}
    more = own.get(setting["method"], {"model": "slice"})
    spec = tiny(data="spoilt", **setting, **more)
    *_, message = parts(spec)
    cohort = [2, SPOILT, 7, 0]
    expected: dict[int, Upload] = dict(InProcess(CPU).train(spec, message, 1, cohort))
    found: dict[int, Upload] = dict(kind(CPU).train(spec, message, 1, cohort))
    assert [client for client, upload in expected.items() if isinstance(upload, PayloadError)] == [SPOILT]
    for client in cohort:
        if client == SPOILT:
            assert str(found[client]) == str(expected[client])
        elif kind is Graphed:
            assert found[client] == expected[client]
        else:
            assert len(found[client]) == pytest.approx(len(expected[client]), rel=1e-2)  # type: ignore[arg-type]
    before, reference = trained(spec, None, 1, cohort)
    _, after = trained(spec, kind(CPU), 1, cohort)
    for client, b, e, f in zip(cohort, before, reference, after, strict=True):
        assert client == SPOILT or distance(f, e, b) < TOLERANCE


@each_engine
def test_when_all_diverge_each_answers_with_its_error(tiny: MakeSpec, kind: type[Any]) -> None:
    spec = tiny(lr=1e12, epochs=3)
    *_, message = parts(spec)
    found = list(kind(CPU).train(spec, message, 1, [1, 0, 2]))
    expected = list(InProcess(CPU).train(spec, message, 1, [1, 0, 2]))
    assert all(isinstance(upload, PayloadError) for _, upload in expected)
    assert [(client, str(upload)) for client, upload in found] == [(client, str(upload)) for client, upload in expected]


@each_engine
@each_method
def test_a_message_that_cannot_be_read(tiny: MakeSpec, setting: dict[str, Any], kind: type[Any]) -> None:
    spec = tiny(**setting)
    *_, message = parts(spec)
    spoilt = message[:-1]
    found, expected = (list(engine.train(spec, spoilt, 1, [4, 2])) for engine in (kind(CPU), InProcess(CPU)))
    assert all(isinstance(upload, PayloadError) for _, upload in found)
    assert [(client, str(upload)) for client, upload in found] == [(client, str(upload)) for client, upload in expected]


@each_engine
def test_an_empty_cohort(tiny: MakeSpec, kind: type[Any]) -> None:
    spec = tiny()
    *_, message = parts(spec)
    assert list(kind(CPU).train(spec, message, 1, [])) == []


@each_engine
def test_evaluation_is_that_of_one_process(tiny: MakeSpec, kind: type[Any]) -> None:
    spec = tiny(model="slice")
    task, _, _, message = parts(spec)
    engine = kind(CPU)
    list(engine.train(spec, message, 1, [0]))
    assert engine.evaluate(spec, task.initial()) == InProcess(CPU).evaluate(spec, task.initial())


# The parts


def test_groups_by_hand() -> None:
    sizes = [10, 9, 7, 4, 4, 3]  # in batches of 4
    assert list(groups(sizes, 0, 4)) == [(slice(0, 5), 4), (slice(5, 6), 3)]
    assert list(groups(sizes, 4, 4)) == [(slice(0, 2), 4), (slice(2, 3), 3)]
    assert list(groups(sizes, 8, 4)) == [(slice(0, 1), 2), (slice(1, 2), 1)]


def test_progress_by_hand() -> None:
    plan = Plan(epochs=2, batch=4, lr=0.1)
    steps = [progress(plan, 9, epoch, start) for epoch in range(2) for start in (0, 4, 8)]
    assert steps == [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0]


def test_draws_are_tensors_and_floats_or_the_same_for_all() -> None:
    third = together((1 / 3, 0.5), CPU)
    assert third.dtype == torch.float64
    assert third.tolist() == [1 / 3, 0.5]
    assert together((torch.ones(2), torch.zeros(2)), CPU).tolist() == [[1, 1], [0, 0]]
    assert same(None, None) is None
    with pytest.raises(TypeError, match="draws: 3 changes from step to step"):
        together((3, 4), CPU)


@each_method
def test_torch_has_a_batching_rule_for_all_that_a_method_does(tiny: MakeSpec, setting: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(tiny(**setting, model=fits(setting)), Stacked(CPU), 1, [0, 1])


# Names, and the choice


def test_the_engines_by_name() -> None:
    assert ENGINES == ("auto", "process", "pool", "stacked", "graphed")
    with open_engine("stacked", "cpu") as stacked, open_engine("graphed", "cpu") as graphed:
        assert (type(stacked), type(graphed)) == (Stacked, Graphed)
    with pytest.raises(RunError, match="engine: 'graph' is unknown; allowed: auto, process, pool, stacked, graphed"):
        open_engine("graph", "cpu")


def test_fastest_tries_each_twice_and_changes_no_number(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny(method="fedmrn", rounds=8)
    reference, graphed, again = InProcess(CPU), Graphed(CPU), InProcess(CPU)
    with Fastest([reference, graphed, again]) as fastest:
        found = json.dumps(record.stable(rounds.run(spec, fastest, root=tmp_path)))
        (paces,) = fastest.paces.values()
        assert all(len(pace) >= 2 for pace in paces)
        assert sum(len(pace) for pace in paces) == 8
        assert fastest.name == f"Fastest: {type(fastest.last).__name__}"
    assert not graphed.steps  # closed with it
    assert found == json.dumps(record.stable(rounds.run(spec, reference, root=tmp_path)))


def test_fastest_keeps_the_one_whose_second_round_was_the_fastest(tiny: MakeSpec) -> None:
    spec, other = tiny(), tiny(batch=16)
    rivals = [InProcess(CPU), Graphed(CPU), Stacked(CPU)]
    fastest = Fastest(rivals)
    chosen = []
    for each in (spec, other):
        *_, message = parts(each)
        for round in range(1, 7):
            list(fastest.train(each, message, round, [0, 1]))
            chosen.append(fastest.last)
    assert chosen == [*rivals] * 4  # a new batch size is a new question
    for pace, seconds in zip(fastest.paces[spec.method, spec.model, spec.data, 32, 4], (3.0, 1.0, 2.0), strict=True):
        pace[:] = [0.0 if seconds == 3.0 else 9.0, seconds]  # the first round misleads
    *_, message = parts(spec)
    for round in (7, 8):
        list(fastest.train(spec, message, round, [0, 1]))
        assert fastest.last is rivals[1]


class Hungry(InProcess):
    """Takes more memory than there is: before its first upload, or after it."""

    def __init__(self, uploads: int) -> None:
        super().__init__(CPU)
        self.uploads = uploads

    def train(
        self, spec: Spec, message: bytes, round: int, cohort: Sequence[int], memories: Memories = None
    ) -> Iterator[tuple[int, Upload]]:
        yield from super().train(spec, message, round, cohort[: self.uploads], memories)
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_fastest_leaves_out_who_does_not_fit_into_memory(tiny: MakeSpec, caplog: pytest.LogCaptureFixture) -> None:
    spec = tiny()
    *_, message = parts(spec)
    expected = list(InProcess(CPU).train(spec, message, 1, [0, 1]))
    fastest = Fastest([Hungry(0), Graphed(CPU)])
    with caplog.at_level(logging.WARNING, "fedlib"):
        for _ in range(4):
            assert list(fastest.train(spec, message, 1, [0, 1])) == expected
    assert [line.getMessage() for line in caplog.records] == [
        "engine hungry does not fit into the GPU's memory: left out"
    ]
    for rivals in ([Hungry(0), Hungry(0)], [Hungry(1)]):  # nobody left; uploads that the server has read already
        with pytest.raises(torch.OutOfMemoryError), contextlib.closing(Fastest(rivals)) as hungry:
            list(hungry.train(spec, message, 1, [0, 1]))


# On a GPU

GPU = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in full precision: TensorFloat-32 rounds to ten bits, differently for each shape."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@needs_cuda
@each_method
@each_model
def test_captured_steps_train_as_one_process_does_on_a_gpu(
    tiny: MakeSpec, float32: None, setting: dict[str, Any], model: str
) -> None:
    spec = tiny(**UNEQUAL | {"batch": 16}, **setting, model=fits(setting, model))
    graphed = Graphed(GPU)
    for round in (1, 2):
        before, expected = trained(spec, None, round, COHORT, GPU)
        _, found = trained(spec, graphed, round, COHORT, GPU)
        for b, e, f in zip(before, expected, found, strict=True):
            assert distance(f, e, b) < TOLERANCE
    (step,) = graphed.steps.values()
    assert 16 in step.graphs
    assert all(length in step.graphs for length, steps in step.met.items() if steps > WARM_UP)


@needs_cuda
@each_method
@each_model
def test_stacked_trains_as_one_process_does_on_a_gpu(
    tiny: MakeSpec, float32: None, setting: dict[str, Any], model: str
) -> None:
    spec = tiny(**UNEQUAL, **setting, model=fits(setting, model))
    before, expected = trained(spec, None, 1, COHORT, GPU)
    _, found = trained(spec, Stacked(GPU), 1, COHORT, GPU)
    for b, e, f in zip(before, expected, found, strict=True):
        assert distance(f, e, b) < TOLERANCE


@needs_cuda
def test_auto_on_a_gpu_tries_all_three(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny(model="slice", rounds=7)
    with open_engine("auto", "cuda") as auto:
        assert isinstance(auto, Fastest)
        assert [type(rival) for rival in auto.rivals] == [InProcess, Graphed, Stacked]
        found = rounds.run(spec, auto, root=tmp_path)
        expected = rounds.run(spec, auto.rivals[0], root=tmp_path)
    assert found["final"]["accuracy"] == pytest.approx(expected["final"]["accuracy"], abs=0.05)
