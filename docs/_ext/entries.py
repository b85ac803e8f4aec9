"""What the API pages say of a name, as Markdown: signature, docstring, place in the source.

Docstrings are Markdown: indented lines are code, $$ is a formula, a line `name: ...` explains an argument.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Container
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = re.compile(r"\b([a-z_][a-z0-9_]*)\b((?: \([^)]*\))?)")
NAMED = re.compile(rf"(?:^|(?<=[.;?]\s)){NAME.pattern}(?:,\s{NAME.pattern})*(?=:\s)", re.M)
SENTENCE = re.compile(r"^(?=(?:Raises|Sources?)\b)", re.M)
URL = re.compile(r"(?<![<(])(https?://[^\s,;)]*[^\s,;).:])")
ARXIV = re.compile(r"\barXiv:(\d{4}\.\d{5})")


def markdown(docstring: str, names: Container[str] | None = ()) -> str:
    """Return a docstring as Markdown that has a line for each argument and links what it cites.

    names: the arguments; None takes any word before a colon for one.
    """

    def bold(match: re.Match[str]) -> str:
        known = all(not aside if names is None else name in names for name, aside in NAME.findall(match[0]))
        return "\0" + NAME.sub(r"**\1**\2", match[0]) if known else match[0]

    lines = []
    for block in re.split(r"\n{2,}", docstring.strip()):
        if not block.startswith((" ", "$$")):
            parts = re.split(r"\s*\0", SENTENCE.sub("\0", NAMED.sub(bold, block)))
            block = "\\\n".join(part for part in parts if part.strip())
            block = re.sub(r"\n +", "\n", block)
            block = URL.sub(r"<\1>", ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", block))
        lines.append(block)
    return "\n\n".join(lines)


def arguments(thing: Any) -> set[str] | None:
    """Return the names of what a function takes, or a class, of whose fields too; None where any name is."""
    fields = set(inspect.get_annotations(thing)) | set(vars(thing)) if inspect.isclass(thing) else set()
    try:
        found = inspect.signature(thing).parameters
    except ValueError:  # exceptions have none
        return fields
    return None if any(one.kind is one.VAR_KEYWORD for one in found.values()) else fields | set(found)


def annotation(value: Any) -> str:
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"ForwardRef\('([^']*)'\)", r"\1", text).replace("typing.", "")


def signature(thing: Any) -> str:
    """Return `(arguments) -> result` as the source has it; empty for what takes none of its own."""
    bare = inspect.isclass(thing) and (issubclass(thing, BaseException) or issubclass(thing, dict))
    if bare or getattr(thing, "_is_protocol", False):
        return ""
    found = inspect.signature(thing)
    parameters = [
        parameter.replace(annotation=parameter.empty)
        if parameter.annotation is parameter.empty
        else parameter.replace(annotation=_Verbatim(annotation(parameter.annotation)))
        for parameter in found.parameters.values()
    ]
    result = found.return_annotation
    shown = str(found.replace(parameters=parameters, return_annotation=found.empty))
    shown = re.sub(r"<(?:factory|object object at \w+)>", "...", shown)
    return shown if inspect.isclass(thing) or result is found.empty else f"{shown} -> {annotation(result)}"


class _Verbatim:
    """An annotation that prints as it was written."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.__module__ = "builtins"

    def __repr__(self) -> str:
        return self.text


def place(thing: Any) -> str:
    """Return where the source of something is, as a link."""
    thing = inspect.unwrap(thing)
    path = Path(inspect.getsourcefile(thing) or "").resolve()
    return f"[source](source:{path.relative_to(ROOT)}#line-{inspect.getsourcelines(thing)[1]})"


def is_module(path: str) -> bool:
    """Whether a dotted path names a module that is there."""
    try:
        return find_spec(path) is not None
    except ModuleNotFoundError:
        return False


@cache
def bindings(module: str) -> dict[str, ast.stmt]:
    """Return the statement that binds each name of a module. Read, not run: TYPE_CHECKING's imports count."""
    spec = find_spec(module)
    if spec is None or not (spec.origin or "").endswith(".py"):
        return {}
    found: dict[str, ast.stmt] = {}
    statements = list(ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8")).body)
    for node in statements:  # grows: what stands under `if` is the module's, too
        if isinstance(node, ast.If):
            statements += [*node.body, *node.orelse]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update({_bound(one): node for one in node.names})
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return found


def _bound(one: ast.alias) -> str:
    return one.asname or one.name.partition(".")[0]


def home(module: str, name: str) -> tuple[str, str]:
    """Return the module that defines a name of a module, and the name there; "" if it names a module."""
    node = bindings(module).get(name)
    if isinstance(node, ast.Import):
        return next(one.name if one.asname else name for one in node.names if _bound(one) == name), ""
    if not isinstance(node, ast.ImportFrom):
        return module, name
    spec = find_spec(module)
    origin = resolve_name("." * node.level + (node.module or ""), spec.parent if spec else None)
    there = next(one.name for one in node.names if _bound(one) == name)
    if not origin.startswith("linattn"):
        return origin, there
    known = (origin, there) != (module, name) and there in bindings(origin)
    return home(origin, there) if known else (f"{origin}.{there}", "")


def alias(module: str, name: str) -> str | None:
    """Return what a name of a module abbreviates in annotations, as the source has it; None if nothing."""
    node = bindings(module).get(name)
    shown = isinstance(node, ast.Assign) and name[:1].isupper() and not name.isupper()
    return ast.unparse(node.value) if isinstance(node, ast.Assign) and shown else None


def own_members(cls: type) -> list[tuple[str, str, Any]]:
    """Return (directive, name, object) of what a class itself defines and documents."""
    members: list[tuple[str, str, Any]] = []
    for name, value in vars(cls).items():
        plain = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if name.startswith("_") or not inspect.getdoc(plain):
            continue
        if isinstance(value, property):
            members.append(("py:property", name, value.fget))
        elif isinstance(plain, FunctionType):
            members.append(("py:method", name, plain))
    return members


def entry(module: str, name: str, remark: str) -> str:
    """Return the Markdown of one name."""
    if (meant := alias(module, name)) is not None:
        return f"::::{{py:type}} {name}\n:canonical: {meant}\n\n{remark}\n::::\n"
    thing = getattr(importlib.import_module(module), name)
    if inspect.ismodule(thing):
        return f"::::{{py:data}} {name}\n:type: module\n\n{remark}\n::::\n"
    if not callable(thing):
        return f"::::{{py:data}} {name}\n:type: {type(thing).__name__}\n\n{remark}\n::::\n"
    kind = "py:function"
    if inspect.isclass(thing):
        kind = "py:exception" if issubclass(thing, BaseException) else "py:class"
    text = [
        f"::::{{{kind}}} {name}{signature(thing)}",
        "",
        markdown(inspect.getdoc(thing) or "", arguments(thing)),
        "",
    ]
    text += [remark, "", place(thing), ""]
    for directive, member, value in own_members(thing) if inspect.isclass(thing) else []:
        head = "" if directive == "py:property" else _without_self(signature(value))
        static = ":staticmethod:\n" if isinstance(vars(thing)[member], staticmethod) else ""
        static = ":classmethod:\n" if isinstance(vars(thing)[member], classmethod) else static
        text += [
            f":::{{{directive}}} {member}{head}",
            static,
            markdown(inspect.getdoc(value) or "", arguments(value)),
            ":::",
            "",
        ]
    return "\n".join([*text, "::::", ""])


def _without_self(text: str) -> str:
    return re.sub(r"^\((self|cls)(, )?", "(", text)
