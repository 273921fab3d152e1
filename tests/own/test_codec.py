"""Messages without the loop, and partitions as files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedlib
from fedlib.errors import DataError, FedlibError, PayloadError, SpecError
from fedlib.methods.registry import METHODS
from fedlib.wire import container

FITTING = ("drive", "eden", "fedavg", "feddq", "fedmrn", "fedpt", "fedzip", "signsgd", "terngrad", "topk")


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def codec(method: str, settings: dict[str, Any] | None = None) -> fedlib.Codec:
    part = {"policy": "random/0.5"} if method == "fedpt" else {}
    return fedlib.Codec(network, method, part | (settings or {}))


def update(of: fedlib.Codec, scale: float = 0.01) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: scale * torch.randn(shape, generator=draw) for name, shape in of.tensors.items()}


@pytest.mark.parametrize("method", FITTING)
def test_what_is_decoded_is_close_to_what_was_encoded(method: str) -> None:
    """Unbiased or nearest codecs come close; FedMRN's noise has its own length, and Top-k drops most."""
    own = codec(method)
    sent = update(own)
    upload = own.encode(sent, samples=7, seed=3)
    found = codec(method).decode(upload)
    assert {name: tensor.shape for name, tensor in found.items()} == own.tensors
    one, other = (torch.cat([part[name].flatten() for name in sent if sent[name].ndim > 1]) for part in (sent, found))
    likeness = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    assert likeness > 0.3 and len(upload) <= 64 + 4 * sum(shape.numel() for shape in own.tensors.values())
    if method in ("fedavg", "fedpt"):
        assert all(torch.equal(found[name], sent[name]) for name in sent)


def test_a_seed_draws_anew_and_samples_travel() -> None:
    own = codec("terngrad")
    sent = update(own)
    assert own.encode(sent, seed=1) == own.encode(sent, seed=1) != own.encode(sent, seed=2)
    length = own.encode(sent, samples=258)[4]
    assert own.encode(sent, samples=258)[13 + length : 17 + length] == (258).to_bytes(4, "little")


def test_one_bit_a_weight() -> None:
    own = codec("fedmrn", {"magnitude": 0.02})
    sections = container.section_sizes(own.encode(update(own)))
    assert sections[:2] == (8, -(-(4 * 9 + 1440) // 8))


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(FITTING)))
def test_methods_without_updates_are_refused(method: str) -> None:
    with pytest.raises(SpecError, match="has no messages that are updates; use one of drive, eden, fedavg"):
        codec(method)


def test_bad_updates_and_bytes_are_refused() -> None:
    own = codec("eden")
    sent = update(own)
    for bad, words in (
        ({k: v for k, v in sent.items() if k != "0.bias"}, "update: 0.bias has nothing; expected [4]"),
        (sent | {"0.bias": torch.zeros(5)}, "update: 0.bias has [5]; expected [4]"),
        (sent | {"0.weight": sent["0.weight"] * float("nan")}, "not finite"),
    ):
        with pytest.raises(FedlibError) as raised:
            own.encode(bad)
        assert words in str(raised.value)
    upload = own.encode(sent)
    for wrong in (b"", upload[:-1], upload + b"\0", codec("drive").encode(sent), bytes(len(upload))):
        with pytest.raises(PayloadError):
            own.decode(wrong)


# Partitions as files


@pytest.mark.parametrize("ending", ["json", "npz"])
def test_a_partition_survives_its_file(tmp_path: Path, ending: str) -> None:
    labels = np.arange(300) % 10
    shards = fedlib.deal(labels, 7, "dirichlet", 3, beta=0.5)
    assert sorted(np.concatenate(shards).tolist()) == list(range(300))
    fedlib.write_partition(tmp_path / f"a.{ending}", shards)
    found = fedlib.read_partition(tmp_path / f"a.{ending}")
    assert all(np.array_equal(a, b) for a, b in zip(shards, found, strict=True))


def test_a_partition_of_json_is_a_list_of_lists(tmp_path: Path) -> None:
    fedlib.write_partition(tmp_path / "a.json", [[3, 1], np.array([0])])
    assert json.loads((tmp_path / "a.json").read_text()) == [[3, 1], [0]]


@pytest.mark.parametrize("content", ["", "[[1.5]]", "[[]]", '{"a": 1}', "[1, 2]", '[["a"]]'])
def test_what_is_no_partition_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a.json: no partition"):
        fedlib.read_partition(tmp_path / "a.json")


def test_other_endings_files_and_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"must end in .json or .npz"):
        fedlib.write_partition(tmp_path / "a.txt", [[1]])
    with pytest.raises(DataError, match="no partition"):
        fedlib.read_partition(tmp_path / "none.npz")
    with pytest.raises(SpecError, match="kind: dirichlet takes beta, and was given none"):
        fedlib.deal([0, 1], 1, "dirichlet")
