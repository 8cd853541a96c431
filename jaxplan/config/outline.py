"""What the schema says of itself: its keys, their types and ranges, defaults and units.

The unit is the comment behind a field in the source, so the schema stays readable and
``--help`` cannot drift from it.
"""

import ast
import inspect
import io
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic.fields import FieldInfo

from jaxplan.config.schema import RunConfig

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def section_at(path: tuple[str | int, ...]) -> tuple[Any, bool]:
    """Find the section class a path leads to, and whether null may stand for it.

    Returns:
        (None, False) where the path leads to a single value or to nothing.
    """
    section, nullable = RunConfig, False
    for key in path:
        section, nullable = _as_section(typing.get_type_hints(section).get(str(key)))
        if section is None:
            break
    return section, nullable


def outline() -> str:
    """Write one line for every key: type and range, default, unit."""
    return "\n".join(_lines(RunConfig, RunConfig(), 1)) + "\n"


def to_flow(value: Any) -> str:
    """Write a value as it stands in YAML, on one line."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _lines(section: type, default: Any, depth: int) -> Iterator[str]:
    indent, comments = "  " * depth, _comments(section)
    for key, kind in typing.get_type_hints(section, include_extras=True).items():
        inner, nullable = _as_section(kind)
        value = getattr(default, key)
        if inner is None:
            columns = f"{indent + key:<30} {_describe(kind):<34} {to_flow(value):<14}"
            yield f"{columns} {comments.get(key, '')}".rstrip()
        else:
            summary = (inspect.getdoc(inner) or "").partition("\n")[0]
            yield f"{indent}{key}: {'null, or: ' if nullable else ''}{summary}"
            yield from _lines(inner, value or inner(), depth + 1)


def _as_section(kind: Any) -> tuple[Any, bool]:
    members = typing.get_args(kind) or (kind,)
    inner = next((m for m in members if inspect.isclass(m) and is_dataclass(m)), None)
    return inner, inner is not None and NoneType in members


def _describe(kind: Any) -> str:
    """Name a type for people: ``float >= 0``, ``turn | smdp``, ``[str, ...]``."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        infos = [extra for extra in args[1:] if isinstance(extra, FieldInfo)]
        limits = [limit for info in infos for limit in info.metadata]
        ranges = [
            f"{_SIGNS[name]} {value}"
            for limit in limits
            for name, value in asdict(limit).items()
        ]
        return " ".join([_describe(args[0]), " and ".join(ranges)]).rstrip()
    if origin is Literal:
        return " | ".join(str(choice) for choice in args)
    if origin is tuple:
        items = ["..." if item is Ellipsis else _describe(item) for item in args]
        return f"[{', '.join(items)}]"
    if origin in (Union, UnionType):
        return " | ".join(_describe(member) for member in args)
    return "null" if kind is NoneType else kind.__name__


def _comments(section: type) -> dict[str, str]:
    """Collect the comments behind the fields of a class."""
    source = inspect.getsource(section)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    return {
        node.target.id: by_line[line]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        if line in by_line
    }
