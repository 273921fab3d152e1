"""The reference of fedlib's functions and classes, from their source: signature, docstring, fields with comments."""

from __future__ import annotations

import ast
import html
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

from IPython.display import HTML

ROOT = Path(__file__).parents[2]


def path(module: str) -> Path:
    """The source of a module, by its dotted name."""
    stem = ROOT.joinpath(*module.split("."))
    return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")


def module(name: str) -> HTML:
    """A module as the pages show it: what its head says, then each public function and class."""
    source = path(name).read_text(encoding="utf-8")
    tree = ast.parse(source)
    comments = dict(_comments(source))
    entries = (_entry(node, name, comments) for node in tree.body if _public(node))
    return HTML(f"{_prose(ast.get_docstring(tree))}<dl>{''.join(entries)}</dl>".replace("<dl></dl>", ""))


def _public(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def _entry(node: ast.AST, prefix: str, comments: dict[int, str]) -> str:
    """A function; or a class with its fields and methods."""
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    name = f"{prefix}.{node.name}"
    if isinstance(node, ast.FunctionDef):
        head, body = f"{node.name}{_signature(node)}", _prose(ast.get_docstring(node))
    else:
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        head, body = f"class {node.name}" + (f"({bases})" if bases else ""), _prose(ast.get_docstring(node))
        fields = [_field(part, comments) for part in node.body if isinstance(part, ast.AnnAssign)]
        body += f"<ul>{''.join(fields)}</ul>" if fields else ""
        methods = [_entry(part, name, comments) for part in node.body if _public(part)]
        body += f"<dl>{''.join(methods)}</dl>" if methods else ""
    return f'<dt id="{name}"><code>{html.escape(head)}</code></dt><dd>{body}</dd>'


def _signature(node: ast.FunctionDef) -> str:
    return f"({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def _field(node: ast.AnnAssign, comments: dict[int, str]) -> str:
    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    said = " ".join(comments[line] for line in lines if line in comments)
    return f"<li><code>{html.escape(ast.unparse(node))}</code>{f': {_inline(said)}' if said else ''}</li>"


def _inline(text: str) -> str:
    return re.sub(r"(`+)(.+?)\1", r"<code>\2</code>", html.escape(text, quote=False), flags=re.DOTALL)


def _prose(docstring: str | None) -> str:
    """Paragraphs; what is indented or aligned stays as it is."""
    blocks = re.split(r"\n\s*\n", docstring) if docstring else []
    return "".join(
        f"<pre>{html.escape(textwrap.dedent(block))}</pre>"
        if re.search(r"^\s|   ", block, re.M)
        else f"<p>{_inline(block)}</p>"
        for block in blocks
    )
