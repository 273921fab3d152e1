"""Many runs at once, each whole in a process of its own: the fastest way through a grid on a CPU.

A record does not depend on where its run took place, so these are the records of runs one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlib.engines.in_process import Engine, InProcess
from fedlib.engines.pool import Pool
from fedlib.errors import DataError, Diverged, RunError
from fedlib.runs import rounds
from fedlib.runs.record import Record
from fedlib.runs.spec import Spec

log = logging.getLogger("fedlib")


def run_all(
    specs: Sequence[Spec], processes: int, *, root: Path | None = None, again: bool = False
) -> Iterator[Record | RunError]:
    """Records in the order of the specs, or why there is none; what has no fresh one (or is asked for again) is
    trained, and saved.

    Put long runs first. One that fails (most of all: diverges) does not stop the others; what `attempt` raises does.
    Records and checkpoints that were saved stay.
    """
    if not specs:
        return
    with Pool(min(processes, len(specs))) as pool:
        for found in pool.call(_run, [(spec.as_dict(), root, again) for spec in specs]):
            if isinstance(found, tuple):  # an exception would be raised on its way here
                diverged, why = found
                yield Diverged(why) if diverged else RunError(why)
            else:
                yield found


def attempt(spec: Spec, engine: Engine, *, root: Path | None = None, again: bool = False) -> Record | RunError:
    """The record of one run, trained where there is no fresh one; or why there is none. Raises DataError alone, which
    would end the other runs too."""
    try:
        return rounds.load_or_run(spec, engine, root=root, again=again)
    except DataError:
        raise
    except RunError as error:
        return error
    except Exception as error:  # a fault of this run, whatever it is
        log.debug("%s", spec.name, exc_info=True)
        return RunError(f"{spec.name}: {type(error).__name__}: {error}"[:500])


def _run(engine: InProcess, values: dict[str, Any], root: Path | None, again: bool) -> Record | tuple[bool, str]:
    found = attempt(Spec.from_dict(values), engine, root=root, again=again)
    return (isinstance(found, Diverged), str(found)) if isinstance(found, RunError) else found
