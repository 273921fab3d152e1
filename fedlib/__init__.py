"""Five ways to save bytes in federated learning, small enough to read. Start at `fedlib.runs.rounds`.

For a network and data of your own: `federate` and `compare`, `Codec` for messages alone, `deal`,
`read_partition` and `write_partition` for who holds which samples.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlib.codec import Codec
    from fedlib.data.partition_file import deal, read_partition, write_partition
    from fedlib.own import Comparison, Run, compare, federate

__all__ = ["Codec", "Comparison", "Run", "compare", "deal", "federate", "read_partition", "write_partition"]
HOMES = {"Codec": "codec"} | dict.fromkeys(("deal", "read_partition", "write_partition"), "data.partition_file")


def __getattr__(name: str) -> Any:
    """Imported when asked for: they bring torch and pandas."""
    if name not in __all__:
        raise AttributeError(f"module 'fedlib' has no attribute {name!r}")
    return getattr(import_module(f"fedlib.{HOMES.get(name, 'own')}"), name)
