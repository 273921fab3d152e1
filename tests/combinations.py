"""Runs in which two methods meet, or a method and a frozen part."""

from typing import Any

LEVELS = {"method": "feddq", "hyper": {"schedule": "fixed", "width": 8, "quantizer": "affine_nearest"}}
COPIES = {"method": "fedcompress", "hyper": {"least": 16, "most": 16, "layers": "all", "self_compression": False}}
STUDENT = {
    "method": "fedcompress",
    "hyper": {"least": 16, "most": 16, "layers": "all", "images": 64, "distil_batch": 32, "distil_epochs": 1},
}
HYPER: dict[str, dict[str, Any]] = {  # of methods whose defaults are not for three rounds of a tiny network
    "fedmrn": {"magnitude": 0.05},
    "fedcompress": {"layers": "all", "least": 4, "most": 4, "images": 64, "distil_batch": 32, "distil_epochs": 1},
}
DENSE: dict[str, Any] = {"model": "emnist-hidden8", "frozen": "emnist/dense1"}
