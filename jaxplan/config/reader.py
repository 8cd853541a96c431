"""From YAML files and the command line to a validated ``RunConfig``, before JAX loads.

Validation is pydantic's. This module adds what pydantic cannot know: the line each key
stands on, the nearest name to a misspelt one, and the traps of YAML 1.1. All mistakes
are reported in one go.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from jaxplan.config.hugging_face import load_hf_shape
from jaxplan.config.mistakes import BASE, Keys, dotted, explain, nearest_file, show
from jaxplan.config.outline import outline, section_at
from jaxplan.config.schema import ModelConfig, RunConfig

Place = tuple[str, int]  # where in the input: a file and a line, 0 for no line

_COMMAND_LINE = "command line"
_TAG = "tag:yaml.org,2002:"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line each."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(self.errors))


@dataclasses.dataclass(frozen=True)
class Flags:
    """What the command line asks for besides the config.

    Attributes:
        resume: go on in a run directory although its config was another.
        fresh: move what the run directory holds aside and begin anew.
        dry_run: tell the memory of every device and do nothing.
        compile: ask the compiler, too.
        device_memory: bytes of a device; None: what the device says.
    """

    resume: bool
    fresh: bool
    dry_run: bool
    compile: bool
    device_memory: int | None


def parse_command_line(
    argv: Sequence[str] | None = None, description: str = ""
) -> tuple[RunConfig, Flags]:
    """Read ``--config FILE key=value ... [--resume | --fresh | --dry-run]``.

    ``--help`` and ``--print-config`` print and exit with 0; mistakes are printed, all
    of them, and exit with 2.

    Args:
        argv: the arguments, by default those of the process.
        description: a sentence for ``--help``.
    """
    parser = _make_parser(description)
    args = parser.parse_intermixed_args(argv)
    if args.help:
        _print_and_exit(f"{parser.format_help()}\nkeys of a config:\n{outline()}")
    if not args.dry_run and (args.compile or args.device_memory is not None):
        parser.error("--compile and --device-memory are for a --dry-run: add it")
    try:
        config = load_config(args.config, args.overrides)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    if args.print_config:
        _print_and_exit(to_yaml(config))
    names = (field.name for field in dataclasses.fields(Flags))
    return config, Flags(**{name: getattr(args, name) for name in names})


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    resolved: bool = False,
) -> RunConfig:
    """Build the config of a run: the defaults, a file's differences, overrides.

    Where ``model.weights`` names a Hugging Face folder, the model has the shape of what
    is there, and ``text.tokenizer``, unless given, is the one that is there. So has a
    critic of its own the shape of what ``ppo.critic.weights`` names.

    Args:
        path: a YAML file; its key ``base`` may name another file, relative to its own
            folder, that it differs from, or a list of files, later ones stronger.
        overrides: ``dotted.key=value`` each, the value as in YAML.
        resolved: the file says all, as that of a run directory does, and the folder of
            the weights need not be there any more.

    Raises:
        ConfigError: naming every mistake with its file, line and key.
    """
    source = _Source()
    if path is not None:
        source.add_file(Path(path))
    for override in overrides:
        source.add_override(override)
    shapes = {} if resolved else source.follow_weights()
    try:
        config = RunConfig(**source.data)
    except ValidationError as error:
        source.refuse_values(error)
    else:
        models: dict[Keys, ModelConfig | None] = {
            ("model",): config.model,
            ("ppo", "critic"): config.ppo.critic,
        }
        for keys, shape in shapes.items():
            source.refuse_other_shapes(keys, models[keys], shape)
    if source.errors:
        raise ConfigError(source.report())
    return config


def to_yaml(config: RunConfig) -> str:
    """Write the whole tree as YAML that reads back to an equal one."""
    return yaml.safe_dump(
        to_jsonable_python(config), sort_keys=False, allow_unicode=True
    )


def differences(first: RunConfig, second: RunConfig) -> list[tuple[str, Any, Any]]:
    """List (dotted key, first's value, second's value) wherever two configs differ."""
    return list(_differences(first, second, ()))


class _Source:
    """Raw data merged over the defaults, where each key was given, and all mistakes."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = to_jsonable_python(RunConfig())
        self.places: dict[Keys, Place] = {}
        self.errors: list[tuple[Place, Keys, str]] = []

    def refuse(self, keys: Keys, message: str, place: Place | None = None) -> None:
        """Note a mistake; without a place, at the nearest key that was given."""
        outwards = (keys[:n] for n in range(len(keys), -1, -1))
        known = (self.places[outer] for outer in outwards if outer in self.places)
        self.errors.append((place or next(known), keys, message))

    def refuse_values(self, error: ValidationError) -> None:
        """Note what pydantic found, except where a mistake is known already."""
        known = {keys for _, keys, _ in self.errors}
        for details in error.errors():
            if details["loc"] not in known:
                self.refuse(details["loc"], explain(details))

    def follow_weights(self) -> dict[Keys, dict[str, Any]]:
        """Take what is not given from the folders that models name as their weights.

        Returns:
            The keys of each model that names one, and its shape there.
        """
        model, ppo, text = (self.data[name] for name in ("model", "ppo", "text"))
        critic = ppo.get("critic") if isinstance(ppo, dict) else None
        shapes: dict[Keys, dict[str, Any]] = {}
        models: dict[Keys, Any] = {("model",): model, ("ppo", "critic"): critic}
        for keys, given in models.items():
            folder = given.get("weights") if isinstance(given, dict) else None
            if isinstance(folder, str):
                shapes[keys] = self._follow(keys, given, folder)
        own = model.get("weights") if isinstance(model, dict) else None
        tokenizer_given = ("text", "tokenizer") in self.places
        if shapes.get(("model",)) and isinstance(text, dict) and not tokenizer_given:
            text["tokenizer"] = own
        return shapes

    def _follow(self, keys: Keys, model: dict[str, Any], folder: str) -> dict[str, Any]:
        try:
            shape = load_hf_shape(folder)
        except (OSError, ValueError) as error:
            for line in str(error).splitlines():
                self.refuse((*keys, "weights"), line)
            return {}
        for key, value in to_jsonable_python(shape).items():
            if (*keys, key) not in self.places:
                model[key] = value
        return shape

    def refuse_other_shapes(
        self, keys: Keys, model: ModelConfig | None, shape: dict[str, Any]
    ) -> None:
        """Note each key that was given and is not so in the weights."""
        for key, value in shape.items():
            given = getattr(model, key)
            if given != value:
                given, own = show(to_jsonable_python(given)), to_jsonable_python(value)
                there = dotted((*keys, "weights"))
                message = f"got {given}, but {there} has {show(own)}"
                self.refuse((*keys, key), f"{message}; leave the key out")

    def report(self) -> list[str]:
        """Write one line for each mistake, in the order of files and lines."""
        lines = []
        for (file, line), keys, message in sorted(self.errors):
            place = f"{file}:{line}" if line else file
            lines.append(": ".join(filter(None, (place, dotted(keys), message))))
        return lines

    def add_file(self, file: Path, is_base: bool = False) -> None:
        """Merge a file over what is there, after the bases that it names."""
        node = self._compose_file(file)
        if node is None:
            return
        data = self._to_data(node, (), str(file))
        if not isinstance(data, dict):
            self.refuse((), "wanted lines of 'key: value'", (str(file), 1))
            return
        base, places = data.pop(BASE, None) or [], dict(self.places)
        bases = base if isinstance(base, list) else [base]
        if all(isinstance(name, str) for name in bases) and not is_base:
            for name in bases:
                self.add_file(file.parent / name, is_base=True)
            self.places |= places  # of two lines, the one in the stronger file
        elif bases:
            wanted = "a base has no base" if is_base else "the name of a file is wanted"
            self.refuse((BASE,), f"{wanted}, got {show(base)}")
        _merge(self.data, data, ())

    def add_override(self, override: str) -> None:
        """Merge one ``dotted.key=value`` of the command line."""
        key, equals, text = override.partition("=")
        keys = tuple(key.split("."))
        if not equals or not all(keys):
            hint = "; a file goes behind --config" if Path(override).exists() else ""
            message = f"wanted key=value, got '{override}'{hint}"
            self.refuse((), message, (_COMMAND_LINE, 0))
            return
        for depth in range(len(keys) + 1):
            self.places[keys[:depth]] = (_COMMAND_LINE, 0)
        node = self._compose(text, _COMMAND_LINE, keys)
        data: Any = node and self._to_data(node, keys, _COMMAND_LINE)
        for part in reversed(keys):
            data = {part: data}
        _merge(self.data, data, ())

    def _compose_file(self, file: Path) -> yaml.Node | None:
        self.places[()] = (str(file), 0)
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            self.refuse((), f"not UTF-8 text at byte {error.start}", (str(file), 0))
        except OSError as error:
            self.refuse((), f"{error.strerror}{nearest_file(file)}", (str(file), 0))
        else:
            known = len(self.errors)
            node = self._compose(text, str(file), ())
            if node is None and len(self.errors) == known:
                return yaml.MappingNode(f"{_TAG}map", [])  # an empty file
            return node
        return None

    def _compose(self, text: str, file: str, keys: Keys) -> yaml.Node | None:
        """Parse YAML into nodes, which know their lines; None where there are none."""
        try:
            for event in yaml.parse(text, yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                    message = "no aliases (*x) and tags (!x): write the value itself"
                    self.refuse(keys, message, _place(file, event.start_mark))
                    return None
            return yaml.compose(text, yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            message = f"not YAML: {error.problem}"
            self.refuse(keys, message, _place(file, error.problem_mark))
        except yaml.YAMLError as error:  # a character that YAML forbids
            reason = str(error).partition("\n")[0]
            self.refuse(keys, f"not YAML: {reason}", (file, 0))
        return None

    def _to_data(self, node: yaml.Node, keys: Keys, file: str) -> Any:
        """Turn nodes into dicts, lists and scalars; note traps and every place."""
        if isinstance(node, yaml.MappingNode):
            return self._to_dict(node, keys, file)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.places[*keys, i] = _place(file, item.start_mark)
            return [
                self._to_data(n, (*keys, i), file) for i, n in enumerate(node.value)
            ]
        trap = _trap(node) if isinstance(node, yaml.ScalarNode) else None
        if trap:
            self.refuse(keys, trap)
            return None
        return yaml.SafeLoader("").construct_object(node)

    def _to_dict(self, node: yaml.MappingNode, keys: Keys, file: str) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = _place(file, key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse(keys, "a key is one word", place)
                continue
            key = key_node.value
            inner = (*keys, key)
            if key in data:
                first_line = self.places[inner][1]
                self.refuse(inner, f"given twice, first on line {first_line}", place)
            self.places[inner] = place
            data[key] = self._to_data(value_node, inner, file)
        return data


def _make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description or None, add_help=False, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of differences from the defaults")
    add("overrides", nargs="*", metavar="key=value", help="such as ppo.gamma=0.98")
    add("-h", "--help", action="store_true", help="show this and every key, and exit")
    add("--print-config", action="store_true", help="print the whole config and exit")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on although the config has changed")
    text = "move what the run directory holds aside and begin anew"
    add("--fresh", action="store_true", help=text)
    add("--dry-run", action="store_true", help="print each device's memory, and exit")
    add = parser.add_argument
    add("--compile", action="store_true", help="in a dry run, ask the compiler as well")
    text = "such as 80GiB: what a device of the dry run has"
    add("--device-memory", type=_to_bytes, metavar="SIZE", help=text)
    return parser


def _to_bytes(text: str) -> int:
    """Read 80GiB, 512MiB or 80GB."""
    units = {"GiB": 2**30, "MiB": 2**20, "TiB": 2**40, "GB": 10**9, "MB": 10**6}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", text)
    if found is None or found[2] not in units:
        raise argparse.ArgumentTypeError(
            f"got '{text}'; wanted a number and one of {', '.join(units)}, as in 80GiB"
        )
    return int(float(found[1]) * units[found[2]])


def _print_and_exit(text: str) -> NoReturn:
    sys.stdout.write(text)
    sys.exit(0)


def _merge(target: dict[str, Any], data: dict[str, Any], keys: Keys) -> None:
    """Put data over target in place; a section left empty changes nothing."""
    for key, value in data.items():
        inner, old = (*keys, key), target.get(key)
        section, nullable = section_at(inner)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value, inner)
        elif value is not None or section is None or nullable:
            target[key] = value


def _trap(node: yaml.ScalarNode) -> str | None:
    """Say what is wrong with an unquoted scalar that YAML 1.1 would misread."""
    text, quoted = node.value, node.style is not None
    if quoted:
        return None
    if _OCTAL.fullmatch(text):
        return f"{text}: a number does not start with 0; quote it if it is a text"
    if ":" in text and node.tag in (f"{_TAG}int", f"{_TAG}float"):
        return f"{text}: YAML counts this in sixties; write the number or quote it"
    if node.tag in (f"{_TAG}timestamp", f"{_TAG}value", f"{_TAG}merge"):
        return f"{text}: quote it, YAML gives it a meaning of its own"
    return None


def _differences(first: Any, second: Any, keys: Keys) -> Iterator[tuple[str, Any, Any]]:
    if dataclasses.is_dataclass(first) and dataclasses.is_dataclass(second):
        for field in dataclasses.fields(first):
            values = getattr(first, field.name), getattr(second, field.name)
            yield from _differences(*values, (*keys, field.name))
    elif first != second:
        yield dotted(keys), first, second


def _place(file: str, mark: yaml.Mark | None) -> Place:
    return file, mark.line + 1 if mark and file != _COMMAND_LINE else 0
