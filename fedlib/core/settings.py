"""The settings of a method: fields of its dataclass that know which values they may have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fedlib.errors import SpecError, require_name, require_number


def number(default: float, low: float, high: float) -> Any:
    """A field with a number from `low` to `high`."""
    return _field(default, lambda name, value: require_number(name, value, low, high))


def integer(default: int, low: int, high: int) -> Any:
    """A field with an integer from `low` to `high`."""
    return _field(default, lambda name, value: require_number(name, value, low, high, integer=True))


def choice(default: str, *others: str) -> Any:
    """A field with one of these names."""
    return _field(default, lambda name, value: require_name(name, value, {default, *others}))


def switch(default: bool) -> Any:
    """A field that is true or false."""

    def check(name: str, value: object) -> None:
        if not isinstance(value, bool):
            raise SpecError(f"{name}: {value!r} must be true or false")

    return _field(default, check)


def check_settings(settings: Any) -> None:
    """SpecError names the first field of a dataclass, its value and what is allowed."""
    for field in dataclasses.fields(settings):
        if check := field.metadata.get("check"):
            check(f"hyper.{field.name}", vars(settings)[field.name])


def _field(default: Any, check: Callable[[str, object], None]) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})
