"""Which methods go together in one run, as their specification says itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from fedlib import methods
from fedlib.errors import SpecError
from fedlib.exhibits import Exhibit, table
from fedlib.spec import Spec

WITH: dict[str, dict[str, Any]] = {
    "a part frozen": {"frozen": "emnist/dense1", "model": "emnist-narrow"},
    "sent down by FedDQ": {
        "downlink": {"method": "feddq", "hyper": {"schedule": "fixed", "width": 8, "quantizer": "affine_nearest"}}
    },
    "sent down by FedCompress": {
        "downlink": {"method": "fedcompress", "hyper": {"least": 16, "most": 16, "layers": "all"}}
    },
    "error feedback": {"feedback": True},
}


def pair_table(like: Spec, names: Sequence[str], name: str) -> Exhibit:
    """A row a method, a column what it may be combined with: "yes", or why the specification is refused."""
    rows = []
    for method in names:
        own = dataclasses.replace(like, method=method, hyper=_hyper(method))
        rows.append({"method": method} | {with_: _refusal(own, change) or "yes" for with_, change in WITH.items()})
    caption = "Which combinations a specification may ask for; else why it is refused."
    return table(pd.DataFrame(rows), caption, name)


def _refusal(own: Spec, change: dict[str, Any]) -> str:
    try:
        dataclasses.replace(own, **change)
    except SpecError as error:
        return str(error).partition(": ")[2].partition(";")[0]  # without field and remedy
    return ""


def _hyper(method: str) -> dict[str, Any]:
    """Settings with which a method can be built without held-out samples."""
    fields = {f.name for f in dataclasses.fields(methods.METHODS[method].Hyper)}
    return {"least": 8, "most": 8} if "patience" in fields else {}
