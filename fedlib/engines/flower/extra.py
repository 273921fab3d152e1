"""Flower, where it is installed: made quiet before it is loaded, and never loaded for anything else.

Nothing that other engines use imports Flower, and Flower's own settings say it all by environment variables.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os

from fedlib.errors import RunError

VERSION = "1.42.0"  # as in pyproject.toml: releases move ports and protocols
# No use statistics, no question for updates, nothing installed because a run asks for it.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def prepare() -> None:
    """Before a module is imported that imports Flower. RunError: Flower is not here, or is another one."""
    try:
        found = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != VERSION:
        raise RunError(
            f"engine: flower needs Flower {VERSION}, here is {found}: it is the extra `fleet`, with an environment of "
            "its own; run make fleet, then .venv-fleet/bin/python -m fedlib ..."
        )
    os.environ.update(QUIET)
    for name in ("flwr", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.ERROR)


def without_proxy(environment: dict[str, str]) -> dict[str, str]:
    """The same, in which what goes to this machine takes no way around."""
    left_out = ",".join(filter(None, (environment.get("no_proxy") or environment.get("NO_PROXY"), "127.0.0.1")))
    return environment | {"no_proxy": left_out, "NO_PROXY": left_out}
