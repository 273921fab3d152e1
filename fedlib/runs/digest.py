"""The digest of the code behind a record: of every top-level statement that its run can reach, wherever it stands.

A file may move, be split or be formatted anew, and no record becomes stale; a changed formula makes stale the records
of all runs that reach it, and no others.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any

from fedlib.data import sets
from fedlib.methods import registry
from fedlib.models.given import UNKNOWN, Given
from fedlib.models.registry import MODELS
from fedlib.runs.spec import Spec
from fedlib.runs.statements import Place, Source, Statement

PACKAGE = Path(__file__).resolve().parents[1]

# What a run reaches and the digest leaves out: a module, or one name of it, and why it cannot move a number.
INERT = {
    "fedlib.errors": "raises, or does nothing",
    "fedlib.philox_kernel": "is used where it gives the draws of fedlib.rng",
    "fedlib.runs.record": "carries numbers that others make",
    "fedlib.runs.checkpoint": "carries numbers that others make",
    "fedlib.runs.machine": "says where and when",
    "fedlib.runs.progress": "shows numbers that others make",
    "fedlib.runs.spec": "a record holds its spec, which is compared",
    "fedlib.runs.digest": "makes no number of a run",
    "fedlib.data.sources.verify": "hands out files whose hash is the expected one",
    "fedlib.data.sets.digest": "is compared for itself",
    "fedlib.data.sets.Entry": "its values are in the data's own digest",
    # Tables: what a run takes from them is hashed, and so is what is chosen by mistake.
    "fedlib.methods.registry.METHODS": "a table",
    "fedlib.methods.registry.WRITERS": "a table",
    "fedlib.models.registry.MODELS": "a table",
    "fedlib.data.sets.ENTRIES": "a table",
}
# Where a run begins, whatever it is.
ROOTS = (
    ("fedlib.runs.rounds", "run"),
    ("fedlib.engines.in_process", "InProcess"),
    ("fedlib.runs.derived", "Derived"),
)


def code_of(spec: Spec) -> str:
    """As of `code_digest`; with a question mark where a caller's own code has parts whose source is not there."""
    found = _digest_here(spec.method, spec.model, spec.data, (spec.downlink or {}).get("method", ""))
    network = MODELS[spec.model]
    own = [sets.ENTRIES[spec.data].code, network.code if isinstance(network, Given) else ""]
    return found + UNKNOWN if any(code.endswith(UNKNOWN) for code in own) else found


def code_digest(method: str, model: str, data: str, downlink: str = "", package: Path = PACKAGE) -> str:
    """Sixteen hex digits: of all that a run with this method, network, data set and downlink can reach.

    package: where the source of fedlib lies.
    """
    texts = {statement.text for statement in reached(method, model, data, downlink, package)}
    texts |= {repr(inner) for chosen in _chosen(method, model, data, downlink) if (inner := _enclosed(chosen))}
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16]


_digest_here = functools.cache(code_digest)  # the package does not change while it runs


@functools.cache
def _source_here() -> Source:
    return Source(PACKAGE)


def reached(method: str, model: str, data: str, downlink: str = "", package: Path = PACKAGE) -> set[Statement]:
    """The statements of fedlib that such a run can reach, those of INERT left out."""
    source = _source_here() if package == PACKAGE else Source(package)
    waiting = [Place(*root) for root in ROOTS]
    waiting += [_place(chosen) for chosen in _chosen(method, model, data, downlink)]
    statements: set[Statement] = set()
    met: set[Place] = set()
    while waiting:
        place = source.resolved(waiting.pop())
        if place in met or _inert(place):
            continue
        met.add(place)
        for statement in source.found(place):
            if statement not in statements:
                statements.add(statement)
                waiting += statement.reaches
    return statements


def _inert(place: Place) -> bool:
    parts = place.module.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(name in INERT for name in (*above, f"{place.module}.{place.name}"))


def _chosen(method: str, model: str, data: str, downlink: str) -> list[Any]:
    """What the tables hold for these names."""
    used: list[Any] = [registry.METHODS[method], *([registry.WRITERS[downlink]] if downlink else [])]
    return [*used, MODELS[model], sets.ENTRIES[data].read]


def _place(chosen: Any) -> Place:
    chosen = type(chosen) if isinstance(chosen, Given) else chosen
    return Place(chosen.__module__, chosen.__qualname__.partition(".")[0])


def _enclosed(chosen: Any) -> dict[str, Any]:
    """What a function made by another one holds of it, such as a layer's width; of a caller's own, its digest."""
    if isinstance(chosen, Given):
        return {"code": chosen.code}
    return dict(inspect.getclosurevars(chosen).nonlocals) if inspect.isfunction(chosen) else {}
