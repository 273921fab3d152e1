"""Descriptions that come from outside, checked by pydantic: a SpecError names field, value and what is allowed."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from fedlib.errors import FedlibError, SpecError

T = TypeVar("T")

# One rule for all names that a file of the user's gives: many become part of a record's file name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]

WORDS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "model_attributes_type": "must be a mapping",
    "model_type": "must be a mapping",
    "string_pattern_mismatch": "must be made of letters, digits, '.', '-' and '_', the first a letter or a digit",
    "string_type": "must be text",
}


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, integers where the type is int. They stay as they are written: 1 is not made 1.0."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kind: CoreSchema = core_schema.float_schema(ge=self.low, le=self.high, allow_inf_nan=False, strict=True)
        words = f"must be a number from {self.low:g} to {self.high:g}"
        if source is int:
            kind = core_schema.int_schema(ge=int(self.low), le=int(self.high), strict=True)
            words = words.replace("a number", "an integer")
        hint = "; it is text: write a number without quotes"
        return _kept(kind, lambda value: words + hint if isinstance(value, str) else words)


@dataclass(frozen=True)
class OneOf:
    """Names out of a table, which may get more of them while the program runs."""

    table: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def known(value: Any) -> Any:
            if not isinstance(value, str) or value not in self.table:
                raise wrong(f"is unknown; allowed: {', '.join(sorted(self.table))}")
            return value

        names = core_schema.literal_schema(sorted(self.table))
        return core_schema.no_info_plain_validator_function(known, json_schema_input_schema=names)


@dataclass(frozen=True)
class Like:
    """Mappings with the fields of a model, which stay mappings."""

    model: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _kept(handler.generate_schema(self.model))


def _kept(kind: CoreSchema, words: Callable[[Any], str] | None = None) -> CoreSchema:
    """Accepts what `kind` does and leaves it as it is; what is wrong is said in these words, or in pydantic's."""

    def checked(value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            check(value)
        except ValidationError:
            if words is None:
                raise
            raise wrong(words(value)) from None
        return value

    return core_schema.no_info_wrap_validator_function(checked, kind)


def wrong(words: str, kind: str = "wrong") -> PydanticCustomError:
    """What a validator raises; the field and the value come before these words."""
    return PydanticCustomError(kind, "{words}", {"words": words})


class Table(BaseModel):
    """A mapping with known keys."""

    model_config = ConfigDict(extra="forbid", strict=True)
    free: ClassVar[str] = ""  # beginning of the keys that are allowed besides

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, value: Any) -> Any:
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields and not (cls.free and str(key).startswith(cls.free)):
                raise wrong(f"unknown key {key!r}; allowed: {', '.join(sorted(cls.model_fields))}", "key")
        return value


def message(error: ValidationError, data: Any, where: str = "") -> str:
    """One line on the first thing that is wrong with `data`; `where` is its file."""
    first = error.errors(include_url=False)[0]
    kind, value, more = first["type"], first["input"], first.get("ctx", {})
    path: list[str] = []
    for step in first["loc"]:  # between those of the data stand pydantic's own, such as the branch of a union
        if isinstance(data, dict) and step in data:
            path, data = [*path, str(step)], data[step]
        elif isinstance(data, list) and isinstance(step, int):
            data = data[step]
            path.append(str(data.get("id", step) if isinstance(data, dict) else step))
    if kind == "missing":
        path.append(str(first["loc"][-1]))
    if "discriminator" in more:
        path.append(more["discriminator"].strip("'"))
    place = ": ".join(filter(None, [where, ".".join(path)]))
    if kind in ("missing", "union_tag_not_found"):
        return f"{place} not given"
    if kind == "union_tag_invalid":
        value, said = more["tag"], f"is unknown; allowed: {more['expected_tags']}".replace("'", "")
    elif "error" in more and isinstance(more["error"], FedlibError):
        said = str(more["error"])
    else:
        said = WORDS.get(kind) or re.sub(r"^\w+ should", "must", first["msg"])
    if kind == "string_type" and isinstance(value, int | float):
        said += "; put it in quotes"
    if kind not in ("key", "value_error"):
        said = f"{shortened(value)} {said}"
    return f"{place}: {said}" if place else said


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def raising_spec_errors(cls: type[T]) -> type[T]:
    """Let a pydantic dataclass say what is wrong by a SpecError."""
    made = cls.__init__

    @functools.wraps(made)
    def init(self: Any, **fields: Any) -> None:
        try:
            made(self, **fields)
        except ValidationError as error:
            raise SpecError(message(error, fields)) from None

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@functools.lru_cache(maxsize=32)
def _loaded(text: str) -> Any:
    """What YAML says; reading it takes longest of all."""
    return YAML(typ="safe", pure=True).load(text)


def read(path: Path, model: type[Table]) -> dict[str, Any]:
    """A YAML file as it is written, once it is known to fit the model. SpecError: file, key and, if known, the line."""
    where = f"{path.parent.name}/{path.name}"
    try:
        content: dict[str, Any] = copy.deepcopy(_loaded(path.read_text(encoding="utf-8")))
        model.model_validate(content)
    except ValidationError as error:
        raise SpecError(message(error, content, where)) from None
    except MarkedYAMLError as error:
        twice = re.match(r'found duplicate key "?(.*?)"? with value', str(error.problem), re.DOTALL)
        said = f"{twice[1]!r} is given twice; each needs its own name" if twice else f"cannot be read: {error.problem}"
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise SpecError(f"{where}: {line}{said}") from error
    except (OSError, ValueError, YAMLError) as error:
        raise SpecError(f"{where}: cannot be read: {error}") from error
    return content


def schema(model: type[Table]) -> dict[str, Any]:
    """The JSON schema by which an editor completes and checks such a file."""
    return model.model_json_schema(schema_generator=_Plain)


class _Plain(GenerateJsonSchema):
    """Without titles of fields and defaults that only stand for a key's absence; a mapping with no other names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"]) if schema["default"] is None else super().default_schema(schema)

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        found = super().dict_schema(schema)
        return found | {"additionalProperties": False} if "patternProperties" in found else found
