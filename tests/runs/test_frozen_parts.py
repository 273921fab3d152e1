"""A part of the network frozen under any method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import DENSE, HYPER
from jobs import CPU, MakeSpec, job_of, message_of, ran

from fedlib.core.plan import count
from fedlib.engines.in_process import InProcess
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import registry
from fedlib.rng import Rng
from fedlib.runs import rounds

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", sorted(set(registry.METHODS) - {"fedpt"}))
def test_no_method_sends_or_trains_what_is_frozen(tiny: MakeSpec, tmp_path: Path, method: str) -> None:
    fields = {"method": method, "hyper": HYPER.get(method, {}), "held_out": 0.1}
    spec, plain = tiny(**fields, **DENSE), tiny(**fields, model=DENSE["model"])
    job = job_of(spec)
    task = job.task
    assert set(task.frozen) == {"dense1.weight", "dense1.bias"} and not set(task.frozen) & set(task.tensors)
    assert not set(task.frozen) & set(rounds.initial(job).model)
    before = {name: task.network.get_parameter(name).clone() for name in task.frozen}
    rounds.one_round(spec, job, InProcess(CPU), rounds.initial(job), 1, {}, {})
    assert all(torch.equal(task.network.get_parameter(name), tensor) for name, tensor in before.items())
    found, whole = ran(spec, tmp_path), ran(plain, tmp_path)
    for direction in ("uplink_bytes", "downlink_bytes"):
        assert found["final"][direction] < whole["final"][direction]
    assert found["parameters"]["frozen"] == count(task.frozen) > 0 == whole["parameters"]["frozen"]


def test_fedavg_saves_exactly_four_bytes_for_each_frozen_parameter(tiny: MakeSpec, tmp_path: Path) -> None:
    found, whole = (ran(tiny(model="emnist-hidden8", frozen=f), tmp_path) for f in ("emnist/dense1", "none"))
    for direction in ("uplink_bytes", "downlink_bytes"):
        saved = whole["final"][direction] - found["final"][direction]
        assert saved == 4 * found["parameters"]["frozen"] * 3 * 4  # three rounds of four clients


def test_fedavg_with_a_frozen_part_is_fedpt(tiny: MakeSpec, tmp_path: Path) -> None:
    """The network's initial values are those that FedPT makes by the same law from the same seed."""
    hyper = {"law": "glorot", "policy": "emnist/dense1"}
    ours = ran(tiny(**DENSE), tmp_path)
    theirs = ran(tiny(method="fedpt", hyper=hyper, model="emnist-hidden8"), tmp_path)
    for one, other in zip(ours["rounds"], theirs["rounds"], strict=True):
        assert one["accuracy"] == other["accuracy"]
        assert one["loss"] is None or abs(one["loss"] - other["loss"]) < 1e-5


def test_a_frozen_tensor_is_trained_elsewhere_as_if_it_were_constant(tiny: MakeSpec) -> None:
    """Gradients of the rest are those of the whole network."""
    part, whole = (job_of(tiny(**fields)).task for fields in (DENSE, {"model": "emnist-hidden8"}))
    gradients = []
    for task in (part, whole):
        own = {name: tensor.requires_grad_() for name, tensor in task.initial().items()}
        task.loss(own, (task.train[0][:16], task.train[1][:16])).backward()
        gradients.append({name: tensor.grad for name, tensor in own.items()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert gradient is not None and other is not None and torch.equal(gradient, other)


def test_sides_with_other_frozen_values_do_not_read_each_other(tiny: MakeSpec) -> None:
    job, other = job_of(tiny(**DENSE)), job_of(tiny(**DENSE, seed=1))
    with pytest.raises(PayloadError, match="another model or other settings"):
        other.method.begin(message_of(job), other.task.shard(0), Rng(0))


@pytest.mark.parametrize("policy", ["emnist/dense1", "half", "random/2", None, 3])
def test_a_policy_must_fit_the_network(tiny: MakeSpec, policy: Any) -> None:
    with pytest.raises(SpecError, match=r"^frozen: "):
        job_of(tiny(frozen=policy))  # a perceptron without a layer dense1
