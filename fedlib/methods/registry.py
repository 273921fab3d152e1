"""The methods by name."""

from __future__ import annotations

from typing import Any

from fedlib.core.method import AnyMethod, AnyWriter
from fedlib.errors import SpecError, require_mapping, require_name
from fedlib.methods.baselines.drive import Drive
from fedlib.methods.baselines.eden import Eden
from fedlib.methods.baselines.fedsparsify import FedSparsify
from fedlib.methods.baselines.fedzip import FedZip
from fedlib.methods.baselines.signsgd import SignSGD
from fedlib.methods.baselines.signvote import SignVote
from fedlib.methods.baselines.terngrad import TernGrad
from fedlib.methods.baselines.topk import TopK
from fedlib.methods.fedavg import FedAvg
from fedlib.methods.fedcompress.method import FedCompress
from fedlib.methods.feddq.method import FedDQ
from fedlib.methods.fedmrn import FedMRN
from fedlib.methods.fedpt.method import FedPT
from fedlib.methods.fedsparse.method import FedPM

METHODS: dict[str, type[AnyMethod]] = {
    "drive": Drive,
    "eden": Eden,
    "fedavg": FedAvg,
    "fedcompress": FedCompress,
    "feddq": FedDQ,
    "fedmrn": FedMRN,
    "fedpm": FedPM,
    "fedpt": FedPT,
    "fedsparsify": FedSparsify,
    "fedzip": FedZip,
    "signsgd": SignSGD,
    "signvote": SignVote,
    "terngrad": TernGrad,
    "topk": TopK,
}
# Those that can also write the model that another one broadcasts.
WRITERS: dict[str, type[AnyWriter]] = {"fedcompress": FedCompress, "feddq": FedDQ}


def make(name: str, settings: dict[str, Any]) -> AnyMethod:
    """The method, not yet bound to a task. SpecError names an unknown setting or a value out of range."""
    method = METHODS[name]
    lacking = method.__abstractmethods__ | ({"name", "sections"} - set(dir(method)))
    if lacking:
        raise SpecError(f"method: {name} lacks {', '.join(sorted(lacking))}; fedlib/core/method.py says what they do")
    require_mapping(f"hyper of {name}", settings, method.defaults())
    return method(**settings)


def make_writer(method: str, downlink: dict[str, Any]) -> AnyWriter:
    """What a run's `downlink` says. SpecError: a method that cannot write a model, or cannot have it written."""
    require_mapping("downlink", downlink, ("method", "hyper"))
    name = downlink.get("method")
    require_name("downlink.method", name, WRITERS)
    plain = sorted(key for key, other in METHODS.items() if other.plain)
    if method not in plain:
        raise SpecError(f"downlink: {method} has a broadcast of its own; allowed with {', '.join(plain)}")
    settings, writer = downlink.get("hyper", {}), WRITERS[str(name)]
    require_mapping(f"downlink.hyper of {name}", settings, writer.defaults())
    found = writer(**settings)
    found.check_writer()
    return found
