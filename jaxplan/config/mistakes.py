"""How a mistake in a config is told: what was given, allowed and probably meant."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from jaxplan.config.outline import section_at, to_flow

BASE = "base"  # the one key of a file that is not a key of the tree
Keys = tuple[str | int, ...]  # where in the tree: ("ppo", "gamma")


def explain(details: ErrorDetails) -> str:
    """Put a finding of pydantic into our words: what was given, what is allowed."""
    if details["type"] == "value_error":  # raised by the schema, in full sentences
        return str(details["ctx"]["error"])
    got = f"got {show(details['input'])}"
    match details["type"]:
        case "unexpected_keyword_argument":
            return _unknown_key(details["loc"])
        case "literal_error":
            expected = details["ctx"]["expected"]
            choices = re.findall(r"'([^']*)'", expected)
            return f"{got}{nearest(details['input'], choices)}; allowed: {expected}"
        case "dataclass_type":
            return f"a section of 'key: value' is wanted, {got}"
        case "tuple_type":
            return f"a list such as [a, b] is wanted, {got}"
        case "string_type":
            return f"a text is wanted, {got}; put quotes around a text"
        case "missing":
            return "missing"
    return f"{details['msg'].removeprefix('Input ')}, {got}"


def _unknown_key(keys: Keys) -> str:
    key = str(keys[-1])
    if "." in key:
        return "unknown key; in a file, sections are nested by indentation"
    section, _ = section_at(keys[:-1])
    names = [field.name for field in dataclasses.fields(section)]
    hint = nearest(key, names if keys[:-1] else [*names, BASE])
    return f"unknown key{hint or '; allowed: ' + ', '.join(names)}"


def nearest(word: Any, words: Iterable[str]) -> str:
    """Ask for the most similar of the words, if one is similar at all."""

    def likeness(other: str) -> tuple[float, int]:
        ratio = difflib.SequenceMatcher(None, other, str(word)).ratio()
        return ratio, len({*other} & {*str(word)})

    best = max(words, key=likeness, default="")
    return f"; did you mean '{best}'?" if likeness(best)[0] >= 0.6 else ""


def nearest_file(file: Path) -> str:
    """Ask for the most similar name in a missing file's folder."""
    folder = file.parent
    if not folder.is_dir():
        return f"; there is no folder '{folder}'"
    return nearest(file.name, [other.name for other in folder.iterdir()])


def show(value: Any) -> str:
    """Write a value as it stands in YAML, texts always in quotes."""
    return f"'{value}'" if isinstance(value, str) else to_flow(value)


def dotted(keys: Keys) -> str:
    """Write keys as people do: ``ppo.gamma``, ``stages[0]``."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return "".join(parts).removeprefix(".")
