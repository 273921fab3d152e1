"""Which part of a network is frozen: policies of the specification of FedPT, patterns, random parts."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Shapes, emnist, on_paper, resnet, shapes, size, spec_transformer

from fedlib.errors import SpecError
from fedlib.models import freezing
from fedlib.models.registry import MODELS
from fedlib.rng import Rng

EMNIST, CIFAR10, CIFAR100 = shapes(emnist()), shapes(resnet(10)), shapes(resnet(100))
SO = {blocks: shapes(spec_transformer(blocks)) for blocks in (1, 3)}


def trained_entries(own: Shapes, what: str | list[str]) -> int:
    """Entries that a policy, or the freezing of what fits these patterns, leaves trained."""
    frozen = freezing.frozen_names(what, own) if isinstance(what, str) else freezing.matching(what, own)
    return size({name: shape for name, shape in own.items() if name not in frozen})


# Trained parameters, and the factor by which messages shrink as the specification prints it.
@pytest.mark.parametrize(
    ("own", "what", "expected", "factor"),
    [
        (EMNIST, "none", 1_690_046, "1.00"),
        (EMNIST, "emnist/dense1", 83_902, "20.14"),
        (EMNIST, "emnist/conv", 1_637_950, "1.03"),
        (EMNIST, "emnist/all_but_head", 31_806, "53.1"),
        (CIFAR100, "none", 11_227_812, "1.00"),
        (CIFAR100, "cifar/s4", 2_970_276, "3.78"),
        (CIFAR100, "cifar/s34", 905_892, "12.39"),
        (CIFAR100, "cifar/s234", 389_796, "28.80"),
        (CIFAR100, "cifar/s1234", 242_340, "46.33"),
        (CIFAR10, "cifar/s4", 2_924_106, "3.82"),
        (CIFAR10, "cifar/s34", 859_722, "13.01"),
        (CIFAR10, "cifar/s234", 343_626, "32.54"),
        (CIFAR10, "cifar/s1234", 196_170, "57.00"),
        (EMNIST, ["conv2.*", "dense1.*"], 32_638, "51.8"),
        (EMNIST, ["dense1.weight"], 84_414, "20.0"),
    ],
)
def test_policies(own: Shapes, what: str | list[str], expected: int, factor: str) -> None:
    assert trained_entries(own, what) == expected
    assert f"{size(own) / expected:.{len(factor.split('.')[1])}f}" == factor


# Share that is trained in per cent and factor, for one block and for three.
@pytest.mark.parametrize(
    ("what", "one", "three"),
    [
        (["block*.feed.hidden.*"], "75.05 1.33", "70.03 1.43"),
        ("so/ffn", "50.15 1.99", "40.10 2.49"),
        ("so/att", "75.05 1.33", "70.03 1.43"),
        ("so/blocks", "25.20 3.97", "10.13 9.87"),
        (["[!e]*"], "22.80 4.39", "9.13 10.95"),
    ],
)
def test_policies_of_the_transformer(what: str | list[str], one: str, three: str) -> None:
    for blocks, expected in ((1, one), (3, three)):
        own, left = SO[blocks], trained_entries(SO[blocks], what)
        assert f"{100 * left / size(own):.2f} {size(own) / left:.2f}" == expected


def test_policies_fit_the_networks_that_are_built() -> None:
    for name, channels, prefix, policies in (
        *(("emnist", 1, "emnist/", 3), ("emnist-narrow", 1, "emnist/", 3)),
        *(("resnet18-gn-100head", 3, "cifar/", 4), ("transformer", 1, "so/", 3)),
    ):
        own = shapes(on_paper(lambda name=name, channels=channels: MODELS[name](channels, 28, 62, Rng(0))))  # type: ignore[misc]
        fitting = [policy for policy in freezing.POLICIES if policy.startswith(prefix)]
        assert len(fitting) == policies and all(freezing.frozen_names(policy, own) for policy in fitting)


ALLOWED = (
    "allowed for this network: none, emnist/all_but_head, emnist/conv, emnist/dense1, random/p with 0 < p < 1, "
    "names/ and patterns of parameters"
)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("emnist/dense9", "'emnist/dense9' is unknown"),
        (None, "None is unknown"),
        (["none"], r"\['none'\] is unknown"),
        ("cifar/s4", r"'cifar/s4' does not fit this network \(its parameters: conv1.weight to dense2.bias\)"),
        ("random/", "'random/' must end in a number between 0 and 1"),
        ("random/half", "'random/half' must end in a number between 0 and 1"),
        ("random/0", "'random/0' must end in a number between 0 and 1"),
        ("random/1.0", "'random/1.0' must end in a number between 0 and 1"),
        ("random/nan", "'random/nan' must end in a number between 0 and 1"),
        ("random/1e-9", "'random/1e-9' leaves nothing to train"),
        (
            "names/conv1.*,dense3.*",
            r"'dense3.\*' fits no parameter of this network \(its parameters: conv1.weight to .*\)",
        ),
        ("names/", "'' fits no parameter of this network .*"),
        ("names/*", r"'names/\*' leaves nothing to train"),
    ],
)
def test_wrong_policies_are_named(policy: str, message: str) -> None:
    with pytest.raises(SpecError, match=f"^hyper.policy: {message}; {ALLOWED}$"):
        freezing.frozen_names(policy, EMNIST)


def test_patterns_of_one_s_own() -> None:
    found = freezing.frozen_names("names/conv?.weight,dense1.*", EMNIST)
    assert found == {"conv1.weight", "conv2.weight", "dense1.weight", "dense1.bias"}
    assert freezing.frozen_names("names/conv1.*,conv2.*", EMNIST) == freezing.frozen_names("emnist/conv", EMNIST)


def test_half_a_policy_and_nothing_left_to_train() -> None:
    part = {"conv1.weight": torch.Size([2, 2]), "dense2.weight": torch.Size([2, 2])}
    with pytest.raises(SpecError, match="'emnist/conv' does not fit this network"):
        freezing.frozen_names("emnist/conv", part)
    with pytest.raises(SpecError, match="'emnist/dense1' leaves nothing to train; allowed"):
        freezing.frozen_names("emnist/dense1", {"dense1.weight": torch.Size([2, 2]), "dense1.bias": torch.Size([2])})


@pytest.mark.parametrize(
    ("own", "p"), [*((CIFAR100, p) for p in (0.0216, 0.05, 0.1, 0.25, 0.5)), (SO[1], 0.25), (SO[1], 0.5)]
)
def test_random_policies_come_near_to_the_fraction(own: Shapes, p: float) -> None:
    assert freezing.random_part(p, own) == freezing.random_part(p, dict(reversed(own.items()))), "whatever the order"
    assert 0.99 * p < trained_entries(own, f"random/{p}") / size(own) <= p


def test_a_random_policy_by_hand() -> None:
    """In the order d, c, b, a of the hashes; half of the 16 entries has room for 1, 4 and 3."""
    own = {name: torch.Size([n]) for name, n in {"a": 8, "b": 3, "c": 4, "d": 1}.items()}
    assert [hashlib.sha256(name).hexdigest()[:2] for name in (b"d", b"c", b"b", b"a")] == ["18", "2e", "3e", "ca"]
    assert freezing.random_part(0.5, own) == {"a"}
    assert freezing.random_part(0.25, own) == {"a", "c"}, "1, then no room for 4, then 3"


@given(st.lists(st.integers(1, 1_000), min_size=1, max_size=12), st.floats(0.001, 0.999))
def test_a_random_policy_fills_its_room(sizes: list[int], p: float) -> None:
    own = {f"layer{index}.weight": torch.Size([entries]) for index, entries in enumerate(sizes)}
    frozen = freezing.random_part(p, own)
    entries = size(own) - size({name: own[name] for name in frozen})
    assert frozen and entries <= p * size(own) + 1e-6
    assert all(entries + own[name].numel() > p * size(own) - 1e-6 for name in frozen), "no other would fit"
