"""The table of methods, and what the shape of a method promises of all of them."""

import inspect
from dataclasses import dataclass
from typing import Any

import pytest

from fedlib.core.method import Method, ModelWriter
from fedlib.errors import SpecError
from fedlib.methods import registry
from fedlib.methods.registry import METHODS, WRITERS
from fedlib.methods.update_codec import UpdateCodec

ABSTRACT = {Method, ModelWriter, UpdateCodec}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_final_and_goes_by_its_own_name(name: str) -> None:
    method = METHODS[name]
    assert method.name == name and not inspect.isabstract(method)
    above = [base for base in method.__mro__[1:] if issubclass(base, Method)]
    assert set(above) <= ABSTRACT and len(above) <= 2


def test_writers_are_those_methods_that_can_write_a_model() -> None:
    assert {name: method for name, method in METHODS.items() if issubclass(method, ModelWriter)} == WRITERS


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_plain_values_with_defaults(name: str) -> None:
    method: Any = METHODS[name]
    assert method().settings == method.defaults()
    assert all(isinstance(value, str | bool | int | float) for value in method.defaults().values())


def test_a_method_that_lacks_a_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Half(UpdateCodec[None]):
        name = "half"
        sections = ("all", "full precision")

    monkeypatch.setitem(METHODS, "half", Half)
    with pytest.raises(SpecError, match=r"^method: half lacks decode, encode; fedlib/core/method\.py"):
        registry.make("half", {})


def test_a_method_without_its_name_or_the_names_of_its_parts_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Nameless(UpdateCodec[None]):
        def encode(self, *arguments: Any) -> Any:
            raise NotImplementedError

        def decode(self, *arguments: Any) -> Any:
            raise NotImplementedError

    monkeypatch.setitem(METHODS, "new", Nameless)
    with pytest.raises(SpecError, match=r"^method: new lacks name, sections; fedlib/core/method\.py"):
        registry.make("new", {})


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(SpecError, match=r"^hyper of topk: unknown key 'k'; allowed: budget$"):
        registry.make("topk", {"k": 3})


def test_a_method_without_a_task_says_so() -> None:
    with pytest.raises(RuntimeError, match="fedmrn is not bound to a task"):
        _ = registry.make("fedmrn", {}).task
