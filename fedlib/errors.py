"""The errors that a user can cause and mend. Each message names the field, the value and the remedy."""

from collections.abc import Collection


class FedlibError(Exception):
    """Base class: the command line prints its message without a traceback and exits with status 2."""


class SpecError(FedlibError, ValueError):
    """A run's description is wrong: unknown name, unknown key, value out of range."""


class DataError(FedlibError):
    """A data file is missing, or its bytes are not the expected ones."""


class PayloadError(FedlibError, ValueError):
    """A message cannot be read: truncated, altered, foreign, not finite, or larger than its model allows."""


class RunError(FedlibError, RuntimeError):
    """A run cannot go on: it diverged, a worker died, no such device."""


class Diverged(RunError):
    """A run has no usable update any more. In a search for settings that is a finding."""


def require_number(field: str, value: object, low: float, high: float, *, integer: bool = False) -> None:
    """SpecError unless `value` is a number (not a bool, not text) from `low` to `high`."""
    right = isinstance(value, int) if integer else isinstance(value, int | float)
    if not right or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
        hint = "; it is text: write a number without quotes" if isinstance(value, str) else ""
        kind = "an integer" if integer else "a number"
        raise SpecError(f"{field}: {value!r} must be {kind} from {low:g} to {high:g}{hint}")


def require_name(field: str, value: object, allowed: Collection[str]) -> None:
    """SpecError unless `value` is one of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        raise SpecError(f"{field}: {value!r} is unknown; allowed: {', '.join(sorted(allowed))}")


def require_mapping(where: str, value: object, known: Collection[str]) -> None:
    """SpecError unless `value` is a mapping with no other keys than the known ones."""
    if not isinstance(value, dict):
        raise SpecError(f"{where}: {value!r} must be a mapping")
    for key in value:
        if key not in known:
            raise SpecError(f"{where}: unknown key {key!r}; allowed: {', '.join(sorted(known)) or 'none'}")
