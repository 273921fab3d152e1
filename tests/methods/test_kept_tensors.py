"""Tensors that a seed makes are made once a run and sent to a device once; device "meta" stands for a GPU."""

from typing import Any

import pytest
import torch
from engine_tasks import trained
from jobs import CPU, MakeSpec, job_of, message_of

from fedlib.core import client
from fedlib.core.client import Job
from fedlib.core.method import Local
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.vmapped import Stacked
from fedlib.methods.fedpt.method import FedPT, make_frozen
from fedlib.methods.fedsparse.masks import fixed_weights, kept_weights
from fedlib.methods.fedsparse.method import FedPM
from fedlib.rng import Rng
from fedlib.runs import rounds

pytestmark = pytest.mark.usefixtures("one_thread", "small_world")
each_engine = pytest.mark.parametrize("kind", [InProcess, Graphed, Stacked])
FEDPM: dict[str, Any] = {"method": "fedpm", "model": "smooth"}
FEDPT: dict[str, Any] = {"method": "fedpt", "model": "biased", "hyper": {"policy": "random/0.5"}}


def begun(job: Job) -> Local:
    return client.begin(job, message_of(job), 1, 0, None).local


@each_engine
def test_fixed_weights_are_made_once_and_nobody_changes_them(tiny: MakeSpec, kind: type[InProcess]) -> None:
    job = job_of(tiny(**FEDPM))
    method = job.method
    assert isinstance(method, FedPM)
    state = rounds.initial(job)
    kept_weights.cache_clear()
    for round in (1, 2):
        trained(job, kind(CPU), round, [0, 1, 2])
        method.models(state, Rng(round))
    assert kept_weights.cache_info().misses == 1
    local = begun(job)
    assert local.frozen["w"] is method.weights(local.seed)
    assert torch.equal(local.frozen["w"], fixed_weights(local.seed, method.weight_scale, method.shapes))


@each_engine
def test_the_frozen_part_is_made_once_and_nobody_changes_it(tiny: MakeSpec, kind: type[InProcess]) -> None:
    job = job_of(tiny(**FEDPT))
    method = job.method
    assert isinstance(method, FedPT)
    make_frozen.cache_clear()
    for round in (1, 2):
        trained(job, kind(CPU), round, [0, 1, 2])
    assert make_frozen.cache_info().misses == 1
    local = begun(job)
    kept, mark = method.frozen_part(local.seed)
    assert kept and all(local.frozen[name] is tensor for name, tensor in kept.items())
    make_frozen.cache_clear()
    fresh, again = method.frozen_part(local.seed)
    assert mark == again and all(torch.equal(fresh[name], tensor) for name, tensor in kept.items())


def test_a_device_gets_its_own_once(tiny: MakeSpec) -> None:
    fedpm, fedpt = job_of(tiny(**FEDPM)).method, job_of(tiny(**FEDPT)).method
    assert isinstance(fedpm, FedPM) and isinstance(fedpt, FedPT)
    kept_weights.cache_clear()
    make_frozen.cache_clear()
    elsewhere = torch.device("meta")
    for _ in range(3):
        assert fedpm.weights(5, elsewhere).device == elsewhere and fedpm.weights(5, CPU) is fedpm.weights(5)
        there, mark = fedpt.frozen_part(5, elsewhere)
        here, same = fedpt.frozen_part(5)
        assert {tensor.device for tensor in there.values()} == {elsewhere}
        assert {tensor.device for tensor in here.values()} == {CPU} and mark == same
    assert kept_weights.cache_info().misses == make_frozen.cache_info().misses == 2
    assert not torch.equal(fedpm.weights(6), fedpm.weights(5))  # another seed is another run's
