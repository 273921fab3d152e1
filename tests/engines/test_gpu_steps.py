"""The engines for a GPU, on a CPU: Graphed gives the reference's bytes, Stacked its numbers within rounding."""

import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tasks import (
    COHORT,
    ROUNDING,
    SETTINGS,
    SIZES,
    SPOILT,
    TOLERANCE,
    UNEQUAL,
    distance,
    fits,
    sizes,
    trained,
)  # fmt: skip
from jobs import CPU, MakeSpec, job_of, message_of, ran

from fedlib.core import client as core_client
from fedlib.core.client import Job
from fedlib.core.plan import Plan
from fedlib.engines import cuda_device
from fedlib.engines.automatic import Fastest
from fedlib.engines.cuda_graph import WARM_UP, Graphed
from fedlib.engines.gpu_steps import progress, same
from fedlib.engines.in_process import InProcess
from fedlib.engines.select import open_engine
from fedlib.engines.vmapped import Stacked, groups, together
from fedlib.errors import PayloadError
from fedlib.runs import rounds

pytestmark = pytest.mark.usefixtures("one_thread", "small_world")
Setting = dict[str, Any]
each_method = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
each_model = pytest.mark.parametrize("model", ["mlp", "slice", "biased"])

# Same numbers


def test_the_cohort_has_the_sizes_that_matter(tiny: MakeSpec) -> None:
    task = job_of(tiny(**UNEQUAL)).task
    assert [len(task.partition.indices(client)) for client in range(10)] == SIZES
    assert SIZES[1] % 76 == 1
    assert max(SIZES[0], SIZES[8]) < 76


@each_method
@each_model
def test_graphed_on_a_cpu_gives_the_bytes_of_one_process(tiny: MakeSpec, setting: Setting, model: str) -> None:
    job, other = (job_of(tiny(**UNEQUAL, **setting, model=fits(setting, model), lr=lr)) for lr in (0.1, 0.3))
    message = message_of(job)
    reference, graphed = InProcess(CPU), Graphed(CPU)
    # Another run in between, and a round left half-way: nothing of them may stay in the static tensors.
    for each, round in ((job, 1), (other, 1), (job, 2)):
        left = graphed.train(each, message_of(each, 9), 9, COHORT)
        next(left)
        found, expected = (
            list(engine.train(each, message_of(each, round), round, COHORT)) for engine in (graphed, reference)
        )
        assert found == expected
        next(left)
    assert graphed.client(job, message, 1, 2) == reference.client(job, message, 1, 2)
    assert graphed.client(job, message, 1, 2) != graphed.client(
        job, message_of(job, 2), 2, 2
    )  # the comparison can fail


@each_method
@each_model
def test_stacked_trains_as_one_process_does(tiny: MakeSpec, setting: Setting, model: str) -> None:
    job = job_of(tiny(**UNEQUAL, **setting, model=fits(setting, model)))
    before, expected = trained(job, InProcess(CPU), 1, COHORT)
    _, found = trained(job, Stacked(CPU), 1, COHORT)
    _, others = trained(job, InProcess(CPU), 2, COHORT)  # same shards, other draws
    distances = [distance(f, e, b) for f, e, b in zip(found, expected, before, strict=True)]
    assert max(distances) < TOLERANCE
    assert statistics.median(distances) < ROUNDING
    for client, b, e, o in zip(COHORT, before, expected, others, strict=True):
        if SIZES[client] > UNEQUAL["batch"]:  # another batch order or other draws would be noticed
            assert distance(o, e, b) > 2 * TOLERANCE


@each_method
@pytest.mark.parametrize("model", ["mlp", "slice"])
def test_a_round_of_stacked_ends_in_the_state_of_one_process(tiny: MakeSpec, setting: Setting, model: str) -> None:
    spec = tiny(**UNEQUAL, **setting, model=fits(setting, model), cohort=5)
    job = job_of(spec)
    begin = rounds.initial(job)
    expected, reference = rounds.one_round(spec, job, InProcess(CPU), begin, 1, {})
    found, entry = rounds.one_round(spec, job, Stacked(CPU), begin, 1, {})
    assert entry["clients"] == reference["clients"]
    # Entropy-coded uploads may differ by the bytes of a level that rounds the other way.
    assert entry["uplink_bytes"] == pytest.approx(reference["uplink_bytes"], rel=1e-2)
    assert entry["downlink_bytes"] == reference["downlink_bytes"]
    before, after, other = (
        torch.cat([state.model[name].flatten() for name in sorted(begin.model)]) for state in (begin, expected, found)
    )
    assert distance(other, after, before) < 0.05  # a level or a mask entry that falls on its other side is a whole one


@each_method
def test_stacked_answers_in_the_order_of_the_cohort_with_messages_of_the_same_size(
    tiny: MakeSpec, setting: Setting
) -> None:
    job = job_of(tiny(**UNEQUAL, **setting))
    message = message_of(job)
    expected = dict(InProcess(CPU).train(job, message, 1, range(10)))
    for cohort in (COHORT, COHORT[::-1], [7], [8, 9]):
        found = dict(Stacked(CPU).train(job, message, 1, cohort))
        assert list(found) == cohort
        assert sizes([*found.values()]) == pytest.approx(sizes([expected[client] for client in cohort]), rel=1e-2)


@each_method
def test_a_run_with_graphed_has_the_record_of_one_process(tiny: MakeSpec, tmp_path: Path, setting: Setting) -> None:
    spec = tiny(**setting)
    assert ran(spec, tmp_path, Graphed(CPU)) == ran(spec, tmp_path)


# Clients that diverge or cannot read the message, and cohorts without clients

each_engine = pytest.mark.parametrize("kind", [Graphed, Stacked])
PLAIN = {name: setting for name, setting in SETTINGS.items() if "optimizer" not in setting}
Kind = type[Graphed] | type[Stacked]


def assert_all_fail_alike(job: Job, message: bytes, cohort: list[int], kind: Kind) -> None:
    """Each client with the error that it has in the reference."""
    found, expected = (list(engine.train(job, message, 1, cohort)) for engine in (kind(CPU), InProcess(CPU)))
    assert all(isinstance(upload, PayloadError) for _, upload in (*found, *expected))
    assert [(client, str(upload)) for client, upload in found] == [(client, str(upload)) for client, upload in expected]


@each_engine
@pytest.mark.parametrize("setting", PLAIN.values(), ids=PLAIN)
def test_a_client_that_diverges_does_not_disturb_the_others(tiny: MakeSpec, setting: Setting, kind: Kind) -> None:
    # Scores take more: the gradient of a huge image, but not of the others, times the largest learning rate overflows.
    own: dict[str, Setting] = {"fedpm": {"model": "mlp", "lr": 1e12}, "fedpt": {"model": "biased"}}
    job = job_of(tiny(data="spoilt", **setting, **own.get(setting["method"], {"model": "slice"})))
    message, cohort = message_of(job), [2, SPOILT, 7, 0]
    expected, found = (dict(engine.train(job, message, 1, cohort)) for engine in (InProcess(CPU), kind(CPU)))
    assert [client for client, upload in expected.items() if isinstance(upload, PayloadError)] == [SPOILT]
    assert str(found.pop(SPOILT)) == str(expected.pop(SPOILT))
    if kind is Graphed:
        assert found == expected
    assert list(found) == list(expected)
    assert sizes([*found.values()]) == pytest.approx(sizes([*expected.values()]), rel=1e-2)
    before, reference = trained(job, InProcess(CPU), 1, cohort)
    _, after = trained(job, kind(CPU), 1, cohort)
    for client, b, e, f in zip(cohort, before, reference, after, strict=True):
        assert client == SPOILT or distance(f, e, b) < TOLERANCE


@each_engine
def test_when_all_diverge_each_answers_with_its_error(tiny: MakeSpec, kind: Kind) -> None:
    job = job_of(tiny(lr=1e12, epochs=3))
    assert_all_fail_alike(job, message_of(job), [1, 0, 2], kind)


@each_engine
@each_method
def test_a_message_that_cannot_be_read(tiny: MakeSpec, setting: Setting, kind: Kind) -> None:
    job = job_of(tiny(**setting))
    assert_all_fail_alike(job, message_of(job)[:-1], [4, 2], kind)


@each_engine
def test_an_empty_cohort(tiny: MakeSpec, kind: Kind) -> None:
    job = job_of(tiny())
    assert list(kind(CPU).train(job, message_of(job), 1, [])) == []


@each_engine
def test_evaluation_is_that_of_one_process(tiny: MakeSpec, kind: Kind) -> None:
    job = job_of(tiny(model="slice"))
    engine, model = kind(CPU), job.task.initial()
    list(engine.train(job, message_of(job), 1, [0]))
    assert engine.evaluate(job, model) == InProcess(CPU).evaluate(job, model)


class Elsewhere(torch.Tensor):
    """A tensor that counts how often it is sent to a device."""

    sent = 0

    def to(self, *arguments: Any, **options: Any) -> torch.Tensor:
        Elsewhere.sent += 1
        return self.as_subclass(torch.Tensor).to(*arguments, **options)


def test_a_model_goes_to_the_device_once_an_evaluation(tiny: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_client, "CHUNK", 50)
    job = job_of(tiny(model="slice"))
    model = job.task.initial()
    assert len(core_client.chunks(job.task)) == 8
    expected = InProcess(CPU).evaluate(job, model)
    counted = {name: tensor.as_subclass(Elsewhere) for name, tensor in model.items()}
    assert InProcess(CPU).evaluate(job, counted) == expected  # type: ignore[arg-type]
    assert Elsewhere.sent == len(model)


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
def test_torch_has_a_batching_rule_for_all_that_a_method_does(tiny: MakeSpec, setting: Setting) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(job_of(tiny(**setting, model=fits(setting))), Stacked(CPU), 1, [0, 1])


# On a GPU

GPU = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def float32() -> None:
    """As an engine sets it where it opens: TensorFloat-32 rounds to ten bits, differently for each shape."""
    cuda_device.set_precision()


@needs_cuda
@each_method
@each_model
def test_captured_steps_train_as_one_process_does_on_a_gpu(
    tiny: MakeSpec, float32: None, setting: Setting, model: str
) -> None:
    job = job_of(tiny(**UNEQUAL | {"batch": 16}, **setting, model=fits(setting, model)), GPU)
    graphed = Graphed(GPU)
    for round in (1, 2):
        before, expected = trained(job, InProcess(GPU), round, COHORT)
        _, found = trained(job, graphed, round, COHORT)
        for b, e, f in zip(before, expected, found, strict=True):
            assert distance(f, e, b) < TOLERANCE
    (step,) = graphed.steps.values()
    assert 16 in step.graphs
    assert all(length in step.graphs for length, steps in step.met.items() if steps > WARM_UP)


@needs_cuda
@each_method
@each_model
def test_stacked_trains_as_one_process_does_on_a_gpu(
    tiny: MakeSpec, float32: None, setting: Setting, model: str
) -> None:
    job = job_of(tiny(**UNEQUAL, **setting, model=fits(setting, model)), GPU)
    before, expected = trained(job, InProcess(GPU), 1, COHORT)
    _, found = trained(job, Stacked(GPU), 1, COHORT)
    for b, e, f in zip(before, expected, found, strict=True):
        assert distance(f, e, b) < TOLERANCE


@needs_cuda
def test_auto_on_a_gpu_tries_all_three(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = tiny(model="slice", rounds=7)
    with open_engine("auto", "cuda") as auto:
        assert isinstance(auto, Fastest)
        assert [type(rival) for rival in auto.rivals] == [InProcess, Graphed, Stacked]
        found, expected = (ran(spec, tmp_path, engine) for engine in (auto, auto.rivals[0]))
    assert found["final"]["accuracy"] == pytest.approx(expected["final"]["accuracy"], abs=0.05)
