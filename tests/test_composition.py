"""Two methods in one run: a part of the network frozen under any method, one method's way down beside another's up."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlib.core.plan import State, count
from fedlib.core.task import Task
from fedlib.core.uploads import Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess, task_of
from fedlib.engines.pool import Pool
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError, SpecError
from fedlib.methods import messages, registry
from fedlib.methods.fedcompress import clustering
from fedlib.methods.fedcompress import method as fedcompress
from fedlib.rng import Rng
from fedlib.runs import record, rounds
from fedlib.runs.digest import code_of
from fedlib.runs.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MakeSpec = Callable[..., Spec]
LEVELS = {"method": "feddq", "hyper": {"schedule": "fixed", "width": 8, "quantizer": "affine_nearest"}}
COPIES = {"method": "fedcompress", "hyper": {"least": 16, "most": 16, "layers": "all", "self_compression": False}}
STUDENT = {
    "method": "fedcompress",
    "hyper": {"least": 16, "most": 16, "layers": "all", "images": 64, "distil_batch": 32, "distil_epochs": 1},
}
WRITERS = {"levels": LEVELS, "copies": COPIES, "student": STUDENT}
HYPER: dict[str, dict[str, Any]] = {  # of methods whose defaults are not for three rounds of a tiny network
    "fedmrn": {"magnitude": 0.05},
    "fedcompress": {"layers": "all", "least": 4, "most": 4, "images": 64, "distil_batch": 32, "distil_epochs": 1},
}
DENSE = {"model": "emnist-hidden8", "frozen": "emnist/dense1"}
ALL = sorted(set(registry.METHODS) - {"fedpt"})


def of(spec: Spec) -> tuple[Task, Any, Any, State]:
    task = task_of(spec.key(), CPU)
    return task, registry.METHODS[spec.method], registry.hyper(spec.method, spec.hyper), registry.initial(spec, task)


def run(spec: Spec, root: Path) -> record.Record:
    return rounds.run(spec, InProcess(CPU), root=root)


# Frozen parameters


@pytest.mark.parametrize("method", ALL)
def test_no_method_sends_or_trains_what_is_frozen(tiny: MakeSpec, tmp_path: Path, method: str) -> None:
    spec = tiny(method=method, hyper=HYPER.get(method, {}), **DENSE, held_out=0.1)
    task, _, _, state = of(spec)
    assert set(task.frozen) == {"dense1.weight", "dense1.bias"} and not set(task.frozen) & set(task.tensors)
    assert not set(task.frozen) & set(state)
    before = {name: task.network.get_parameter(name).clone() for name in task.frozen}
    found = run(spec, tmp_path)
    assert all(torch.equal(task.network.get_parameter(name), tensor) for name, tensor in before.items())
    whole = run(tiny(method=method, hyper=HYPER.get(method, {}), model="emnist-hidden8", held_out=0.1), tmp_path)
    for direction in ("uplink_bytes", "downlink_bytes"):
        assert found["final"][direction] < whole["final"][direction]
    assert found["parameters"]["frozen"] == count(task.frozen) > 0 == whole["parameters"]["frozen"]


def test_fedavg_saves_exactly_four_bytes_for_each_frozen_parameter(tiny: MakeSpec, tmp_path: Path) -> None:
    found, whole = (run(tiny(model="emnist-hidden8", frozen=f), tmp_path) for f in ("emnist/dense1", "none"))
    for direction in ("uplink_bytes", "downlink_bytes"):
        saved = whole["final"][direction] - found["final"][direction]
        assert saved == 4 * found["parameters"]["frozen"] * 3 * 4  # three rounds of four clients


def test_fedavg_with_a_frozen_part_is_fedpt(tiny: MakeSpec, tmp_path: Path) -> None:
    """The network's initial values are those that FedPT makes by the same law from the same seed."""
    ours = run(tiny(**DENSE), tmp_path)
    theirs = run(
        tiny(method="fedpt", hyper={"law": "glorot", "policy": "emnist/dense1"}, model="emnist-hidden8"), tmp_path
    )
    for one, other in zip(ours["rounds"], theirs["rounds"], strict=True):
        assert one["accuracy"] == other["accuracy"]
        assert one["loss"] is None or abs(one["loss"] - other["loss"]) < 1e-5


def test_a_frozen_tensor_is_trained_elsewhere_as_if_it_were_constant(tiny: MakeSpec) -> None:
    """Gradients of the rest are those of the whole network."""
    task, _, _, state = of(tiny(**DENSE))
    whole = task_of(tiny(model="emnist-hidden8").key(), CPU)
    batch = task.train[0][:16], task.train[1][:16]
    mine = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in whole.initial().items()}
    task.loss(mine, batch).backward()
    whole.loss(theirs, batch).backward()
    for name, tensor in mine.items():
        assert tensor.grad is not None and torch.equal(tensor.grad, theirs[name].grad)  # type: ignore[arg-type]


def test_sides_with_other_frozen_values_do_not_read_each_other(tiny: MakeSpec) -> None:
    (task, module, hyper, state), (other, *_) = of(tiny(**DENSE)), of(tiny(**DENSE, seed=1))
    message = module.broadcast(state, hyper, task)
    with pytest.raises(PayloadError, match="another model or other settings"):
        module.start(message, hyper, other, None)


# One method's way down


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("method", sorted(registry.PLAIN))
def test_every_plain_broadcast_can_be_written_by_another_method(tiny: MakeSpec, method: str, writer: str) -> None:
    spec = tiny(method=method, hyper=HYPER.get(method, {}), downlink=WRITERS[writer], model="emnist-hidden8")
    task, module, hyper, state = of(spec)
    message = module.broadcast(state, hyper, task)
    plain = task_of(tiny(model="emnist-hidden8").key(), CPU)
    assert len(message) < 0.5 * 4 * count(plain.tensors)
    trainable, frozen = module.start(message, hyper, task, Rng(0))
    assert task.downlink is not None
    read = task.downlink.read_model(task.downlink.write_model({name: state[name] for name in task.tensors}, task), task)
    if "w" in frozen:  # weights in one vector
        assert torch.equal(frozen["w"], torch.cat([read[name].flatten() for name in task.weights]))
    else:
        assert all(torch.equal(trainable[name], read[name]) for name in task.weights)
    assert any(not torch.equal(read[name], state[name]) for name in task.weights)
    for place in (len(message) // 3, len(message) - 1):
        altered = bytearray(message)
        altered[place] ^= 1
        with pytest.raises(PayloadError):
            module.start(bytes(altered), hyper, task, Rng(0))


def test_those_that_are_not_plain_have_a_broadcast_of_their_own(tiny: MakeSpec) -> None:
    for method in set(registry.METHODS) - registry.PLAIN:
        with pytest.raises(SpecError, match=f"downlink: {method} has a broadcast of its own"):
            tiny(method=method, hyper=HYPER.get(method, {}), downlink=LEVELS, held_out=0.1)


def test_those_that_are_not_plain_broadcast_something_else(tiny: MakeSpec) -> None:
    """Who broadcasts the model as it is belongs among the plain ones."""
    for method in set(registry.METHODS) - registry.PLAIN:
        task, module, hyper, state = of(tiny(method=method, hyper=HYPER.get(method, {}), held_out=0.1))
        with pytest.raises(PayloadError):
            messages.unpack_model(module.broadcast(state, hyper, task), f"{method}.down", hyper, task)


def test_levels_are_nearest_and_copies_have_as_many_values(tiny: MakeSpec) -> None:
    for downlink in (LEVELS, COPIES):
        task, _, _, state = of(tiny(downlink=downlink, model="emnist-hidden8"))
        assert task.downlink is not None
        read = task.downlink.read_model(task.downlink.write_model(state, task), task)
        for name in task.weights:
            x, y = state[name], read[name]
            if downlink is LEVELS:
                step = float(x.max() - x.min()) / 255
                assert float((x - y).abs().max()) <= 0.5001 * step
            elif x.numel() > 16:
                assert y.unique().numel() == 16
                line = clustering.Line.of(x)
                found = float((x - y).square().mean())
                first = clustering.seeds(x, 16, fedcompress.SEEDS)
                assert found < clustering.distortion(line, first), "Lloyd's steps come after the first centroids"
            else:
                assert torch.equal(x, y)


def test_the_server_keeps_its_own_model(tiny: MakeSpec) -> None:
    """What the server adds updates to has not been rounded."""
    spec = tiny(method="topk", hyper={}, downlink=LEVELS, model="emnist-hidden8", lr=1e-12)
    task, module, hyper, state = of(spec)
    message = module.broadcast(state, hyper, task)
    replies = InProcess(CPU).train(spec, message, 1, [0, 1, 2, 3])
    new = module.server(state, Uploads(replies), hyper, task)  # type: ignore[arg-type]
    assert all(torch.allclose(new[name], state[name], rtol=0, atol=1e-9) for name in task.weights)


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_evaluated_is_what_clients_would_read(tiny: MakeSpec, tmp_path: Path, writer: str) -> None:
    """Also for a method whose state holds more than the model."""
    for method in ("fedavg", "feddq"):
        spec = tiny(method=method, hyper={}, downlink=WRITERS[writer], model="emnist-hidden8", rounds=1)
        task, module, hyper, state = of(spec)
        (found,) = registry.models(spec, task, state, 1)
        trainable, frozen = module.start(module.broadcast(state, hyper, task), hyper, task, Rng(0))
        assert found.keys() == task.tensors.keys()
        assert all(torch.equal(found[name], (trainable | frozen)[name]) for name in task.tensors)
        assert any(not torch.equal(found[name], state[name]) for name in task.weights)
        (plain,) = registry.models(spec, dataclasses.replace(task, downlink=None), state, 1)
        assert all(torch.equal(plain[name], state[name]) for name in task.tensors)
        new, entry = rounds.one_round(spec, task, InProcess(CPU), state, 1, {})
        seen = rounds.evaluate(spec, task, InProcess(CPU), new, 1)
        assert seen == (entry["accuracy"], entry["loss"])
        assert seen[1] == InProcess(CPU).evaluate(spec, registry.models(spec, task, new, 1)[0])[1]
        assert seen[1] != InProcess(CPU).evaluate(spec, {name: new[name] for name in task.tensors})[1]


# All together


def together(tiny: MakeSpec) -> Spec:
    """FedMRN's masks, coded, of a part of the network; error fed back; the model in eight bits an entry."""
    return tiny(
        method="fedmrn", hyper={"magnitude": 0.05, "coding": "entropy"}, feedback=True, downlink=LEVELS, **DENSE
    )


def test_engines_agree_on_a_combination(tiny: MakeSpec, tmp_path: Path) -> None:
    spec = together(tiny)
    reference = record.stable(run(spec, tmp_path))
    assert record.stable(rounds.run(spec, Graphed(CPU), root=tmp_path)) == reference
    with Pool(2) as pool:
        assert record.stable(rounds.run(spec, pool, root=tmp_path)) == reference
    stacked = rounds.run(spec, Stacked(CPU), root=tmp_path)
    assert abs(stacked["final"]["accuracy"] - reference["final"]["accuracy"]) < 0.02


def test_a_combination_sends_less_than_its_parts(tiny: MakeSpec, tmp_path: Path) -> None:
    whole = run(together(tiny), tmp_path)["final"]
    for less in ({"frozen": "none"}, {"downlink": None}):
        other = run(Spec.from_dict(together(tiny).as_dict() | less), tmp_path)["final"]
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


@pytest.mark.parametrize("policy", ["emnist/dense1", "half", "random/2", None, 3])
def test_a_policy_must_fit_the_network(tiny: MakeSpec, policy: Any) -> None:
    with pytest.raises(SpecError, match=r"^frozen: "):
        task_of(tiny(frozen=policy).key(), CPU)  # a perceptron without a layer dense1
