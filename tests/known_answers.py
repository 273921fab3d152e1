"""A short run of every method on digits, and what came of it: run this file to write known_answers.json anew.

What the digest does not see (a library, a compiler, a processor) shows here.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedlib.engines.in_process import InProcess
from fedlib.runs import machine, record, rounds
from fedlib.runs.spec import Spec

ANSWERS = Path(__file__).with_suffix(".json")
# A run on digits that takes a fraction of a second.
TINY: dict[str, Any] = dict(
    paper="tiny",
    profile="smoke",
    name="main_fedavg_iid_seed0",
    group="main",
    label="fedavg",
    split="iid",
    method="fedavg",
    hyper={},
    data="digits",
    model="mlp",
    partition={"kind": "iid", "seed": 1},
    clients=10,
    cohort=4,
    rounds=3,
    epochs=1,
    batch=32,
    lr=0.1,
    evaluate_every=2,
    seed=0,
)
DENSE: dict[str, Any] = {"model": "emnist-hidden8", "frozen": "emnist/dense1"}
QUICK = {"images": 64, "distil_epochs": 1, "distil_batch": 32, "clustered_epochs": 1}
PRIVATE = {"policy": "emnist/dense1", "weighting": "clients", "clip_norm": 0.5, "noise_multiplier": 1.0, "delta": 1e-2}
SKEWED = {"kind": "dirichlet", "beta": 0.3, "seed": 7}
# By name: how a run differs from TINY.
CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg adam, kept": {"optimizer": "adam", "persistent": True, "lr": 0.01, "partition": SKEWED},
    "fedavg batchnorm, poisson": {"model": "resnet20-quick", "sampling": "poisson", "cohort": 2, "rounds": 1},
    "drive": {"method": "drive"},
    "eden fed back": {"method": "eden", "feedback": True, **DENSE},
    "eden over levels": {"method": "eden", "downlink": {"method": "feddq", "hyper": {"quantizer": "affine_nearest"}}},
    "fedcompress": {"method": "fedcompress", "hyper": QUICK, "model": "emnist-hidden8", "held_out": 0.1},
    "fedcompress pulled": {
        "method": "fedcompress",
        "hyper": QUICK | {"variant": "paper", "augment": "random", "layers": "all", "norms": "recalibrate"},
        "model": "emnist-hidden8",
        "held_out": 0.1,
    },
    "feddq": {"method": "feddq", "momentum": 0.5, "model": "emnist-hidden8"},
    "feddq ascending": {
        "method": "feddq",
        "hyper": {"schedule": "ascending", "quantizer": "norm", "most": 15, "coding": "entropy"},
    },
    "fedmrn": {"method": "fedmrn", "partition": SKEWED},
    "fedmrn signed": {
        "method": "fedmrn",
        "hyper": {"mask": "signed", "noise": "gauss", "magnitude": 0.05, "coding": "entropy", "decay": 0.9},
    },
    "fedpm": {"method": "fedpm", "hyper": {"lam": 0}, "optimizer": "adam", "lr": 0.1},
    "fedpm regularized": {
        "method": "fedpm",
        "hyper": {"aggregation": "bayes", "downlink": "levels", "coding": "global"},
        "optimizer": "adam",
    },
    "fedpt": {
        "method": "fedpt",
        "hyper": {"policy": "emnist/dense1", "optimizer": "yogi", "server_lr": 0.1},
        "model": "emnist-narrow",
    },
    "fedpt in private": {
        "method": "fedpt",
        "hyper": PRIVATE | {"mechanism": "dp_ftrl", "momentum": 0.5},
        "model": "emnist-narrow",
        "sampling": "spaced",
    },
    "fedsparsify": {"method": "fedsparsify", "hyper": {"keep": 0.5}},
    "fedzip": {"method": "fedzip", "model": "emnist-hidden8"},
    "signsgd": {"method": "signsgd"},
    "signvote": {"method": "signvote"},
    "terngrad": {"method": "terngrad"},
    "topk": {"method": "topk", "feedback": True},
}


def made(name: str) -> dict[str, Any]:
    """The rounds and the sums of a case's record."""
    with tempfile.TemporaryDirectory() as folder:
        found = rounds.run(Spec.from_dict(TINY | CASES[name]), InProcess(torch.device("cpu")), root=Path(folder))
    return numbers(found)


def numbers(found: record.Record) -> dict[str, Any]:
    """What a record measured, as JSON has it."""
    return dict(json.loads(json.dumps({key: record.stable(found)[key] for key in ("rounds", "final", "parameters")})))


if __name__ == "__main__":
    answers = {"processor": machine.processor(), "runs": {name: made(name) for name in CASES}}
    ANSWERS.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
    sys.exit(0)
