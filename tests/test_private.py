"""Private training in whole rounds: the bound at the client and at the server, the noise, its tree, what is said of it.

Numbers are the properties of FedPT's specification (shared/papers/fedpt.md, section 8). Mechanisms and accounting alone
are in test_privacy.py.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlib.core.plan import State
from fedlib.core.uploads import Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess, task_of
from fedlib.engines.vmapped import Stacked
from fedlib.errors import RunError, SpecError
from fedlib.methods import registry
from fedlib.methods.fedpt import accounting, mechanisms
from fedlib.methods.fedpt import method as fedpt
from fedlib.methods.fedpt.method import Hyper
from fedlib.methods.messages import pack_tensors
from fedlib.rng import Rng
from fedlib.runs import checkpoint, record, rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

CPU = torch.device("cpu")
ENGINE = InProcess(CPU)
MakeSpec = Callable[..., Spec]
Begin = Callable[..., Any]
Settings = dict[str, Any]
PRIVATE: Settings = {"weighting": "clients", "mechanism": "dp_fedavg", "clip_norm": 0.1, "delta": 0.01}
TREE: Settings = PRIVATE | {"mechanism": "dp_ftrl"}
NOISY = PRIVATE | {"noise_multiplier": 0.5}
SAMPLING = {"dp_fedavg": "poisson", "dp_ftrl": "spaced"}
TRAINED = 208 + 3216 + 1290  # entries of emnist-narrow on 8 x 8 and 10 kinds, under emnist/dense1


@pytest.fixture
def begin(tiny: MakeSpec) -> Begin:
    def begun(more: Settings, policy: str = "emnist/dense1", **fields: Any) -> SimpleNamespace:
        hyper = Hyper(policy=policy, **more)
        sampling = {"sampling": SAMPLING[hyper.mechanism]} if hyper.private else {}
        base = {"method": "fedpt", "model": "emnist-narrow", "hyper": dataclasses.asdict(hyper)} | sampling
        spec = tiny(**base | fields)
        task = task_of(spec.key(), CPU)
        return SimpleNamespace(spec=spec, task=task, hyper=hyper, state=registry.initial(spec, task))

    return begun


def change(run: Any, norm: float, seed: int = 3) -> State:
    shapes, generator = fedpt.trained(run.hyper, run.task), torch.Generator().manual_seed(seed)
    flat = torch.randn(sum(s.numel() for s in shapes.values()), generator=generator, dtype=torch.float64)
    return mechanisms.unflatten((flat * (norm / flat.norm())).float(), shapes)


def upload(run: Any, update: State) -> bytes:
    mark = fedpt.frozen_part(fedpt.seed_of(run.state), run.hyper, run.task)[1]
    parts: list[Any] = [mark, pack_tensors(update, fedpt.trained(run.hyper, run.task))]
    return container.pack("fedpt.up", run.task.fingerprint("fedpt", run.hyper), 1, parts)


def served(run: Any, *updates: State) -> tuple[State, Uploads]:
    uploads = Uploads(enumerate(upload(run, update) for update in updates))
    return fedpt.server(run.state, uploads, run.hyper, run.task), uploads


def point(run: Any, state: State) -> Tensor:
    return mechanisms.flatten({name: state[name] for name in fedpt.trained(run.hyper, run.task)}).double()


def train(run: Any, number: int) -> list[Tensor]:
    points = [point(run, run.state)]
    for n in range(1, number + 1):
        run.state, _ = rounds.one_round(run.spec, run.task, ENGINE, run.state, n, {})
        points.append(point(run, run.state))
    return points


@pytest.mark.parametrize("bound", [1e-3, 0.05, 1e3])
def test_09_a_client_sends_no_more_than_the_bound(begin: Begin, bound: float) -> None:
    """The norm is that of all tensors together; what is within the bound is sent as it is."""
    run, plain = begin(PRIVATE | {"clip_norm": bound}), begin({"weighting": "clients"})
    sent = []
    for each in (run, plain):
        message = fedpt.broadcast(each.state, each.hyper, each.task)
        ((_, reply),) = ENGINE.train(each.spec, message, 1, [2])
        mark = fedpt.frozen_part(fedpt.seed_of(each.state), each.hyper, each.task)[1]
        sent.append(fedpt.read_update(reply, mark, each.hyper, each.task))  # type: ignore[arg-type]
    (clipped, samples), (whole, others) = sent
    norm = float(mechanisms.flatten(whole).double().norm())
    assert 0.05 < norm < 1e3 and samples == 1 < others, "how many samples a client has is not told"
    if bound > norm:
        assert all(torch.equal(clipped[name], whole[name]) for name in whole)
    else:
        assert float(mechanisms.flatten(clipped).double().norm()) == pytest.approx(bound, rel=1e-6)
        for name, tensor in whole.items():
            torch.testing.assert_close(clipped[name], tensor * (bound / norm), rtol=1e-5, atol=0)


def test_a_longer_update_than_agreed_is_refused(begin: Begin) -> None:
    run = begin(PRIVATE)
    state, uploads = served(run, change(run, 0.1), change(run, 0.1002), change(run, 0.05), change(run, 5.0))
    assert uploads.accepted == [0, 2] and [client for client, _ in uploads.refused] == [1, 3]
    assert "longer than the agreed bound 0.1" in uploads.refused[0][1]
    assert fedpt.notes(state, run.hyper, run.task) == {"clipped": 0.5}, "the one at the bound"
    assert fedpt.notes(served(run, change(run, 0.0999))[0], run.hyper, run.task) == {"clipped": 0.0}


@pytest.mark.parametrize("settings", [NOISY, TREE | {"noise_multiplier": 0.5}])
def test_10_one_client_moves_the_model_by_no_more_than_the_sensitivity(begin: Begin, settings: Settings) -> None:
    """Under the same noise: at most C / M where a client is left out, 2 C / M where it is replaced by its opposite."""
    run = begin(settings)
    a, b = change(run, 0.1), change(run, 0.1, seed=4)
    opposite = {name: -tensor for name, tensor in a.items()}
    with_it, without, replaced = (point(run, served(run, *each)[0]) for each in ((a, b), (b,), (opposite, b)))
    unit = 0.1 / run.spec.cohort
    assert float((with_it - without).norm()) == pytest.approx(unit, rel=1e-4)
    assert float((with_it - replaced).norm()) == pytest.approx(2 * unit, rel=1e-4)


def test_11_noise_of_a_round(begin: Begin) -> None:
    """Deviation nm C / M in every entry, by rounds to which nobody came: 30 of 4,714 entries."""
    run = begin(NOISY, cohort=5)
    steps = []
    for _ in range(30):
        new, uploads = served(run)
        assert not uploads.accepted and fedpt.notes(new, run.hyper, run.task) == {"clipped": 0.0}
        steps.append(point(run, new) - point(run, run.state))
        run.state = new
    noise = torch.stack(steps)
    n = noise.numel()
    assert n == 30 * TRAINED > 1e5
    chi = float((noise / (0.5 * 0.1 / 5)).square().sum())
    assert abs(chi - n) < 4 * math.sqrt(2 * n) and abs(float(noise.mean())) < 4 * 0.01 / math.sqrt(n)
    correlations = np.corrcoef(noise.numpy())[~np.eye(30, dtype=bool)]
    assert np.abs(correlations).max() < 5 / math.sqrt(TRAINED), "independent from round to round"
    # 12: its norm, and none of it on what is frozen
    norms = noise.norm(dim=1) / (0.01 * math.sqrt(TRAINED))
    assert float((norms - 1).abs().max()) < 0.06 and abs(float(norms.mean()) - 1) < 0.01
    (before,), (after,) = (
        fedpt.models(state, run.hyper, run.task, Rng(0)) for state in (begin(NOISY).state, run.state)
    )
    assert [n for n in before if torch.equal(before[n], after[n])] == ["dense1.weight", "dense1.bias"]


def test_13_noise_of_the_tree(begin: Begin) -> None:
    """Rounds to which nobody came, learning rate 1: minus the noise of the prefix. 2 and 3 share a node."""
    run = begin(TREE | {"noise_multiplier": 0.5}, cohort=5)
    start = point(run, run.state)
    prefix = []
    for _ in range(8):
        run.state, _ = served(run)
        prefix.append((point(run, run.state) - start) / 0.01)
    for number, noise in enumerate(prefix, 1):
        mean = float(noise.square().mean())
        assert abs(mean / number.bit_count() - 1) < 6 * math.sqrt(2 / TRAINED)
    correlation = np.corrcoef(torch.stack(prefix).numpy())
    assert correlation[1, 2] == pytest.approx(1 / math.sqrt(2), abs=0.05), "2 = {0-1}, 3 = {0-1, 2}"
    assert abs(correlation[2, 3]) < 0.06 and abs(correlation[6, 7]) < 0.06, "4 and 8 are nodes of their own"


def test_13_the_tree_is_that_of_the_library(begin: Begin) -> None:
    run = begin(TREE | {"noise_multiplier": 0.5, "server_lr": 0.7}, cohort=5)
    start = point(run, run.state)
    rng = Rng(int.from_bytes(run.state["noise"].numpy().tobytes(), "little")).child("tree")
    for number in range(1, 6):
        run.state, _ = served(run)
        expected = start - 0.7 * mechanisms.tree_noise(rng, number, TRAINED, 0.01)
        torch.testing.assert_close(point(run, run.state), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("mechanism", ["dp_fedavg", "dp_ftrl"])
def test_14_without_noise_and_clipping_it_is_the_plain_method(begin: Begin, mechanism: str, momentum: float) -> None:
    """Heavy-ball SGD on the server, all clients in each round."""
    common = {"weighting": "clients", "server_lr": 0.7, "momentum": momentum}
    private = begin(common | {"mechanism": mechanism, "clip_norm": 1e6, "delta": 0.01}, cohort=10, sampling="spaced"
                    if mechanism == "dp_ftrl" else "fixed")  # fmt: skip
    plain = begin(common, cohort=10)
    moved = 0.0
    for one, other, before in zip(
        train(private, 6), train(plain, 6), [None, *train(begin(common, cohort=10), 5)], strict=True
    ):
        assert float((one - other).abs().max()) < 2e-5
        moved = max(moved, 0.0 if before is None else float((one - before).abs().max()))
    assert moved > 0.01


def test_no_message_holds_the_seed_of_the_noise(begin: Begin) -> None:
    run = begin(NOISY)
    seed = run.state["noise"].numpy().tobytes()
    other = run.state | {"noise": run.state["noise"] ^ 1}
    message = fedpt.broadcast(run.state, run.hyper, run.task)
    assert seed not in message and message == fedpt.broadcast(other, run.hyper, run.task)
    moved = [point(run, fedpt.server(s, Uploads([]), run.hyper, run.task)) for s in (run.state, other)]
    assert not torch.equal(*moved)


OTHER_RUNS: list[tuple[Settings, Settings]] = [
    ({"noise_multiplier": 1.0}, {}),
    ({"clip_norm": 0.2}, {}),
    ({"server_lr": 0.5}, {}),
    ({}, {"lr": 0.2}),
    ({}, {"cohort": 5}),
    ({}, {"seed": 1}),
    ({}, {"clients": 20}),
    ({}, {"partition": {"kind": "iid", "seed": 7}}),
    ({}, {"held_out": 0.1}),
]


@pytest.mark.parametrize("settings, fields", OTHER_RUNS)
@pytest.mark.parametrize("mechanism", ["dp_fedavg", "dp_ftrl"])
def test_runs_that_differ_do_not_share_their_noise(
    begin: Begin, mechanism: str, settings: Settings, fields: Settings
) -> None:
    """Or one could be taken from the other, and the updates would show."""
    steps = []
    for run in (begin(NOISY | {"mechanism": mechanism}), begin(NOISY | {"mechanism": mechanism} | settings, **fields)):
        steps.append(point(run, served(run)[0]) - point(run, run.state))
    assert abs(float(np.corrcoef(torch.stack(steps).numpy())[0, 1])) < 5 / math.sqrt(TRAINED)


def test_nor_do_two_policies(begin: Begin) -> None:
    steps = []
    for policy in ("emnist/dense1", "none"):
        run = begin(NOISY, policy)
        step = mechanisms.unflatten(
            (point(run, served(run)[0]) - point(run, run.state)), fedpt.trained(run.hyper, run.task)
        )
        steps.append(step["conv2.weight"].flatten())
    flat = [point(begin(NOISY, p), begin(NOISY, p).state)[:208] for p in ("emnist/dense1", "none")]
    assert torch.equal(*flat), "the first entries of both are the same tensor"
    assert abs(float(np.corrcoef(torch.stack(steps).numpy())[0, 1])) < 5 / math.sqrt(3200)


@pytest.mark.parametrize("mechanism", ["dp_fedavg", "dp_ftrl"])
def test_a_record_says_what_was_spent(begin: Begin, tmp_path: Path, mechanism: str) -> None:
    settings = NOISY | {"mechanism": mechanism, "noise_multiplier": 2.0, "clip_norm": 0.3}
    run = begin(settings, rounds=5, cohort=3)
    found = rounds.load_or_run(run.spec, ENGINE, root=tmp_path)
    said = dict(found["final"]["privacy"])
    turns: Settings = {"clients": 10, "cohort": 3}
    if mechanism == "dp_ftrl":  # rounds 1 and 4: two leaves, two pairs, and both in the first four
        turns = {"weight": 2 + 2 + 4}
    budget: Settings = {"noise_multiplier": 2.0, "rounds": 5, "delta": 0.01}
    expected = accounting.epsilon(mechanism, SAMPLING[mechanism], **budget, **turns)
    assert said.pop("epsilon") == pytest.approx(expected, rel=1e-5) and 0.1 < expected < 20
    assert said.pop("neighbours") in ("ADD_OR_REMOVE_ONE", "REPLACE_SPECIAL")
    assert said == {"mechanism": mechanism, "sampling": SAMPLING[mechanism], "clip_norm": 0.3} | {
        name: budget[name] for name in ("noise_multiplier", "delta")
    }
    assert all(0 <= entry["notes"]["clipped"] <= 1 for entry in found["rounds"])
    assert record.stable(found) == record.stable(rounds.run(run.spec, ENGINE, root=tmp_path / "again"))


def test_a_record_without_noise_has_no_epsilon(begin: Begin, tmp_path: Path) -> None:
    assert rounds.run(begin(PRIVATE, rounds=1).spec, ENGINE, root=tmp_path)["final"]["privacy"]["epsilon"] is None


def test_noise_needs_the_accountant_before_the_first_round(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(RunError, match=r"fedlib\[privacy\]"):
        begin(NOISY, rounds=1)
    assert rounds.run(begin(PRIVATE, rounds=1).spec, ENGINE, root=tmp_path)


def test_a_poisson_round_without_clients_is_one_of_noise(begin: Begin, tmp_path: Path) -> None:
    run = begin(NOISY, clients=6, cohort=1, rounds=12)
    found = rounds.run(run.spec, ENGINE, root=tmp_path)
    sizes = [len(entry["clients"]) for entry in found["rounds"]]
    assert 0 in sizes and max(sizes) > 1 and len(sizes) == 12
    empty = found["rounds"][sizes.index(0)]
    assert empty["uplink_bytes"] == empty["downlink_bytes"] == 0 and empty["notes"] == {"clipped": 0.0}


@pytest.mark.parametrize("mechanism", ["dp_fedavg", "dp_ftrl"])
def test_a_run_goes_on_from_its_checkpoint(begin: Begin, tmp_path: Path, mechanism: str) -> None:
    """The noise of later rounds needs what the server keeps."""

    class Dies(InProcess):
        def train(self, spec: Any, message: Any, round: int, *rest: Any) -> Any:
            if round == 5:
                raise KeyboardInterrupt
            return super().train(spec, message, round, *rest)

    run = begin(NOISY | {"mechanism": mechanism, "momentum": 0.9}, rounds=7)
    with pytest.raises(KeyboardInterrupt):
        rounds.run(run.spec, Dies(CPU), root=tmp_path, save_every=0)
    assert checkpoint.Checkpoint(run.spec, tmp_path).load() is not None
    whole = rounds.run(run.spec, ENGINE, root=tmp_path / "whole")
    assert record.stable(rounds.run(run.spec, ENGINE, root=tmp_path)) == record.stable(whole)


@pytest.mark.parametrize("kind", [Graphed, Stacked])
def test_engines_agree(begin: Begin, kind: type[Any]) -> None:
    run = begin(PRIVATE | {"clip_norm": 0.02})
    message = fedpt.broadcast(run.state, run.hyper, run.task)
    one, other = (dict(engine.train(run.spec, message, 1, [8, 0])) for engine in (ENGINE, kind(CPU)))
    mark = fedpt.frozen_part(fedpt.seed_of(run.state), run.hyper, run.task)[1]
    for client in one:
        a, b = (
            mechanisms.flatten(fedpt.read_update(reply[client], mark, run.hyper, run.task)[0]) for reply in (one, other)
        )
        assert float((a - b).norm()) < 1e-3 * float(a.norm()) and (kind is Stacked or torch.equal(a, b))


BAD = [
    ({"mechanism": "dp_sgd"}, "hyper.mechanism: 'dp_sgd'"),
    *[({"clip_norm": value}, "hyper.clip_norm") for value in (0, -1, math.nan, math.inf, "x", None)],
    *[({"noise_multiplier": value}, "hyper.noise_multiplier") for value in (-0.1, math.nan, math.inf, "x", None)],
    *[({"delta": value}, "hyper.delta: not given, and an epsilon means nothing without it") for value in (0, None)],
    *[({"delta": value}, "hyper.delta") for value in (-0.1, 1.5, math.nan, "x")],
    ({"delta": 0.1}, r"hyper.delta: 0.1 must be below 1 / clients, which is 0.1"),
    ({"weighting": "samples"}, "hyper.weighting: 'samples' lets a client weigh more than others; take clients"),
    ({"mechanism": "dp_ftrl", "optimizer": "adam"}, "dp_ftrl is an optimizer itself, not 'adam'; take sgd"),
    ({"mechanism": "none", "delta": 0}, "hyper.clip_norm: 0.1 needs a mechanism"),
    ({"mechanism": "none", "clip_norm": 0}, "hyper.noise_multiplier: 0.5 needs a mechanism"),
]


@pytest.mark.parametrize("more, words", BAD)
def test_bad_settings(tiny: MakeSpec, more: Settings, words: str) -> None:
    fits = {"method": "fedpt", "model": "emnist-narrow", "sampling": "poisson"}
    assert tiny(**fits, hyper=NOISY)
    with pytest.raises(SpecError, match=words):
        tiny(**fits, hyper=NOISY | more)


@pytest.mark.parametrize(
    "mechanism, sampling, allowed",
    [("dp_fedavg", "spaced", "poisson fixed"), ("dp_ftrl", "poisson", "spaced"), ("dp_ftrl", "fixed", "spaced")],
)
def test_a_sampler_that_the_accounting_does_not_fit_is_refused(
    tiny: MakeSpec, mechanism: str, sampling: str, allowed: str
) -> None:
    words = f"sampling: '{sampling}' is not what the accounting of {mechanism} assumes; allowed: {allowed}"
    with pytest.raises(SpecError, match=words):
        tiny(method="fedpt", model="emnist-narrow", sampling=sampling, hyper=NOISY | {"mechanism": mechanism})
