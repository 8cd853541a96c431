"""Folders of safetensors: what is in them, what is wrong with them, writing them.

Reading looks at headers first and then takes one tensor at a time; writing sends every
tensor to its place as it comes. Neither holds more than one tensor.
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp  # with bfloat16, which numpy lacks
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as they spell them

_LAYER = re.compile(r"\.(\d+)\.")
_IGNORED = "rotary_emb.inv_freq"  # older folders hold it; it follows from config.json

Shape = tuple[int, ...]
Problem = tuple[str, str]  # a tensor or file, and what is wrong with it


class Found(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: Path
    shape: Shape
    dtype: str


def check_tensors(
    folder: Path, expected: Mapping[str, Shape], file: str | None = None
) -> dict[str, Path]:
    """Compare the tensors of a folder with those wanted; only headers are read.

    Args:
        folder: with ``model*.safetensors``, and an index if there are several.
        expected: name and shape of every tensor.
        file: one file of the folder to look into instead.

    Returns:
        The file that holds each tensor.

    Raises:
        ValueError: tensors are missing, superfluous, misshapen, there twice or of
            another dtype, or the index disagrees with the files; all are listed, the
            layers of a model on one line.
    """
    problems: list[Problem] = []
    found = _read_header(folder / file, problems) if file else _scan(folder, problems)
    for name in sorted(expected.keys() - found.keys()):
        problems.append((name, f"missing, expected {expected[name]}"))
    for name, tensor in found.items():
        if name not in expected:
            problems.append((name, f"not a tensor of this model ({tensor.file.name})"))
            continue
        if tensor.shape != expected[name]:
            wanted = expected[name]
            problems.append((name, f"shape {tensor.shape}, expected {wanted}"))
        if tensor.dtype not in DTYPES.values():
            known = ", ".join(DTYPES.values())
            problems.append((name, f"dtype {tensor.dtype}; only {known} are read"))
    if problems:
        lines = "\n  ".join(_one_line_for_all_layers(problems))
        raise ValueError(f"{folder}: the tensors do not fit:\n  {lines}")
    return {name: tensor.file for name, tensor in found.items()}


def read_tensor(file: Path, name: str) -> np.ndarray:
    """Read one tensor; its file is not kept open, nor mapped into memory."""
    with safe_open(file, framework="numpy") as tensors:
        return tensors.get_tensor(name)


def write_shards(
    folder: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[np.ndarray],
    dtype: str,
    shard_bytes: int,
) -> None:
    """Write ``model.safetensors``, or shards and the index that names them.

    Args:
        folder: where to; it exists.
        shapes: of every tensor.
        tensors: in the same order, taken one by one.
        dtype: of all of them, one of ``DTYPES``.
        shard_bytes: what a file may hold; a larger tensor gets a file of its own.
    """
    shards = _split(shapes, jnp.dtype(dtype).itemsize, shard_bytes)
    count, coming = len(shards), iter(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        several = f"model-{number:05}-of-{count:05}.safetensors"
        file = several if count > 1 else "model.safetensors"
        _write_shard(
            folder / file, {name: shapes[name] for name in shard}, coming, dtype
        )
        weight_map |= dict.fromkeys(shard, file)
    if count > 1:
        total = (
            sum(math.prod(shape) for shape in shapes.values())
            * jnp.dtype(dtype).itemsize
        )
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _scan(folder: Path, problems: list[Problem]) -> dict[str, Found]:
    """Read every header, and see whether the index tells the truth."""
    present = {file.name for file in folder.glob("model*.safetensors")}
    index = _read_index(folder, problems)
    named = present if index is None else set(index.values())
    if not named:
        problems.append(("model*.safetensors", "there is none; no other kind is read"))
    problems += [(file, "not in the index") for file in sorted(present - named)]
    found: dict[str, Found] = {}
    for file in sorted(named):
        for name, tensor in _read_header(folder / file, problems).items():
            if name in found:
                both = f"{found[name].file.name} and {file}"
                problems.append((name, f"there twice, in {both}"))
            found[name] = tensor
    for name, file in (index or {}).items():
        if name in found and found[name].file.name != file:
            problems.append(
                (name, f"in {found[name].file.name}, the index says {file}")
            )
    if index is not None:
        for name in found.keys() - index.keys():
            problems.append((name, f"in {found[name].file.name}, but not in the index"))
    return {name: t for name, t in found.items() if not name.endswith(_IGNORED)}


def _read_index(folder: Path, problems: list[Problem]) -> dict[str, str] | None:
    file = folder / INDEX
    if not file.exists():
        return None
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(shard).name for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append((INDEX, f"not an index ({type(error).__name__}: {error})"))
        return None


def _read_header(file: Path, problems: list[Problem]) -> dict[str, Found]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: Found(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in parts.items()
            }
    except FileNotFoundError:
        problems.append((file.name, "in the index, but not in the folder"))
    except (SafetensorError, OSError) as error:
        problems.append((file.name, f"cannot be read: {error}"))
    return {}


def _one_line_for_all_layers(problems: list[Problem]) -> list[str]:
    layers: dict[Problem, list[int]] = {}
    for name, what in problems:
        number = _LAYER.search(name)
        group = layers.setdefault((_LAYER.sub(".*.", name), what), [])
        group += [int(number[1])] if number else []
    return [
        f"{name.replace('*', _ranges(numbers), 1) if numbers else name}: {what}"
        for (name, what), numbers in layers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Write numbers as people do: ``{0-3,7}``; one alone without braces."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if run[1:] else f"{run[0]}" for run in runs]
    text = ",".join(texts)
    return text if text.isdigit() else f"{{{text}}}"


def _split(shapes: Mapping[str, Shape], width: int, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        needed = math.prod(shape) * width
        if shards[-1] and size + needed > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    return shards


def _write_shard(file, shapes, tensors, dtype) -> None:
    """The library writes a file at once; a header and then the bytes is the format."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            tensor = next(tensors)
            if tensor.shape != shape or tensor.dtype.name != dtype:
                raise AssertionError(f"{tensor.dtype}{tensor.shape}, wanted {shape}")
            tensor.tofile(out)
