"""Clients that diverge or cannot read the message, and cohorts without clients, in the engines for a GPU."""

from typing import Any

import pytest
from engine_tasks import SETTINGS, SPOILT, TOLERANCE, distance, each_method, sizes, trained
from jobs import CPU, MakeSpec, job_of, message_of

from fedlib.core.client import Job
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError

pytestmark = pytest.mark.usefixtures("one_thread", "small_world")
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
def test_a_client_that_diverges_does_not_disturb_the_others(
    tiny: MakeSpec, setting: dict[str, Any], kind: Kind
) -> None:
    # Scores take more: the gradient of a huge image, but not of the others, times the largest learning rate overflows.
    own: dict[str, dict[str, Any]] = {"fedpm": {"model": "mlp", "lr": 1e12}, "fedpt": {"model": "biased"}}
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
def test_a_message_that_cannot_be_read(tiny: MakeSpec, setting: dict[str, Any], kind: Kind) -> None:
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
