"""Five ways to save bytes in federated learning, small enough to read. Start at `fedlib.runs.rounds`.

`fedlib.federate` and `fedlib.compare` take a network and data of your own.
"""

from typing import Any

__all__ = ["Comparison", "Run", "compare", "federate"]


def __getattr__(name: str) -> Any:
    """Imported when asked for, since it brings torch and pandas."""
    if name in __all__:
        from fedlib import own

        return getattr(own, name)
    raise AttributeError(f"module 'fedlib' has no attribute {name!r}")
