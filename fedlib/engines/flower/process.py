"""A process of a fleet on this machine, which ends with the one that started it, however that ended.

    python -m fedlib.engines.flower.process FOLDER ARGUMENTS...    Flower's SuperLink, with these arguments

Its standard input is a pipe that its parent holds and never writes to: the pipe closes with the parent.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading

from fedlib.engines.flower import extra


def end_with_parent(folder: str = "") -> None:
    """From now on, in a thread; a folder of the fleet goes too."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    folder, *rest = sys.argv[1:]
    end_with_parent(folder)
    extra.prepare()
    os.environ["FLWR_HOME"] = folder
    sys.argv = ["flower-superlink", *rest]
    from fedlib.engines.flower import node_link

    node_link.superlink()


if __name__ == "__main__":
    main()
