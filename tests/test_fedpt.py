"""FedPT: what is frozen, what travels, the server's optimizers, and whole rounds on digits.

Numbers are the properties of its specification (shared/papers/fedpt.md, section 8); policies and laws of weights are in
test_partial_models.py. The oracles are torch's own Adam and loss, formulas in float64, FedAvg, and a fresh process.
"""

import dataclasses
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlib.core.client import recalled, train
from fedlib.core.plan import State
from fedlib.core.uploads import Uploads
from fedlib.engines.cuda_graph import Graphed
from fedlib.engines.in_process import InProcess, task_of
from fedlib.engines.vmapped import Stacked
from fedlib.errors import PayloadError, RunError, SpecError
from fedlib.methods import fedavg, registry
from fedlib.methods.fedpt import method as fedpt
from fedlib.methods.fedpt.method import Hyper
from fedlib.methods.messages import pack_tensors, unpack_model
from fedlib.models import cnn, freezing, initializers, partial
from fedlib.models.registry import MODELS, build
from fedlib.rng import Rng
from fedlib.runs import rounds
from fedlib.runs.spec import Spec
from fedlib.wire import container

CPU = torch.device("cpu")
FEDAVG: Any = fedavg.Hyper()
ENGINE = InProcess(CPU)
Settings = dict[str, Any]
Begin = Callable[..., Any]
MakeSpec = Callable[..., Spec]
SGD, ADAM = {"momentum": 0.9, "lr": 0.01}, {"optimizer": "adam", "lr": 0.01}
LOCAL: dict[str, Settings] = {"sgd": {}, "momentum": SGD, "adam": ADAM}
YOGI: Settings = {"optimizer": "yogi", "beta1": 0.9, "server_lr": 0.02}
HEAVY: Settings = {"momentum": 0.9, "server_lr": 0.3}
SERVER: dict[str, Settings] = {"sgd": {}, "momentum": HEAVY, "adam": YOGI | {"optimizer": "adam"}, "yogi": YOGI}
UNEQUAL = {"kind": "dirichlet", "beta": 0.3, "seed": 7}
each_local = pytest.mark.parametrize("client", LOCAL)
each_server = pytest.mark.parametrize("server", SERVER)
each_policy = pytest.mark.parametrize("policy", ["emnist/dense1", "emnist/conv", "emnist/all_but_head"])
POLICIES = [("emnist-narrow", p) for p in ("none", "random/0.2", "emnist/dense1", "emnist/conv", "emnist/all_but_head")]
POLICIES += [("small-resnet", f"cifar/s{p}") for p in ("4", "34", "234", "1234")]
POLICIES += [("transformer", f"so/{p}") for p in ("ffn", "att", "blocks")]
ADAPTIVE = [{"optimizer": o, "server_lr": 0.05, "correction": c} for o in ("adam", "yogi") for c in (True, False)]
OTHERS: list[Settings] = [{}, {"beta1": 0.9, "beta2": 0.9, "epsilon": 0.1}, {"beta1": 0.5, "beta2": 0.0}]
WRONG = [("cifar/s4", "'cifar/s4' does not fit .*: none, emnist/all_but_head"), ("random/1e-6", "nothing to train")]
WRONG += [("dense1", "'dense1' is unknown; allowed .*: none, emnist"), (None, "hyper.policy: None is unknown")]  # type: ignore[list-item]
TRAINED = 208 + 3216 + 1290  # of emnist-narrow on 8 x 8 and 10 kinds, under emnist/dense1: all but 8320


@pytest.fixture(scope="module", autouse=True)
def small_world() -> Iterator[None]:
    """Networks of this file's own, by name; one thread, as `rounds.run` sets it."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small-resnet", lambda c, side, kinds, root: partial.resnet(c, kinds, (32,) * 4))
        patch.setitem(MODELS, "normed", lambda c, side, kinds, root: cnn._blocks((4, 6), 1, c, side, kinds))
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture
def begin(tiny: MakeSpec) -> Begin:
    """spec, task, hyper, state, message, seed, and mark: the fingerprint of the frozen part."""

    def begun(policy: str = "emnist/dense1", more_hyper: Settings | None = None, **more: Any) -> SimpleNamespace:
        hyper = Hyper(policy=policy, **(more_hyper or {}))
        spec = tiny(**{"method": "fedpt", "model": "emnist-narrow", "hyper": dataclasses.asdict(hyper), **more})
        task = task_of(spec.key(), CPU)
        state = registry.initial(spec, task)
        seed, message = fedpt.seed_of(state), fedpt.broadcast(state, hyper, task)
        mark = fedpt.frozen_part(seed, hyper, task)[1]
        return SimpleNamespace(spec=spec, task=task, hyper=hyper, state=state, message=message, seed=seed, mark=mark)

    return begun


def after(run: Any, number: int) -> State:
    state: State = run.state
    for n in range(1, number + 1):
        state, _ = rounds.one_round(run.spec, run.task, ENGINE, state, n, {})
    return state


def made(run: Any) -> State:
    names = sorted(freezing.matching(freezing.POLICIES[run.hyper.policy], run.task.parameters), reverse=True)
    return {name: initializers.values(run.seed, name, run.task.parameters[name], run.hyper.law) for name in names}


def packed(run: Any, way: str, samples: int, *parts: Any) -> bytes:
    return container.pack(f"fedpt.{way}", run.task.fingerprint("fedpt", run.hyper), samples, parts)


def upload(run: Any, change: State, samples: int = 7) -> bytes:
    return packed(run, "up", samples, run.mark, pack_tensors(change, fedpt.trained(run.hyper, run.task)))


def read(run: Any, way: str, content: Any) -> tuple[State, Any]:
    if way == "down":
        return fedpt.start(content, run.hyper, run.task, Rng(0))
    return fedpt.read_update(content, run.mark, run.hyper, run.task)


def served(run: Any, *pairs: tuple[State, int]) -> State:
    return fedpt.server(run.state, Uploads(enumerate(upload(run, *pair) for pair in pairs)), run.hyper, run.task)


def changes(run: Any, count: int, scale: float = 0.1) -> list[State]:
    generator, shapes = torch.Generator().manual_seed(3), fedpt.trained(run.hyper, run.task)
    return [{n: scale * torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(count)]


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@each_local
@each_server
def test_01_frozen_tensors_never_change(begin: Begin, client: str, server: str) -> None:
    run = begin(more_hyper=SERVER[server], **LOCAL[client])
    expected = made(run)
    trainable, held = read(run, "down", run.message)
    train(fedpt, trainable, held, run.task.shard(0), run.hyper, run.task, Rng(0))
    assert equal({name: held[name] for name in expected}, expected) and trainable.keys().isdisjoint(expected)
    state = after(run, 3)
    (model,) = registry.models(run.spec, run.task, state, 3)
    assert list(model) == list(run.task.parameters) and equal({name: model[name] for name in expected}, expected)
    for name in model.keys() - expected.keys():
        assert torch.equal(model[name], state[name]) and not torch.equal(model[name], run.state[name]), "it has moved"


def test_02_fixed_part_depends_on_seed_law_and_name_alone(begin: Begin) -> None:
    run, wide = begin(), begin("emnist/all_but_head")
    fedpt.fixed.cache_clear()
    assert run.seed == wide.seed and equal(fedpt.frozen_part(run.seed, wide.hyper, run.task)[0], made(wide))
    tensors, mark = fedpt.frozen_part(run.seed, run.hyper, run.task)
    assert equal(tensors, made(run)) and mark == run.mark != wide.mark and len(mark) == 8
    marks = {mark, wide.mark}
    for seed, law in ((run.seed ^ 1, "he"), (run.seed ^ 1 << 63, "he"), (run.seed, "glorot"), (run.seed, "torch")):
        others, found = fedpt.frozen_part(seed, dataclasses.replace(run.hyper, law=law), run.task)
        assert not torch.equal(others["dense1.weight"], tensors["dense1.weight"])
        marks.add(found)
    half = fedpt.frozen_part(run.seed, dataclasses.replace(run.hyper, scale=0.5), run.task)[0]
    assert torch.equal(half["dense1.weight"] * 2, tensors["dense1.weight"]) and not half["dense1.bias"].any()
    assert len(marks) == 6 and len({begin(seed=seed).seed for seed in range(4)}) == 4, "runs differ"
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    code = "from fedlib.methods.fedpt import method as fedpt\n"
    code += f"print(fedpt.fixed({run.seed}, 'he', 1.0, {shapes!r})[1].hex())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert fresh.stdout.strip() == mark.hex()


@each_policy
def test_03_the_trained_part_and_the_seed_are_the_model(begin: Begin, policy: str) -> None:
    """Read out of the message by hand."""
    run = begin(policy, {"law": "glorot"})
    state = after(run, 2)
    message = fedpt.broadcast(state, run.hyper, run.task)
    assert struct.unpack("<Q", message[36:44]) == (run.seed,)
    model, values = made(run), torch.frombuffer(bytearray(message[52:-4]), dtype=torch.float32)
    for name, shape in run.task.parameters.items():
        if name not in model:
            model[name], values = values[: shape.numel()].view(shape), values[shape.numel() :]
    (network := build("emnist-narrow", 1, 8, 10, Rng(99)).eval()).load_state_dict(model)
    expected = run.task.logits(registry.models(run.spec, run.task, state, 2)[0], run.task.test[0])
    assert torch.equal(network(run.task.test[0]), expected) and not len(values)


@pytest.mark.parametrize("model, policy", POLICIES)
def test_04_payload(begin: Begin, model: str, policy: str) -> None:
    """4 bytes a trained entry, and 56 bytes down (16 of them seed and fingerprint), 48 up (8 fingerprint)."""
    run = begin(policy, model=model)
    held = freezing.frozen_names(policy, run.task.parameters)
    n = sum(p.numel() for name, p in run.task.network.named_parameters() if name not in held)
    assert bool(held) == (policy != "none") and (n == TRAINED) == (policy == "emnist/dense1")
    reply = fedpt.finish(*read(run, "down", run.message), 7, run.hyper, run.task, Rng(0))
    assert (len(run.message), len(reply)) == (4 * n + 56, 4 * n + 48)
    assert fedpt.paper_bits(reply, run.hyper, run.task) == 32 * n


@pytest.mark.parametrize("way", ["down", "up"])
def test_altered_truncated_and_wrong_messages(begin: Begin, way: str) -> None:
    run = begin()
    update = upload(run, changes(run, 1)[0])
    good, other, samples, split = (run.message, update, 0, 52) if way == "down" else (update, run.message, 7, 44)
    head, body = good[36:split], good[split:-4]
    assert read(run, way, good) and good == packed(run, way, samples, head, body)
    nan = body[:-4] + struct.pack("<f", math.nan)
    wrong: list[list[bytes]] = [[head[:-1], body], [head + b"\0", body], [head, body[:-4]], [head, nan], [body]]
    bad = [other, good + b"\0", *(packed(run, way, samples, *parts) for parts in wrong)]
    for place in (*range(80), *range(80, len(good), 1999), *range(len(good) - 8, len(good))):
        altered = [good[:place] + bytes([good[place] ^ change]) + good[place + 1 :] for change in (1, 128, 255)]
        bad += [good[:place], *altered]
    for content in bad:
        with pytest.raises(PayloadError):
            read(run, way, content)


@pytest.mark.parametrize("more, law", [(1, "he"), (0, "glorot")])
def test_another_frozen_part_is_named_on_both_sides(begin: Begin, more: int, law: str) -> None:
    """As where a client's program makes other values of the same seed: only the fingerprint can tell."""
    run = begin()
    theirs = fedpt.frozen_part(run.seed + more, dataclasses.replace(run.hyper, law=law), run.task)[1]
    words = f"frozen part {run.mark.hex()}, the other side's is {theirs.hex()}"
    with pytest.raises(PayloadError, match=words):
        read(run, "down", packed(run, "down", 0, run.message[36:44] + theirs, run.message[52:-4]))
    good = upload(run, changes(run, 1)[0])
    found = Uploads([(0, packed(run, "up", 7, theirs, good[44:-4])), (1, good)])
    fedpt.server(run.state, found, run.hyper, run.task)
    assert found.accepted == [1] and words in found.refused[0][1]


@each_local
def test_05_nothing_is_kept_for_frozen_tensors(begin: Begin, client: str) -> None:
    run = begin(**LOCAL[client])
    trainable, held = read(run, "down", run.message)
    loss = fedpt.objective(trainable, held, run.task.shard(0), None, run.hyper, run.task)
    leaves, queue = set(), [loss.grad_fn]
    while queue:
        if (node := queue.pop()) is not None:
            leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
            queue += [below for below, _ in node.next_functions]
    assert leaves == {id(tensor) for tensor in trainable.values()}
    loss.backward()
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in held.values())
    moments = recalled(run.task, trainable, None)
    orders = {"sgd": 0, "momentum": 1, "adam": 2}
    assert sum(tensor.numel() for tensor in moments.values()) == orders[client] * TRAINED + (client == "adam")
    for server, slots in (orders | {"yogi": 2}).items():
        own = begin(more_hyper=SERVER[server], **LOCAL[client])
        for state in (own.state, after(own, 1)):
            assert sum(tensor.numel() for tensor in state.values()) == (1 + slots) * TRAINED + 8 + 8 + 1
            assert not any("dense1" in name for name in [*state, *moments])


@pytest.mark.parametrize("model, policy", [("emnist-narrow", "emnist/dense1"), ("small-resnet", "cifar/s1234")])
def test_06_gradient_is_that_part_of_the_full_one(begin: Begin, model: str, policy: str) -> None:
    run = begin(policy, model=model)
    x, y = (part[:32] for part in run.task.shard(2))
    trainable, held = read(run, "down", run.message)
    loss = fedpt.objective(trainable, held, (x, y), None, run.hyper, run.task)
    found = dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True))
    whole = {n: t.clone().requires_grad_() for n, t in fedpt.models(run.state, run.hyper, run.task, Rng(0))[0].items()}
    full = nn.functional.cross_entropy(functional_call(run.task.network, whole, (x,)), y)
    expected = dict(zip(whole, torch.autograd.grad(full, list(whole.values())), strict=True))
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        assert size > 1e-6 and float((gradient - expected[name]).abs().max()) <= 1e-5 * size


@each_local
def test_07_policy_none_is_fedavg(begin: Begin, tiny: MakeSpec, client: str) -> None:
    """To the rounding of w + mean(change) against mean(w): FedAvg sends models, not changes, as float32."""
    run = begin("none", partition=UNEQUAL, **LOCAL[client])
    plain, state = tiny(method="fedavg", model="emnist-narrow", partition=UNEQUAL, **LOCAL[client]), run.state
    for number in (1, 2, 3):
        new, _ = rounds.one_round(run.spec, run.task, ENGINE, state, number, {})
        model = {name: state[name] for name in run.task.parameters}
        expected, _ = rounds.one_round(plain, run.task, ENGINE, model, number, {})
        for name, before in model.items():
            moved = float((new[name] - before).abs().max())
            bound = 2.0**-22 * (float(before.abs().max()) + 8 * moved)
            assert float((new[name] - expected[name]).abs().max()) <= bound < moved / 1000
        state = new


@each_server
@each_local
def test_07_policy_none_is_plain_fedopt_bit_for_bit(begin: Begin, server: str, client: str) -> None:
    """Three rounds in a row: the clients are FedAvg's, of whose models the change is taken; the server is spelt out."""
    run = begin("none", SERVER[server], partition=UNEQUAL, **LOCAL[client])
    plain = dataclasses.replace(run.spec, method="fedavg", hyper={})
    hyper, names = run.hyper, list(run.task.parameters)
    w = {name: run.state[name] for name in names}
    m, v = ({name: torch.zeros_like(w[name]) for name in names} for _ in range(2))
    for t in (1, 2, 3):
        run.state, _ = rounds.one_round(run.spec, run.task, ENGINE, run.state, t, {})
        cohort = rounds.draw_cohort(plain, run.task, t)
        replies: Any = ENGINE.train(plain, fedavg.broadcast(w, FEDAVG, run.task), t, cohort)
        total, weight = {name: torch.zeros_like(w[name], dtype=torch.float64) for name in names}, 0
        for _, reply in replies:
            model, samples = unpack_model(reply, "fedavg.up", FEDAVG, run.task)
            weight += samples
            for name in names:
                total[name] += samples * (model[name] - w[name]).double()
        for name in names:
            d = (total[name] / weight).float()
            if hyper.optimizer == "sgd":
                m[name] = hyper.momentum * m[name] + d if hyper.momentum else d
                w[name] = w[name] + hyper.server_lr * m[name]
                continue
            m[name] = hyper.beta1 * m[name] + (1 - hyper.beta1) * d
            grown = d * d
            if hyper.optimizer == "adam":
                v[name] = hyper.beta2 * v[name] + (1 - hyper.beta2) * grown
            else:
                v[name] = v[name] - (1 - hyper.beta2) * torch.sign(v[name] - grown) * grown
            rate = hyper.server_lr * ((1 - hyper.beta2**t) ** 0.5 / (1 - hyper.beta1**t) if hyper.correction else 1)
            w[name] = w[name] + rate * m[name] / (v[name].sqrt() + hyper.epsilon)
        assert all(torch.equal(run.state[name], w[name]) for name in names)


def test_a_checkpoint_with_another_frozen_part_is_refused(begin: Begin) -> None:
    """As when a new version of a library drew other values."""
    run = begin()
    spoilt = run.state | {"fingerprint": run.state["fingerprint"] ^ 1}
    with pytest.raises(RunError, match="not that of the checkpoint; remove"):
        fedpt.broadcast(spoilt, run.hyper, run.task)


def test_a_scale_of_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match="is for frozen weights, and policy none has none"):
        Hyper(scale=2.0)


def float64_server(hyper: Hyper, w: Tensor, means: list[Tensor]) -> Tensor:
    """torch's Adam, whose epsilon stands beside the corrected root; Keras' and Reddi et al.'s formulas from v = 0."""
    b1, b2, m, v = hyper.beta1, hyper.beta2, torch.zeros_like(w), torch.zeros_like(w)
    own = nn.Parameter(w.clone())
    torchs = torch.optim.Adam([own], lr=hyper.server_lr, betas=(b1, b2))
    for t, d in enumerate(means, 1):
        own.grad, torchs.param_groups[0]["eps"] = -d, hyper.epsilon / math.sqrt(1 - b2**t)
        torchs.step()
        m = hyper.momentum * m + d if hyper.optimizer == "sgd" else b1 * m + (1 - b1) * d
        v = b2 * v + (1 - b2) * d**2 if hyper.optimizer == "adam" else v - (1 - b2) * (v - d**2).sign() * d**2
        rate = hyper.server_lr * (math.sqrt(1 - b2**t) / (1 - b1**t) if hyper.correction else 1)
        w = w + (hyper.server_lr * m if hyper.optimizer == "sgd" else rate * m / (v.sqrt() + hyper.epsilon))
    return own.detach() if hyper.optimizer == "adam" and hyper.correction else w


@pytest.mark.parametrize("more", [{"server_lr": 0.7}, HEAVY, *[a | o for a in ADAPTIVE for o in OTHERS]])
def test_07_server_optimizers_in_float64(begin: Begin, more: Settings) -> None:
    """Five rounds of three clients with unequal weights; changes grow and shrink."""
    run, weights, means = begin(more_hyper=more), [1, 5, 100], []
    before = run.state
    for scale in (0.1, 0.2, 0.03, 0.06, 0.02):
        pairs = list(zip(changes(run, 3, scale), weights, strict=True))
        means.append({name: sum(k * c[name].double() for c, k in pairs) / 106 for name in pairs[0][0]})
        run.state = served(run, *pairs)
    for name in means[0]:
        expected = float64_server(run.hyper, before[name].double(), [mean[name] for mean in means])  # type: ignore[misc]
        np.testing.assert_allclose(run.state[name], expected, rtol=2e-6, atol=2e-6)
        assert float((expected - before[name]).abs().max()) > 0.01


def test_adam_defaults_to_keras() -> None:
    hyper = Hyper(optimizer="adam")
    assert (hyper.beta1, hyper.beta2, hyper.correction) == (0.9, 0.999, True)


@each_server
def test_08_aggregation_is_linear(begin: Begin, server: str) -> None:
    run, plain = begin(more_hyper=SERVER[server]), begin(more_hyper={**SERVER[server], "weighting": "clients"})
    a, b, c = changes(run, 3)
    one, mixed = served(run, (a, 1)), served(run, (a, 3), (b, 50), (c, 7))
    assert equal(served(run, (a, 3), (a, 50), (a, 7)), one) and not equal(one, mixed), "equal clients are one"
    assert equal(served(run, (a, 3 * 64), (b, 50 * 64), (c, 7 * 64)), mixed)
    mean = {name: ((a[name].double() + b[name].double() + c[name].double()) / 3).float() for name in a}
    expected = fedpt.moved(plain.state, mean, plain.hyper)
    assert equal(served(plain, (a, 3), (b, 50), (c, 7)), expected) and not equal(expected, mixed)


def test_an_update_that_is_not_finite_is_refused_and_the_round_goes_on(begin: Begin) -> None:
    run, (change,) = begin(), changes(begin(), 1)
    trainable, held = read(run, "down", run.message)
    with pytest.raises(PayloadError, match="only finite") as error:
        fedpt.finish({n: t / 0 for n, t in trainable.items()}, held, 7, run.hyper, run.task, Rng(0))
    nan = packed(run, "up", 7, run.mark, np.full(TRAINED, np.nan, "<f4").tobytes())
    found = Uploads([(0, error.value), (1, upload(run, change)), (2, nan)])
    assert equal(fedpt.server(run.state, found, run.hyper, run.task), served(run, (change, 1)))
    assert found.accepted == [1] and [client for client, _ in found.refused] == [0, 2]


@pytest.mark.parametrize("policy, words", [*WRONG, *((f"random/{p}", "between 0 and 1") for p in (0, 1, "nan", ""))])
def test_wrong_policies(begin: Begin, tiny: MakeSpec, tmp_path: Path, policy: Any, words: str) -> None:
    with pytest.raises(SpecError, match="BatchNorm's statistics are neither trained nor frozen"):
        begin(policy, model="normed")
    with pytest.raises(SpecError, match=words):
        rounds.run(tiny(method="fedpt", model="emnist-narrow", hyper={"policy": policy}), ENGINE, root=tmp_path)


@each_policy
@each_local
def test_engines_agree(begin: Begin, policy: str, client: str) -> None:
    """Graphed byte for byte, Stacked to rounding, on unequal shards."""
    run, engines = begin(policy, partition=UNEQUAL, **LOCAL[client]), [ENGINE, Graphed(CPU), Stacked(CPU)]
    one, graphed, stacked = (dict(engine.train(run.spec, run.message, 1, [8, 0, 2])) for engine in engines)
    assert one == graphed and list(stacked) == [8, 0, 2]
    for c in one:
        (a, samples), (b, others) = (read(run, "up", reply) for reply in (one[c], stacked[c]))
        assert samples == others == len(run.task.partition.indices(c))
        x, y = (torch.cat([tensor.flatten() for tensor in d.values()]) for d in (a, b))
        assert float((x - y).norm()) < 1e-3 * float(x.norm())
