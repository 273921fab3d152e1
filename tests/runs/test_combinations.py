"""What goes with any method: a part of the network frozen, another method that writes its broadcast, all at once."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import CPU, MakeSpec, job_of, message_of, ran
from known_answers import DENSE

from fedlib.core.client import Job
from fedlib.core.method import Local
from fedlib.core.plan import Tensors, count
from fedlib.core.uploads import Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess
from fedlib.engines.pool import Pool
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import messages, registry
from fedlib.methods.fedcompress import clustering
from fedlib.methods.fedcompress import method as fedcompress
from fedlib.rng import Rng
from fedlib.runs import rounds
from fedlib.runs.digest import code_of
from fedlib.runs.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = {"method": "feddq", "hyper": {"schedule": "fixed", "width": 8, "quantizer": "affine_nearest"}}
COPIES = {"method": "fedcompress", "hyper": {"least": 16, "most": 16, "layers": "all", "self_compression": False}}
STUDENT = {
    "method": "fedcompress",
    "hyper": {"least": 16, "most": 16, "layers": "all", "images": 64, "distil_batch": 32, "distil_epochs": 1},
}
HYPER: dict[str, dict[str, Any]] = {  # of methods whose defaults are not for three rounds of a tiny network
    "fedmrn": {"magnitude": 0.05},
    "fedcompress": {"layers": "all", "least": 4, "most": 4, "images": 64, "distil_batch": 32, "distil_epochs": 1},
}
WRITERS = {"levels": LEVELS, "copies": COPIES, "student": STUDENT}
PLAIN = sorted(name for name, method in registry.METHODS.items() if method.plain)

# A part frozen


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


# A broadcast that another method writes


def begun(job: Job, message: bytes) -> Local:
    return job.method.begin(message, job.task.shard(0), Rng(0))


def read(job: Job, model: Tensors) -> Tensors:
    """A model as clients read it from the writer's message."""
    assert job.method.writer is not None
    return job.method.writer.received(model)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("method", PLAIN)
def test_every_plain_broadcast_can_be_written_by_another_method(tiny: MakeSpec, method: str, writer: str) -> None:
    spec = tiny(method=method, hyper=HYPER.get(method, {}), downlink=WRITERS[writer], model="emnist-hidden8")
    job, state = job_of(spec), rounds.initial(job_of(spec))
    task, message = job.task, message_of(job)
    assert len(message) < 0.5 * 4 * count(job_of(tiny(model="emnist-hidden8")).task.tensors)
    local, received = begun(job, message), read(job, state.model)
    if "w" in local.frozen:  # weights in one vector
        assert torch.equal(local.frozen["w"], torch.cat([received[name].flatten() for name in task.weights]))
    else:
        assert all(torch.equal(local.trainable[name], received[name]) for name in task.weights)
    assert any(not torch.equal(received[name], state.model[name]) for name in task.weights)
    for place in (len(message) // 3, len(message) - 1):
        altered = bytearray(message)
        altered[place] ^= 1
        with pytest.raises(PayloadError):
            begun(job, bytes(altered))


@pytest.mark.parametrize("method", sorted(set(registry.METHODS) - set(PLAIN)))
def test_those_that_are_not_plain_have_a_broadcast_of_their_own(tiny: MakeSpec, method: str) -> None:
    """Who broadcasts the model as it is belongs among the plain ones."""
    fields = {"method": method, "hyper": HYPER.get(method, {}), "held_out": 0.1}
    with pytest.raises(SpecError, match=f"downlink: {method} has a broadcast of its own"):
        tiny(**fields, downlink=LEVELS)
    job = job_of(tiny(**fields))
    with pytest.raises(PayloadError):
        messages.unpack_broadcast(job.method, message_of(job))


@pytest.mark.parametrize("downlink", [LEVELS, COPIES], ids=["levels", "copies"])
def test_levels_are_nearest_and_copies_have_as_many_values(tiny: MakeSpec, downlink: dict[str, Any]) -> None:
    job = job_of(tiny(downlink=downlink, model="emnist-hidden8"))
    model = rounds.initial(job).model
    received = read(job, model)
    for name in job.task.weights:
        x, y = model[name], received[name]
        if downlink is LEVELS:
            step = float(x.max() - x.min()) / 255
            assert float((x - y).abs().max()) <= 0.5001 * step
        elif x.numel() > 16:
            assert y.unique().numel() == 16
            found = float((x - y).square().mean())
            first = clustering.seeds(x, 16, fedcompress.SEEDS)
            begin = clustering.distortion(clustering.Line.of(x), first)
            assert found < begin, "Lloyd's steps come after the first centroids"
        else:
            assert torch.equal(x, y)


def test_the_server_keeps_its_own_model(tiny: MakeSpec) -> None:
    """What the server adds updates to has not been rounded."""
    job = job_of(tiny(method="topk", hyper={}, downlink=LEVELS, model="emnist-hidden8", lr=1e-12))
    state = rounds.initial(job)
    replies = InProcess(CPU).train(job, message_of(job), 1, [0, 1, 2, 3])
    new = job.method.aggregate(state, Uploads(rounds.remembered(replies, {})))
    assert all(torch.allclose(new.model[name], state.model[name], rtol=0, atol=1e-9) for name in job.task.weights)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("method", ["fedavg", "feddq"])
def test_what_is_evaluated_is_what_clients_would_read(tiny: MakeSpec, tmp_path: Path, method: str, writer: str) -> None:
    """Also for a method whose state holds more than the model."""
    spec = tiny(method=method, hyper={}, downlink=WRITERS[writer], model="emnist-hidden8", rounds=1)
    job, engine = job_of(spec), InProcess(CPU)
    state = rounds.initial(job)
    local, received = begun(job, message_of(job)), read(job, state.model)
    assert received.keys() == job.task.tensors.keys()
    assert all(torch.equal(received[name], (local.trainable | local.frozen)[name]) for name in job.task.tensors)
    assert any(not torch.equal(received[name], state.model[name]) for name in job.task.weights)
    new, entry = rounds.one_round(spec, job, engine, state, 1, {})
    plain = dataclasses.replace(job, method=job.method.bind(job.task))
    seen, unwritten = (rounds.evaluate(each, engine, new, 1) for each in (job, plain))
    assert seen == {"accuracy": entry["accuracy"], "loss": entry["loss"]}
    assert tuple(seen.values()) == engine.evaluate(job, read(job, new.model))
    assert seen["loss"] != unwritten["loss"] and tuple(unwritten.values()) == engine.evaluate(job, new.model)


# All together


def together(tiny: MakeSpec) -> Spec:
    """FedMRN's masks, coded, of a part of the network; error fed back; the model in eight bits an entry."""
    return tiny(
        method="fedmrn", hyper={"magnitude": 0.05, "coding": "entropy"}, feedback=True, downlink=LEVELS, **DENSE
    )


def test_engines_agree_on_a_combination(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = together(tiny)
    reference = ran(spec, tmp_path)
    assert ran(spec, tmp_path, Graphed(CPU)) == reference
    with Pool(1) as pool:  # that several share a cohort changes nothing: tests of the pool and of clients' memories
        assert ran(spec, tmp_path, pool) == reference
    stacked = ran(spec, tmp_path, Stacked(CPU))
    assert abs(stacked["final"]["accuracy"] - reference["final"]["accuracy"]) < 0.02


def test_a_combination_sends_less_than_its_parts(tiny: MakeSpec, tmp_path: Path) -> None:
    whole = ran(together(tiny), tmp_path)["final"]
    for less in ({"frozen": "none"}, {"downlink": None}):
        other = ran(Spec.from_dict(together(tiny).as_dict() | less), tmp_path)["final"]
        total = [sum(final[d] for d in ("uplink_bytes", "downlink_bytes")) for final in (whole, other)]
        assert total[0] < total[1]


def test_the_digest_knows_who_wrote_the_broadcast(tiny: MakeSpec) -> None:
    plain, levels, copies = (code_of(tiny(downlink=d)) for d in (None, LEVELS, COPIES))
    assert len({plain, levels, copies}) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"downlink": {"method": "fedavg"}}, "downlink.method: 'fedavg' is unknown; allowed: fedcompress, feddq"),
        ({"downlink": {}}, "downlink.method: None"),
        ({"downlink": "feddq"}, "downlink: 'feddq' must be a mapping"),
        ({"downlink": {"method": "feddq", "width": 4}}, "downlink: unknown key 'width'; allowed: hyper, method"),
        ({"downlink": {"method": "feddq", "hyper": {"bits": 4}}}, "downlink.hyper of feddq: unknown key 'bits'"),
        ({"downlink": {"method": "feddq"}}, "downlink.hyper.quantizer: 'affine_stochastic'"),
        (
            {"downlink": {"method": "feddq", "hyper": {"schedule": "loss", "quantizer": "affine_nearest"}}},
            "downlink.hyper.schedule: 'loss'",
        ),
        ({"downlink": {"method": "fedcompress"}}, "set least = most"),
        ({"method": "fedpt", "frozen": "emnist/dense1"}, "fedpt freezes by hyper.policy"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(tiny: MakeSpec, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as refused:
        tiny(**changes)
    assert words in str(refused.value)
