"""FedPT: what is frozen, what travels, the server's optimizers, and whole rounds on digits.

Numbers are the properties of its specification (shared/papers/fedpt.md, section 8); policies and laws of weights are in
test_partial.py. The oracles are FedAvg, torch's own loss and Adam, formulas in float64, and a fresh process.
"""

import dataclasses
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedpt_runs import CPU, ENGINE, HEAVY, LOCAL, SERVER, TRAINED, UNEQUAL, Run, Settings, State, equal, same
from torch import Tensor, nn
from torch.func import functional_call

from fedlib.core import client, optimizers
from fedlib.core.method import ServerState
from fedlib.core.plan import Tensors
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError, RunError, SpecError
from fedlib.methods.fedavg import FedAvg
from fedlib.methods.fedpt.method import FedPT
from fedlib.models import cnn, freezing, initializers, partial
from fedlib.models.registry import MODELS, build
from fedlib.rng import Rng
from fedlib.runs import rounds
from fedlib.runs.build import job as build_job
from fedlib.runs.spec import Spec
from fedlib.wire import container

pytestmark = pytest.mark.usefixtures("one_thread", "networks")
each_local = pytest.mark.parametrize("local", LOCAL)
each_server = pytest.mark.parametrize("server", SERVER)
each_policy = pytest.mark.parametrize("policy", ["emnist/dense1", "emnist/conv", "emnist/all_but_head"])
POLICIES = [("emnist-narrow", p) for p in ("none", "random/0.2", "emnist/dense1", "emnist/conv", "emnist/all_but_head")]
POLICIES += [("small-resnet", f"cifar/s{p}") for p in ("4", "34", "234", "1234")]
POLICIES += [("transformer", f"so/{p}") for p in ("ffn", "att", "blocks")]
WRONG: list[tuple[Any, str]] = [
    ("cifar/s4", "'cifar/s4' does not fit .*: none, emnist/all_but_head"),
    ("random/1e-6", "nothing to train"),
    ("dense1", "'dense1' is unknown; allowed .*: none, emnist"),
    (None, "hyper.policy: None is unknown"),
    *((f"random/{p}", "between 0 and 1") for p in (0, 1, "nan", "")),
]
ADAPTIVE = [{"optimizer": o, "server_lr": 0.05, "correction": c} for o in ("adam", "yogi") for c in (True, False)]
OTHERS: list[Settings] = [{}, {"beta1": 0.9, "beta2": 0.9, "epsilon": 0.1}, {"beta1": 0.5, "beta2": 0.0}]


@pytest.fixture(scope="module")
def networks() -> Iterator[None]:
    """Networks of this file's own, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small-resnet", lambda c, side, kinds, root: partial.resnet(c, kinds, (32,) * 4))
        patch.setitem(MODELS, "normed", cnn.normed("normed", (4, 6), 1))
        yield


def made(run: Run) -> Tensors:
    shapes, seed = run.task.parameters, run.state.own.seed
    names = sorted(freezing.matching(freezing.POLICIES[run.method.policy], shapes), reverse=True)
    return {name: initializers.values(seed, name, shapes[name], run.method.law) for name in names}


def changes(run: Run, count: int = 1, scale: float = 0.1) -> list[Tensors]:
    generator, shapes = torch.Generator().manual_seed(3), run.method.trained
    return [{n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(count)]


def served(run: Run, *pairs: tuple[Tensors, int]) -> State:
    return run.serve(*(run.upload(*pair) for pair in pairs))[0]


@each_local
@each_server
def test_01_frozen_tensors_never_change(local: str, server: str) -> None:
    run = Run.of(hyper=SERVER[server], **LOCAL[local])
    expected, (phase,) = made(run), run.method.phases()
    member = client.begin(run.job, run.message, 1, 0, None)
    client.enter(member, 0, phase)
    client.train(run.method, phase, [member])
    assert equal({name: member.local.frozen[name] for name in expected}, expected)
    assert member.local.trainable.keys().isdisjoint(expected)
    state = run.states(3)[-1]
    model = run.models(state)
    assert list(model) == list(run.task.parameters) and equal({name: model[name] for name in expected}, expected)
    for name in model.keys() - expected.keys():
        assert torch.equal(model[name], state.model[name])
        assert not torch.equal(model[name], run.state.model[name]), "it has moved"


def test_02_frozen_part_depends_on_seed_law_and_name_alone() -> None:
    run, wide = Run.of(), Run.of("emnist/all_but_head")
    seed = run.state.own.seed
    assert seed == wide.state.own.seed and equal(wide.method.frozen_part(seed)[0], made(wide))
    tensors, mark = run.method.frozen_part(seed)
    assert equal(tensors, made(run)) and mark == run.mark != wide.mark and len(mark) == 8
    marks = {mark, wide.mark}
    for other, law in ((seed ^ 1, "he"), (seed ^ 1 << 63, "he"), (seed, "glorot"), (seed, "torch")):
        others, found = dataclasses.replace(run.method, law=law).frozen_part(other)
        assert not torch.equal(others["dense1.weight"], tensors["dense1.weight"])
        marks.add(found)
    half = dataclasses.replace(run.method, scale=0.5).frozen_part(seed)[0]
    assert torch.equal(half["dense1.weight"] * 2, tensors["dense1.weight"]) and not half["dense1.bias"].any()
    assert len(marks) == 6 and len({Run.of(seed=s).state.own.seed for s in range(4)}) == 4, "runs differ"
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    code = f"from fedlib.methods.fedpt.method import *; print(make_frozen({seed}, 'he', 1.0, {shapes!r})[1].hex())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert fresh.stdout.strip() == mark.hex()


@each_policy
def test_03_the_trained_part_and_the_seed_are_the_model(policy: str) -> None:
    """Read out of the message by hand."""
    run = Run.of(policy, {"law": "glorot"})
    state = run.states(2)[-1]
    message = run.method.broadcast(state)
    assert struct.unpack("<Q", message[44:52]) == (run.state.own.seed,)
    model, values = made(run), torch.frombuffer(bytearray(message[60:-4]), dtype=torch.float32)
    for name, shape in run.task.parameters.items():
        if name not in model:
            model[name], values = values[: shape.numel()].view(shape), values[shape.numel() :]
    (network := build("emnist-narrow", 1, 8, 10, Rng(99)).eval()).load_state_dict(model)
    expected = run.task.logits(run.models(state), run.task.test[0])
    assert torch.equal(network(run.task.test[0]), expected) and not len(values)


@pytest.mark.parametrize("model, policy", POLICIES)
def test_04_payload(model: str, policy: str) -> None:
    """4 bytes a trained entry, and 64 bytes down (16 of them seed and fingerprint), 56 up (8 fingerprint)."""
    run = Run.of(policy, model=model)
    frozen = freezing.frozen_names(policy, run.task.parameters)
    n = sum(p.numel() for name, p in run.task.network.named_parameters() if name not in frozen)
    assert bool(frozen) == (policy != "none") and (n == TRAINED) == (policy == "emnist/dense1")
    reply = run.method.upload(run.begin(), run.task.held(0), Rng(0))
    assert (len(run.message), len(reply)) == (4 * n + 64, 4 * n + 56)
    assert run.method.sizes(reply).paper == 32 * n


@pytest.mark.parametrize("way", ["down", "up"])
def test_altered_truncated_and_wrong_messages(way: str) -> None:
    run = Run.of()
    update = run.upload(changes(run)[0], 7)
    read: Callable[[bytes], Any] = run.begin if way == "down" else run.read
    good, other, samples, split = (run.message, update, 0, 60) if way == "down" else (update, run.message, 7, 52)
    head, body = good[44:split], good[split:-4]
    assert read(good) and container.address(good, 0, 0) == run.packed(way, samples, head, body)
    nan = body[:-4] + struct.pack("<f", math.nan)
    wrong: list[list[bytes]] = [[head[:-1], body], [head + b"\0", body], [head, body[:-4]], [head, nan], [body]]
    bad = [other, good + b"\0", *(run.packed(way, samples, *parts) for parts in wrong)]
    for place in (*range(80), *range(80, len(good), 1999), *range(len(good) - 8, len(good))):
        altered = [good[:place] + bytes([good[place] ^ mask]) + good[place + 1 :] for mask in (1, 128, 255)]
        bad += [good[:place], *altered]
    for content in bad:
        with pytest.raises(PayloadError):
            read(content)


@pytest.mark.parametrize("more, law", [(1, "he"), (0, "glorot")])
def test_another_frozen_part_is_named_on_both_sides(more: int, law: str) -> None:
    """As where a client's program makes other values of the same seed: only the fingerprint can tell."""
    run = Run.of()
    _, theirs = dataclasses.replace(run.method, law=law).frozen_part(run.state.own.seed + more)
    words = f"frozen part {run.mark.hex()}, the other side's is {theirs.hex()}"
    with pytest.raises(PayloadError, match=words):
        run.begin(run.packed("down", 0, run.message[44:52] + theirs, run.message[60:-4]))
    good = run.upload(changes(run)[0])
    _, uploads = run.serve(run.packed("up", 7, theirs, good[52:-4]), good)
    assert uploads.accepted == [1] and words in uploads.refused[0][1]


@each_local
def test_05_nothing_is_kept_for_frozen_tensors(local: str) -> None:
    run = Run.of(**LOCAL[local])
    own = run.begin()
    loss = run.method.loss(own.trainable, own.frozen, run.task.shard(0), None)
    leaves, queue = set(), [loss.grad_fn]
    while queue:
        if (node := queue.pop()) is not None:
            leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
            queue += [below for below, _ in node.next_functions]
    assert leaves == {id(tensor) for tensor in own.trainable.values()}
    loss.backward()
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in own.frozen.values())
    plan = run.task.plan
    moments = optimizers.moments(plan, own.trainable) if plan.keeps else {}
    orders = {"sgd": 0, "momentum": 1, "adam": 2}
    assert sum(tensor.numel() for tensor in moments.values()) == orders[local] * TRAINED + (local == "adam")
    assert not any("dense1" in name for name in moments)
    for server, slots in (orders | {"yogi": 2}).items():
        each = Run.of(hyper=SERVER[server], **LOCAL[local])
        assert each.method.slots == slots
        for state in each.states(1):
            kept = [state.model, state.own.first, state.own.second]
            assert sum(tensor.numel() for part in kept for tensor in part.values()) == (1 + slots) * TRAINED
            assert state.own.ftrl is None and not any("dense1" in name for part in kept for name in part)


@pytest.mark.parametrize("model, policy", [("emnist-narrow", "emnist/dense1"), ("small-resnet", "cifar/s1234")])
def test_06_gradient_is_that_part_of_the_full_one(model: str, policy: str) -> None:
    run = Run.of(policy, model=model)
    x, y = (part[:32] for part in run.task.shard(2))
    local = run.begin()
    loss = run.method.loss(local.trainable, local.frozen, (x, y), None)
    gradients = torch.autograd.grad(loss, list(local.trainable.values()))
    whole = {name: tensor.requires_grad_() for name, tensor in run.models(run.state).items()}
    full = nn.functional.cross_entropy(functional_call(run.task.network, whole, (x,)), y)
    expected = dict(zip(whole, torch.autograd.grad(full, list(whole.values())), strict=True))
    for name, gradient in zip(local.trainable, gradients, strict=True):
        size = float(expected[name].abs().max())
        assert size > 1e-6 and float((gradient - expected[name]).abs().max()) <= 1e-5 * size


# The server


@each_server
@each_local
def test_07_policy_none_is_plain_fedopt_bit_for_bit(server: str, local: str) -> None:
    """Three rounds in a row: the clients are FedAvg's, of whose models the change is taken."""
    run = Run.of("none", SERVER[server], **UNEQUAL, **LOCAL[local])
    spec = dataclasses.replace(run.spec, method="fedavg", hyper={})
    job, expected, shapes = build_job(spec, CPU), run.state, run.method.trained
    for number in (1, 2, 3):
        run.state = run.one_round(run.state, number)
        total, weight = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}, 0
        message = rounds.broadcast(job.method, ServerState(expected.model, None), number)
        for _, reply in ENGINE.train(job, message, number, rounds.draw_cohort(spec, job.task, number)):
            model, samples = FedAvg().bind(job.task).read(reply)  # type: ignore[arg-type]
            weight += samples
            for name in shapes:
                total[name] += samples * (model[name] - expected.model[name]).double()
        change = {name: (tensor / weight).float() for name, tensor in total.items()}
        expected = run.method.server_step(expected, change)
        assert same(run.state, expected)


def float64_server(method: FedPT, w: Tensor, means: list[Tensor]) -> Tensor:
    """torch's Adam, whose epsilon stands beside the corrected root; Keras' and Reddi et al.'s formulas from v = 0."""
    b1, b2, m, v = method.beta1, method.beta2, torch.zeros_like(w), torch.zeros_like(w)
    own = nn.Parameter(w.clone())
    torchs = torch.optim.Adam([own], lr=method.server_lr, betas=(b1, b2))
    for t, d in enumerate(means, 1):
        own.grad, torchs.param_groups[0]["eps"] = -d, method.epsilon / math.sqrt(1 - b2**t)
        torchs.step()
        m = method.momentum * m + d if method.optimizer == "sgd" else b1 * m + (1 - b1) * d
        v = b2 * v + (1 - b2) * d**2 if method.optimizer == "adam" else v - (1 - b2) * (v - d**2).sign() * d**2
        rate = method.server_lr * (math.sqrt(1 - b2**t) / (1 - b1**t) if method.correction else 1)
        w = w + (method.server_lr * m if method.optimizer == "sgd" else rate * m / (v.sqrt() + method.epsilon))
    return own.detach() if method.optimizer == "adam" and method.correction else w


@pytest.mark.parametrize("more", [{"server_lr": 0.7}, HEAVY, *[a | o for a in ADAPTIVE for o in OTHERS]])
def test_07_server_optimizers_in_float64(more: Settings) -> None:
    """Five rounds of three clients with unequal weights; changes grow and shrink."""
    run, weights, means = Run.of(hyper=more), [1, 5, 100], []
    before = run.state.model
    for scale in (0.1, 0.2, 0.03, 0.06, 0.02):
        pairs = list(zip(changes(run, 3, scale), weights, strict=True))
        means.append({name: sum(k * c[name].double() for c, k in pairs) / 106 for name in before})
        run.state = served(run, *pairs)
    for name, start in before.items():
        expected = float64_server(run.method, start.double(), [mean[name] for mean in means])  # type: ignore[misc]
        np.testing.assert_allclose(run.state.model[name], expected, rtol=2e-6, atol=2e-6)
        assert float((expected - start).abs().max()) > 0.01


def test_adam_defaults_to_keras() -> None:
    method = FedPT(optimizer="adam")
    assert (method.beta1, method.beta2, method.correction) == (0.9, 0.999, True)


@each_server
def test_08_aggregation_is_linear(server: str) -> None:
    run, plain = Run.of(hyper=SERVER[server]), Run.of(hyper={**SERVER[server], "weighting": "clients"})
    a, b, c = changes(run, 3)
    one, mixed = served(run, (a, 1)), served(run, (a, 3), (b, 50), (c, 7))
    assert same(served(run, (a, 3), (a, 50), (a, 7)), one) and not same(one, mixed), "equal clients are one"
    assert same(served(run, (a, 3 * 64), (b, 50 * 64), (c, 7 * 64)), mixed)
    mean = {name: ((a[name].double() + b[name].double() + c[name].double()) / 3).float() for name in a}
    expected = plain.method.server_step(plain.state, mean)
    assert same(served(plain, (a, 3), (b, 50), (c, 7)), expected) and not same(expected, mixed)


def test_an_update_that_is_not_finite_is_refused_and_the_round_goes_on() -> None:
    run, (change,) = Run.of(), changes(Run.of(), 1)
    local = run.begin()
    local.trainable = {name: tensor / 0 for name, tensor in local.trainable.items()}
    with pytest.raises(PayloadError, match="only finite") as error:
        run.method.upload(local, run.task.held(0), Rng(0))
    nan = run.packed("up", 7, run.mark, np.full(TRAINED, np.nan, "<f4").tobytes())
    state, uploads = run.serve(error.value, run.upload(change), nan)
    assert same(state, served(run, (change, 1)))
    assert uploads.accepted == [1] and [client for client, _ in uploads.refused] == [0, 2]


# Settings, and engines


def test_a_checkpoint_with_another_frozen_part_is_refused() -> None:
    """As when a new version of a library drew other values."""
    run = Run.of()
    own = dataclasses.replace(run.state.own, fingerprint=(run.mark[:-1] + bytes([run.mark[-1] ^ 1])).hex())
    with pytest.raises(RunError, match="not that of the checkpoint; remove"):
        run.method.broadcast(dataclasses.replace(run.state, own=own))


def test_a_scale_of_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match="is for frozen weights, and policy none has none"):
        FedPT(scale=2.0)


@pytest.mark.parametrize("policy, words", WRONG)
def test_wrong_policies(tiny: Callable[..., Spec], tmp_path: Path, policy: Any, words: str) -> None:
    with pytest.raises(SpecError, match="BatchNorm's statistics are neither trained nor frozen"):
        Run.of(policy, model="normed")
    with pytest.raises(SpecError, match=words):
        rounds.run(tiny(method="fedpt", model="emnist-narrow", hyper={"policy": policy}), ENGINE, root=tmp_path)


@each_policy
@each_local
def test_engines_agree(policy: str, local: str) -> None:
    """Graphed byte for byte, Stacked to rounding, on unequal shards."""
    run = Run.of(policy, **UNEQUAL, **LOCAL[local])
    one, graphed, stacked = (
        dict(engine.train(run.job, run.message, 1, [8, 0, 2])) for engine in (ENGINE, Graphed(CPU), Stacked(CPU))
    )
    assert one == graphed and list(stacked) == [8, 0, 2]
    for c in one:
        (a, samples), (b, others) = (run.read(reply[c]) for reply in (one, stacked))
        assert samples == others == len(run.task.partition.indices(c))
        x, y = (torch.cat([tensor.flatten() for tensor in d.values()]) for d in (a, b))
        assert float((x - y).norm()) < 1e-3 * float(x.norm())
