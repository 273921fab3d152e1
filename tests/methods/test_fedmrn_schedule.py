"""The magnitude of FedMRN's noise, which the server makes smaller from round to round."""

from pathlib import Path

import pytest
import torch
from jobs import CPU, MakeSpec, job_of, message_of, ran

from fedlib.core import client
from fedlib.core.method import Phase
from fedlib.core.uploads import Uploads
from fedlib.engines.in_process import InProcess
from fedlib.errors import SpecError
from fedlib.runs import rounds
from fedlib.wire import container

pytestmark = pytest.mark.usefixtures("one_thread")


def test_magnitude_falls_by_its_factor_and_travels_with_the_model(tiny: MakeSpec) -> None:
    job, plain = (job_of(tiny(method="fedmrn", hyper={"magnitude": 0.5} | more)) for more in ({"decay": 0.25}, {}))
    method, state = job.method, rounds.initial(job)
    assert len(message_of(job)) == len(message_of(plain)) + 4
    for magnitude in (0.5, 0.125, 0.03125):
        assert state.own == magnitude
        message = method.broadcast(state)
        member = client.begin(job, message, 1, 1, None)
        client.train(method, Phase(job.task.plan), [member])
        n = member.local.frozen["n"]
        assert 0.9 * magnitude < n.abs().max() <= magnitude
        upload = InProcess(CPU).client(job, message, 1, 1)
        assert isinstance(upload, bytes)
        assert container.section_sizes(upload)[0] == 8  # still the seed alone: the server knows the magnitude
        update = method.sent(upload, member.local)
        assert torch.equal(update[update != 0], n[update != 0])
        before = torch.cat([state.model[name].flatten() for name in job.task.weights])
        state = method.aggregate(state, Uploads([(1, upload)]))
        after = torch.cat([state.model[name].flatten() for name in job.task.weights])
        assert torch.equal(after, before + update)


def test_without_a_schedule_nothing_is_kept_or_sent(tiny: MakeSpec) -> None:
    job = job_of(tiny(method="fedmrn", hyper={"decay": 1.0}))
    state = rounds.initial(job)
    assert state.model.keys() == job.task.initial().keys() and state.own == 0.01
    assert len(message_of(job)) == len(message_of(job_of(tiny(method="fedmrn"))))


def test_entropy_coded_masks_follow_the_schedule(tiny: MakeSpec, tmp_path: Path) -> None:
    """The coder's contexts depend on the magnitude: both sides must use that of the round."""
    hyper = {"magnitude": 0.2, "decay": 0.5}
    packed, coded = (
        ran(tiny(method="fedmrn", hyper=hyper | {"coding": coding}, rounds=5), tmp_path)
        for coding in ("packed", "entropy")
    )
    assert not any(entry["refused"] for entry in coded["rounds"])
    assert [entry["loss"] for entry in coded["rounds"]] == [entry["loss"] for entry in packed["rounds"]]
    assert coded["final"]["uplink_parts"]["mask"] < packed["final"]["uplink_parts"]["mask"]


@pytest.mark.parametrize("decay", [0.0, 1.5, float("nan"), "fast"])
def test_decay_out_of_range(tiny: MakeSpec, decay: object) -> None:
    with pytest.raises(SpecError, match=r"hyper\.decay"):
        tiny(method="fedmrn", hyper={"decay": decay})
