"""Which tensors are frozen: policies by name, fixed before training, without a look at data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch

from fedlib.errors import SpecError

# policy -> patterns of the names of frozen parameters; the names are those of fedlib.models.partial. A layer's bias is
# frozen with its weights; norms are always trained.
POLICIES: dict[str, tuple[str, ...]] = {
    "none": (),
    "emnist/dense1": ("dense1.*",),
    "emnist/conv": ("conv1.*", "conv2.*"),
    "emnist/all_but_head": ("conv1.*", "conv2.*", "dense1.*"),
    "cifar/s4": ("stage4.block?.conv?.weight",),
    "cifar/s34": ("stage[34].block?.conv?.weight",),
    "cifar/s234": ("stage[234].block?.conv?.weight",),
    "cifar/s1234": ("stage[1234].block?.conv?.weight",),
    "so/ffn": ("block*.feed.*",),
    "so/att": ("block*.attention.*",),
    "so/blocks": ("block*.feed.*", "block*.attention.*"),
}
RANDOM, NAMES = "random/", "names/"


def frozen_names(policy: str, parameters: Mapping[str, torch.Size], field: str = "hyper.policy") -> set[str]:
    """Names of the parameters that `policy` freezes.

    `random/p` (0 < p < 1) leaves about the fraction p trained; `names/0.*,2.bias` freezes what the patterns fit.
    SpecError: unknown policy, one that is not for this network, one that leaves nothing to train.
    """
    # Each pattern must find something: half a policy is another policy.
    fitting = [name for name, patterns in POLICIES.items() if all(matching([one], parameters) for one in patterns)]
    known = ", ".join(["none", *sorted({*fitting} - {"none"})])
    allowed = f"allowed for this network: {known}, random/p with 0 < p < 1, names/ and patterns of parameters"
    names = list(parameters)
    span = f"(its parameters: {names[0]} to {names[-1]})"
    if isinstance(policy, str) and policy.startswith(RANDOM):
        try:
            p = float(policy.removeprefix(RANDOM))
        except ValueError:
            p = 0.0
        if not 0 < p < 1:
            raise SpecError(f"{field}: {policy!r} must end in a number between 0 and 1; {allowed}")
        frozen = random_part(p, parameters)
    elif isinstance(policy, str) and policy.startswith(NAMES):
        patterns = policy.removeprefix(NAMES).split(",")
        for pattern in patterns:
            if not matching([pattern], parameters):
                raise SpecError(f"{field}: {pattern!r} fits no parameter of this network {span}; {allowed}")
        frozen = matching(patterns, parameters)
    elif policy in fitting:
        frozen = matching(POLICIES[policy], parameters)
    elif policy in list(POLICIES):
        raise SpecError(f"{field}: {policy!r} does not fit this network {span}; {allowed}")
    else:
        raise SpecError(f"{field}: {policy!r} is unknown; {allowed}")
    if len(frozen) == len(parameters):
        raise SpecError(f"{field}: {policy!r} leaves nothing to train; {allowed}")
    return frozen


def matching(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """Names that one of the shell patterns fits; `*` takes dots too."""
    patterns = tuple(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def random_part(p: float, parameters: Mapping[str, torch.Size]) -> set[str]:
    """All but some whole tensors: in the order of the hashes of their names, each that keeps the trained fraction at p
    or below is trained. At the end none of the frozen ones would fit."""
    room = p * sum(shape.numel() for shape in parameters.values())
    frozen = set()
    for name in sorted(parameters, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if parameters[name].numel() <= room:
            room -= parameters[name].numel()
        else:
            frozen.add(name)
    return frozen
