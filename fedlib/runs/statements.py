"""The top-level statements of a package: what each says, what it binds, and what it reaches.

A statement's text is that of its syntax tree, without imports, docstrings and annotations, and without a module's name
before what comes from it: equal for equal code, wherever it stands and however it is laid out, on every Python.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

EMPTY = "Constant(value='')"  # which Python 3.12 adds to formats


class Place(NamedTuple):
    """A top-level name; or a module, where `name` is empty."""

    module: str
    name: str = ""


@dataclass(frozen=True)
class Statement:
    """At the top level of a module."""

    module: str
    lines: range
    text: str  # canonical: equal for equal code
    binds: frozenset[str]  # names at the top level of its module
    reaches: frozenset[Place]


class Source:
    """A package's modules, each read when it is first asked for, and not again."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.known: dict[str, tuple[list[Statement], dict[str, Place]]] = {}

    def read(self, module: str) -> tuple[list[Statement], dict[str, Place]]:
        """As `parsed`; nothing of what is no module of the package."""
        if module not in self.known:
            file = source_of(module, self.package)
            text = file.read_text(encoding="utf-8") if file.exists() else None
            self.known[module] = ([], {}) if text is None else parsed(module, text, modules_of(self.package))
        return self.known[module]

    def resolved(self, place: Place) -> Place:
        """Where a name that a module only hands on comes from."""
        _, imports = self.read(place.module)
        return self.resolved(imports[place.name]) if place.name in imports else place

    def found(self, place: Place) -> Iterator[Statement]:
        """The statements behind a place, and those of its module that bind no name, since they run in any case."""
        statements, _ = self.read(place.module)
        for statement in statements:
            if not place.name or place.name in statement.binds or not statement.binds:
                yield statement


def source_of(module: str, package: Path) -> Path:
    file = package.parent.joinpath(*module.split("."))
    return file / "__init__.py" if file.is_dir() else file.with_suffix(".py")


@functools.lru_cache(maxsize=8)
def modules_of(package: Path) -> frozenset[str]:
    """Dotted names of all modules and packages."""
    files = (file.relative_to(package.parent).with_suffix("") for file in package.rglob("*.py"))
    return frozenset(".".join(file.parts).removesuffix(".__init__") for file in files)


@functools.cache
def parsed(module: str, source: str, modules: frozenset[str]) -> tuple[list[Statement], dict[str, Place]]:
    """The statements of a module, and what it imports from fedlib, by the name that it has there."""
    tree = ast.parse(source)
    imports = dict(_imported(tree, modules))
    statements = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) or _is_text(node) or _for_types(node):
            continue
        reader = _Reader(module, imports)
        text = reader.text(node)
        first = min([node.lineno, *(d.lineno for d in _decorators(node))])
        binds = frozenset(_bound([node]))
        lines = range(first, (node.end_lineno or first) + 1)
        statements.append(Statement(module, lines, text, binds, frozenset(reader.reaches)))
    return statements, imports


def _imported(tree: ast.AST, modules: frozenset[str]) -> Iterator[tuple[str, Place]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fedlib":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (
                    alias.asname or alias.name,
                    Place(inner) if inner in modules else Place(node.module, alias.name),
                )


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _decorators(node: ast.AST) -> list[ast.expr]:
    return node.decorator_list if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else []


def _bound(body: Iterable[ast.AST]) -> Iterator[str]:
    """Names that statements bind where they stand; not those within functions and classes among them."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            continue
        if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        yield from _bound(ast.iter_child_nodes(node))


class _Reader:
    """Writes a statement as text, and notes what it reaches."""

    LEFT_OUT = frozenset({"ctx", "kind", "type_comment"})

    def __init__(self, module: str, imports: dict[str, Place]) -> None:
        self.module, self.imports = module, imports
        self.local: list[set[str]] = []  # names that each enclosing function binds
        self.reaches: set[Place] = set()

    def text(self, node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return self.name(node.id) if isinstance(node.ctx, ast.Load) else f"Name({node.id})"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            target = self.target(node.value.id)
            if target and not target.name:  # of a module: the module's own name does not count
                self.reaches.add(Place(target.module, node.attr))
                return f"Name({node.attr})"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return self.function(node)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            self.local.append(set(_bound(node.generators)))
            try:
                return self.plain(node)
            finally:
                self.local.pop()
        return self.plain(node)

    def target(self, name: str) -> Place | None:
        return None if any(name in names for names in self.local) else self.imports.get(name)

    def name(self, name: str) -> str:
        if not any(name in names for names in self.local):
            place = self.imports.get(name) or Place(self.module, name)
            self.reaches.add(place)
            name = place.name or place.module.rpartition(".")[2]
        return f"Name({name})"

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> str:
        own = node.args
        kinds = [own.posonlyargs, own.args, own.kwonlyargs, [a for a in (own.vararg, own.kwarg) if a]]
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        outer = [self.text(d) if d else "-" for d in (*_decorators(node), *own.defaults, *own.kw_defaults)]
        outside = {name for part in ast.walk(node) if isinstance(part, ast.Global) for name in part.names}
        self.local.append({a.arg for kind in kinds for a in kind} | set(_bound(body)) - outside)
        try:
            inner = [self.text(part) for part in self.body(body)]
        finally:
            self.local.pop()
        names = ";".join(",".join(a.arg for a in kind) for kind in kinds)
        name = "" if isinstance(node, ast.Lambda) else node.name
        return f"{type(node).__name__}({name};{names};{len(own.defaults)};{outer}{inner})"

    def body(self, nodes: Iterable[ast.AST]) -> list[ast.AST]:
        return [
            n
            for n in nodes
            if not (isinstance(n, ast.Import | ast.ImportFrom) or (isinstance(n, ast.stmt) and _is_text(n)))
        ]

    def plain(self, node: ast.AST) -> str:
        fields = []
        for field, value in ast.iter_fields(node):
            if field in self.LEFT_OUT or value is None or value == []:
                continue
            if field == "annotation":  # all that matters of it: whether it makes a field of a class
                value = "ClassVar" in ast.unparse(value)
            elif isinstance(value, ast.AST):
                value = self.text(value)
            elif isinstance(value, list):
                parts = [self.text(part) if isinstance(part, ast.AST) else repr(part) for part in self.body(value)]
                value = [part for part in parts if part != EMPTY] if isinstance(node, ast.JoinedStr) else parts
            else:
                value = repr(value)
            fields.append(f"{field}={value}")
        return f"{type(node).__name__}({', '.join(fields)})"
