"""Parts of local training, samples held out, cohorts by chance, owners and sequences: a method made for the test."""

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedlib.core.client import run_client, train
from fedlib.core.loss import cross_entropy
from fedlib.core.plan import Plan
from fedlib.data import partition
from fedlib.data.text import NO_LABEL
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess, task_of
from fedlib.engines.vmapped import Stacked
from fedlib.errors import SpecError
from fedlib.methods import fedavg, registry
from fedlib.methods.messages import unpack_model
from fedlib.rng import Rng, permutation
from fedlib.runs import rounds
from fedlib.runs.spec import Spec

MakeSpec = Callable[..., Spec]
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Hyper:
    """As FedAvg's, but another class."""


PLAIN: Any = Hyper()


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """FedAvg in two parts: as planned; then two epochs of Adam at a tenth, after all tensors were halved; and with the
    number of samples held out at the end of the upload."""
    module = types.ModuleType("fedlib.methods.fedavg")
    for name, value in vars(fedavg).items():
        setattr(module, name, value)
    module.Hyper = Hyper  # type: ignore[attr-defined]

    def stages(hyper: Any, plan: Plan) -> list[Plan]:
        return [plan, dataclasses.replace(plan, epochs=2, optimizer="adam", lr=plan.lr / 10)]

    def enter(stage: int, trainable: Any, frozen: Any, hyper: Any, task: Any, rng: Rng) -> None:
        if stage:
            with torch.no_grad():
                for tensor in trainable.values():
                    tensor.mul_(0.5)

    def assess(upload: bytes, held: Any, hyper: Any, task: Any) -> bytes:
        return upload + len(held[1]).to_bytes(4, "little")

    module.stages, module.enter, module.assess = stages, enter, assess  # type: ignore[attr-defined]
    monkeypatch.setitem(registry.METHODS, "staged", module)
    yield module


def test_stages_by_hand(tiny: MakeSpec, staged: types.ModuleType) -> None:
    spec = tiny(method="staged", epochs=1, held_out=0.2)
    task = task_of(spec.key(), CPU)
    message = fedavg.broadcast(task.initial(), PLAIN, task)
    upload = run_client(spec, task, message, 1, 0)
    assert isinstance(upload, bytes)
    whole = len(task.partition.indices(0))
    assert int.from_bytes(upload[-4:], "little") == int(0.2 * whole) == whole - len(task.indices(0))
    rng = Rng(spec.seed).child("client", 1, 0)
    trainable, frozen = fedavg.start(message, PLAIN, task, rng)
    train(fedavg, trainable, frozen, task.shard(0), PLAIN, task, rng)
    second = dataclasses.replace(task, plan=Plan(2, spec.batch, spec.lr / 10, "adam"))
    trainable = {name: (tensor.detach() * 0.5).requires_grad_() for name, tensor in trainable.items()}
    train(fedavg, trainable, frozen, task.shard(0), PLAIN, second, rng.child("stage", 1))
    assert upload[:-4] == fedavg.finish(trainable, frozen, len(task.indices(0)), PLAIN, task, rng)


def test_a_copy_of_a_task_has_stages_of_its_own(tiny: MakeSpec, staged: types.ModuleType) -> None:
    task = task_of(tiny().key(), CPU)
    other = dataclasses.replace(task, plan=dataclasses.replace(task.plan, lr=9.0))
    for _ in range(2):
        assert registry.stages(fedavg, PLAIN, task) == (task,) and registry.stages(fedavg, PLAIN, task)[0] is task
        assert registry.stages(fedavg, PLAIN, other)[0] is other
    third = dataclasses.replace(other)
    pair = registry.stages(staged, PLAIN, third)
    assert [part.plan.lr for part in pair] == [9.0, 0.9] and registry.stages(staged, PLAIN, third)[1] is pair[1]


@pytest.mark.parametrize("kind", [Graphed, Stacked])
def test_stages_in_other_engines(tiny: MakeSpec, staged: types.ModuleType, kind: type[Any]) -> None:
    spec = tiny(method="staged", held_out=0.1)
    task = task_of(spec.key(), CPU)
    message = fedavg.broadcast(task.initial(), PLAIN, task)
    expected: dict[int, Any] = dict(InProcess(CPU).train(spec, message, 1, [2, 0, 1]))
    found: dict[int, Any] = dict(kind(CPU).train(spec, message, 1, [2, 0, 1]))
    for client, upload in expected.items():
        if kind is Graphed:
            assert found[client] == upload
            continue
        a, b = (unpack_model(u[:-4], "fedavg.up", PLAIN, task)[0] for u in (upload, found[client]))
        assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
        assert upload[-4:] == found[client][-4:]


def test_held_out_samples_are_a_shuffled_share(tiny: MakeSpec) -> None:
    task = task_of(tiny(held_out=0.25, partition={"kind": "labels", "count": 2, "seed": 1}).key(), CPU)
    for client in range(3):
        trained, held = task.indices(client), task._split(client)[1]
        assert sorted([*trained, *held]) == sorted(task.partition.indices(client))
        assert len(held) == int(0.25 * (len(trained) + len(held)))
        assert len(torch.unique(task.held(client)[1])) == 2, "of both classes, although the data is dealt by class"
        assert (task._split(client)[1] == held).all()
    plain = task_of(tiny().key(), CPU)
    assert (plain.indices(0) == plain.partition.indices(0)).all() and not len(plain.held(0)[1])


def test_poisson_cohorts_have_the_law_that_they_claim(tiny: MakeSpec) -> None:
    spec = tiny(clients=100, cohort=20, sampling="poisson")
    task = task_of(spec.key(), CPU)
    cohorts = [rounds.draw_cohort(spec, task, number) for number in range(400)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    # Binomial(100, 0.2): mean 20, deviation 4; of 400 draws the mean has deviation 0.2, the deviation about 0.14.
    assert abs(sizes.mean() - 20) < 1 and abs(sizes.std() - 4) < 0.7
    times = np.bincount(np.concatenate(cohorts), minlength=100)
    assert abs(times.mean() - 80) < 4 and times.min() > 40 and times.max() < 125  # Binomial(400, 0.2), deviation 8
    assert all(len(set(cohort)) == len(cohort) for cohort in cohorts)
    together = np.mean([0 in cohort and 1 in cohort for cohort in cohorts])
    assert abs(together - 0.04) < 0.04, "independent of each other"
    assert cohorts[:3] == [rounds.draw_cohort(spec, task, number) for number in range(3)]


def test_spaced_cohorts_take_turns(tiny: MakeSpec) -> None:
    """Every client once in each pass, and always as many rounds apart; 3 and 10 share no factor."""
    spec = tiny(clients=10, cohort=3, sampling="spaced")
    task = task_of(spec.key(), CPU)
    cohorts = [rounds.draw_cohort(spec, task, number) for number in range(1, 41)]
    assert all(len(set(cohort)) == 3 for cohort in cohorts)
    for client in range(10):
        turns = [number for number, cohort in enumerate(cohorts) if client in cohort]
        assert len(turns) == 12 and set(np.diff(turns)) == {3, 4}, (
            "at least 10 // 3 rounds apart, at most 40 * 3 / 10 times"
        )
    assert cohorts[:10] == cohorts[10:20] and rounds.draw_cohort(spec, task, 2, attempt=1) == cohorts[1]
    other = tiny(clients=10, cohort=3, sampling="spaced", seed=spec.seed + 1)
    assert [rounds.draw_cohort(other, task, number) for number in range(1, 11)] != cohorts[:10]
    first = [permutation(Rng(seed), 4)[0] for seed in range(400)]
    assert min(np.bincount(first, minlength=4)) > 65, "each client may be the first; 100 on average, deviation 8.7"


def test_one_client_an_owner() -> None:
    owners = np.array([3, 1, 1, 3, 7, 7, 7, 2])
    found = partition.make(np.zeros(8), 3, "natural", 0, owners=owners)
    assert [found.indices(k).tolist() for k in range(3)] == [[1, 2], [0, 3], [4, 5, 6]]
    with pytest.raises(SpecError, match="5 clients, but the data has 4 owners; take fewer"):
        partition.make(np.zeros(8), 5, "natural", 0, owners=owners)
    with pytest.raises(SpecError, match="'natural' needs data whose samples have owners"):
        partition.make(np.zeros(8), 2, "natural", 0)
    with pytest.raises(SpecError, match="'dirichlet' needs one label a sample, these have 4"):
        partition.make(np.zeros((8, 4)), 2, "dirichlet", 0, beta=1.0)


def test_the_loss_of_sequences_leaves_padding_out() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[1, 4, NO_LABEL], [0, NO_LABEL, NO_LABEL]])
    logs = logits.double().log_softmax(2)
    by_hand = -(logs[0, 0, 1] + logs[0, 1, 4] + logs[1, 0, 0])
    assert float(cross_entropy(logits, y, "sum")) == pytest.approx(float(by_hand))
    assert float(cross_entropy(logits, y, "mean")) == pytest.approx(float(by_hand) / 3)
