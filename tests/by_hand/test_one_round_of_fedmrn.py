"""One round of FedMRN, worked by hand: two clients, three weights w = 0, one step each.

The network gives the scores w x of three classes. At w = 0 each class has probability 1/3, and the gradient is
(1/3 - one-hot) x. Noise is uniform on [-1/4, 1/4), the mask binary, the learning rate 0.3.

client                       A                              B
samples                      one, x = 1 of class 0          three, x = 2 of class 1
u = -0.3 gradient             0.2     -0.1     -0.1         -0.2      0.4     -0.2
noise n, from the seed        0.0606  -0.1856   0.1239      -0.0217  -0.0173   0.0742
u / n, limited to [0, 1]      1        0.539    0            1        0        0
draw, below it the mask is 1  0.928    0.774    0.713        0.437    0.238    0.346
mask                          1        0        0            1        0        0
n times mask                  0.0606   0        0           -0.0217   0        0
"""

import struct

import pytest
import torch
import xxhash
from small_task import NONE, make_task
from torch import nn

from fedlib import rng
from fedlib.core import client
from fedlib.core.method import Phase, ServerState
from fedlib.core.plan import Plan
from fedlib.core.uploads import Uploads
from fedlib.methods.fedmrn import FedMRN
from fedlib.rng import Rng

PLAN = Plan(epochs=1, batch=4, lr=0.3)
METHOD = FedMRN(magnitude=0.25).bind(make_task(nn.Linear(1, 3, bias=False), PLAN))
STATE = ServerState({"weight": torch.zeros(3, 1)}, METHOD.magnitude)
SHARDS = [(torch.ones(1, 1), torch.tensor([0])), (torch.full((3, 1), 2.0), torch.tensor([1, 1, 1]))]
PLACES = [Rng(9).child("client", 1, number) for number in (0, 1)]  # of a client's randomness: seed, round, client
SEEDS = [0x1D7DE589FD9A0BFB, 0x11183CF32195074D]  # of the noise
WORDS = [[0x9F08006E, 0x20FBF402, 0xBF6A1FA3], [0x74EA2F0E, 0x7726EFC2, 0xA601E271]]  # that the generator gives
U = [[0.2, -0.1, -0.1], [-0.2, 0.4, -0.2]]
NOISE = [[0.060608, -0.185578, 0.123857], [-0.021651, -0.017281, 0.074233]]
DRAWS = [[0.928, 0.774, 0.713], [0.437, 0.238, 0.346]]
MASKS = [0b001, 0b001]  # the first entry is the lowest bit
BOTH = pytest.mark.parametrize("k", [0, 1], ids="AB")


def upload(k: int) -> bytes:
    """What a client sends: 8 bytes of seed and 1 of mask, where FedAvg sends 12, in an envelope."""
    message = b"FLW" + bytes([2, 10]) + b"fedmrn.up\0"  # version 2; the kind, of 10 bytes with its padding
    message += METHOD.fingerprint()  # 8 bytes for the settings and the shape of the model
    message += struct.pack("<IIIB3I", len(SHARDS[k][1]), 0, 0, 3, 8, 1, 0)  # samples; no address; lengths of 3 sections
    message += SEEDS[k].to_bytes(8, "little") + bytes([MASKS[k]])  # and nothing in full precision: there is no bias
    return message + struct.pack("<I", xxhash.xxh3_64_intdigest(message) % 2**32)


@BOTH
def test_noise_of_a_seed(k: int) -> None:
    """The upper 24 bits of a word, in units of 2^-23, minus 1: for A 10,422,272 / 8,388,608 - 1 = 0.2424, and so on."""
    assert PLACES[k].child("noise").seed() == SEEDS[k]
    assert rng.words(SEEDS[k], stream=0, count=3).tolist() == WORDS[k]
    by_hand = [0.25 * ((word >> 8) / 2**23 - 1) for word in WORDS[k]]
    found = METHOD.drawn_noise(SEEDS[k], METHOD.magnitude, METHOD.task.weights).tolist()
    assert found == pytest.approx(by_hand) and by_hand == pytest.approx(NOISE[k], abs=1e-6)


@BOTH
def test_client(k: int) -> None:
    """At u = 0 no mask is 1, whatever is drawn, so that the step's gradient is that at w."""
    local = METHOD.begin(METHOD.broadcast(STATE), SHARDS[k], PLACES[k])
    client.train(METHOD, Phase(PLAN), [client.Member(k, PLACES[k], SHARDS[k], local, memory=None)])
    assert local.trainable["u"].tolist() == pytest.approx(U[k])
    draws = PLACES[k].child("upload").stream().uniform(3)
    assert draws.tolist() == pytest.approx(DRAWS[k], abs=1e-3)
    assert METHOD.upload(local, NONE, PLACES[k]) == upload(k)


def test_server() -> None:
    """0 + (1 n m of A + 3 n m of B) / 4; that is (0.060608 - 3 * 0.021651) / 4. FedAvg: -0.1, 0.275, -0.175."""
    new = METHOD.aggregate(STATE, Uploads([(0, upload(0)), (1, upload(1))]))
    assert new.model["weight"].flatten().tolist() == pytest.approx([-0.001086, 0.0, 0.0], abs=1e-6)
