"""Five ways to save bytes in federated learning, small enough to read. Start at `fedlib.runs.rounds`.

For a network and data of your own: `federate` and `compare`, `Codec` for messages alone, `deal`,
`read_partition` and `write_partition` for who holds which samples.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlib.own.codec import Codec
    from fedlib.own.federate import compare, federate
    from fedlib.own.partitions import deal, read_partition, write_partition
    from fedlib.own.results import Comparison, Run

__all__ = ["Codec", "Comparison", "Run", "compare", "deal", "federate", "read_partition", "write_partition"]
HOMES = {
    "codec": ("Codec",),
    "federate": ("compare", "federate"),
    "partitions": ("deal", "read_partition", "write_partition"),
    "results": ("Comparison", "Run"),
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: they bring torch and pandas."""
    for home, names in HOMES.items():
        if name in names:
            return vars(import_module(f"fedlib.own.{home}"))[name]
    raise AttributeError(f"module 'fedlib' has no attribute {name!r}")
