"""Checkpoints that are whole, verified and found again; the only door to orbax.

A step is one folder ``<dir>/<step>``, committed by a rename. Orbax loads a flipped bit
without a word and casts to another dtype in silence. Hence the two things added here:
every leaf has a fingerprint, computed on the device from its bits, which is verified
at load; and the leaves of the target are compared with those on disk before loading.
Several processes write and read a step together, each its part, on a shared disk.
Checkpoints are trusted input: the folders are readable by their owner only.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32

from jaxplan.core.processes import any_process, first_alone, is_first

FORMAT = 1  # of what is written here; raise it when an older one cannot be read

PyTree = Any
_Leaves = dict[str, Any]  # key path -> array, or its shape and dtype

# What replicas share out when they write: every part is sliced off by a program of its
# own, and compiling one takes longer than writing a MiB.
_MIN_SLICE_BYTES = 2**20
_DAMAGE = (ValueError, KeyError, TypeError, NotImplementedError, FileNotFoundError)


class CheckpointMismatchError(ValueError):
    """The checkpoint holds other leaves than the program wants."""


class CheckpointDamagedError(Exception):
    """A step cannot be read, or is not what was saved."""


class CheckpointNotSavedError(OSError):
    """A save failed; the earlier steps are intact."""


def save_checkpoint(
    directory: Path | str,
    step: int,
    state: PyTree,
    info: dict[str, Any],
    keep: int = 3,
) -> None:
    """Save a step; return when it is committed, and only then drop the oldest.

    Args:
        directory: where the steps are; made if missing, with mode 0700.
        step: number of the new step; it must not exist yet.
        state: a pytree of jax arrays, typed keys included. Call this before the
            buffers are donated.
        info: small JSON that belongs to the state: counters, best so far.
        keep: how many of the newest steps stay.

    Raises:
        CheckpointNotSavedError: the disk is full, or another failure to write.
        FileExistsError: the step exists.
    """
    directory = Path(directory).resolve()
    first_alone(functools.partial(_make_room, directory, step))
    leaves = _arrays(state)
    header = {
        "format": FORMAT,
        "leaves": {name: _spec(leaf) for name, leaf in _leaves_of(state).items()},
        "fingerprints": _fingerprints(leaves),
        "info": json.loads(json.dumps(info)),  # as it will be read
    }
    try:
        _write(directory / str(step), leaves, header | {"sha256": _digest(header)})
    except Exception as error:
        if is_first():
            sweep_unfinished(directory)
        raise CheckpointNotSavedError(
            _why_not_saved(directory, step, leaves, error)
        ) from error
    if is_first():
        for old in _steps(directory)[:-keep]:
            _remove(directory / str(old))


def save_once(directory: Path | str, state: PyTree) -> None:
    """Save what never changes, or see that it is what was saved before.

    Args:
        directory: where step 0 is, or will be.
        state: as for ``save_checkpoint``; nothing is done for a tree without leaves.

    Raises:
        CheckpointMismatchError: other leaves, or other bits in them, were saved.
    """
    leaves = _arrays(state)
    if not leaves:
        return
    path = Path(directory).resolve() / "0"
    if not path.exists():
        save_checkpoint(directory, 0, state, {})
        return
    header = _read_header(path)
    _compare(path, header["leaves"], {n: _spec(x) for n, x in leaves.items()})
    found, saved = _fingerprints(leaves), header["fingerprints"]
    changed = [name for name, value in found.items() if saved[name] != value]
    if changed:
        raise CheckpointMismatchError(
            f"checkpoint {path}: other bits than now in {_shortened(changed)}; go on "
            "with the weights the run began with, or start in another directory"
        )


def load_checkpoint(
    directory: Path | str, step: int | None, target: PyTree, part: str = ""
) -> tuple[PyTree, dict[str, Any]]:
    """Load a step, or a part of it, verified leaf by leaf.

    Args:
        directory: where the steps are.
        step: the step, or None for the newest good one. Then a damaged step is moved
            aside with a warning and the one before it is tried.
        target: a pytree of arrays or ``jax.ShapeDtypeStruct``: the structure, shapes,
            dtypes and, where given, shardings of the result.
        part: key path of what to load, such as ``learner.params``; the rest of the
            state is neither compared nor read.

    Returns:
        The state, and the ``info`` that was saved with it.

    Raises:
        CheckpointMismatchError: leaves differ from the target's; all are listed.
        CheckpointDamagedError: the given step is damaged, or every step is.
        FileNotFoundError: there is no such step.
    """
    directory = Path(directory).resolve()
    steps = _steps(directory) if step is None else [step]
    if not steps or not (directory / str(steps[-1])).exists():
        raise FileNotFoundError(
            f"{directory}: no checkpoint{'' if step is None else f' of step {step}'}; "
            f"there are {_steps(directory) or 'none'}"
        )
    for candidate in reversed(steps):
        try:
            return _load_step(directory / str(candidate), target, part)
        except CheckpointDamagedError as error:
            if step is not None or candidate == steps[0]:
                raise
            path = directory / str(candidate)
            first_alone(functools.partial(_move_aside, path, error))
    raise AssertionError("unreachable: the last candidate returns or raises")


def latest_step(directory: Path | str) -> int | None:
    """Number of the newest committed step, None without any."""
    return max(_steps(Path(directory)), default=None)


def sweep_unfinished(directory: Path | str) -> None:
    """Remove what killed saves left behind; call it at start-up, under the run lock."""
    for leftover in Path(directory).glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in Path(directory).glob("*.removed"):
        shutil.rmtree(leftover, ignore_errors=True)


def fingerprint(array: Array) -> UInt32[Array, ""]:
    """Sum of all words of an array, each mixed with its position, modulo 2**32.

    Integer sums are exact in any order, so the value does not depend on how the array
    is sharded. It finds errors, not attackers.
    """
    words = _words(array)
    position = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        index = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + index * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(position + jnp.uint32(1))), dtype=jnp.uint32)


def _words(array: Array) -> UInt32[Array, "..."]:
    """View the bits of an array as 32-bit words, narrower elements one a word."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = array.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width]
    return lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Scramble words one to one (the finalizer of MurmurHash3)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


@jax.jit
def _fingerprint_all(leaves: list[Array]) -> UInt32[Array, " leaves"]:
    return jnp.stack([fingerprint(leaf) for leaf in leaves])


def _fingerprints(leaves: _Leaves) -> dict[str, int]:
    if not leaves:
        return {}
    values = jax.device_get(_fingerprint_all(list(leaves.values())))
    return dict(zip(leaves, values.tolist(), strict=True))


def _leaves_of(tree: PyTree) -> _Leaves:
    """Name every leaf by its key path, ``params.layers.0.wq``; refuse what has none."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(
                f"checkpoint: leaf {name} is a {type(leaf).__name__}; "
                "only jax arrays are saved, put plain values into info"
            )
        if name in named:
            raise ValueError(f"checkpoint: two leaves have the key path {name}")
        named[name] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(tree: PyTree) -> _Leaves:
    """What is written: keys as their words, and no empty leaf (orbax refuses one)."""
    plain = {
        name: jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for name, leaf in _leaves_of(tree).items()
    }
    return {name: leaf for name, leaf in plain.items() if math.prod(leaf.shape)}


def _spec(leaf: Any) -> list[Any]:
    return [str(leaf.dtype), list(leaf.shape)]


def _digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _write(path: Path, leaves: _Leaves, header: dict[str, Any]) -> None:
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = _MIN_SLICE_BYTES
    with context:
        ocp.save_checkpointables(str(path), {"state": leaves}, custom_metadata=header)


def _load_step(path: Path, target: PyTree, part: str) -> tuple[PyTree, dict[str, Any]]:
    prefix = f"{part}." if part else ""
    wanted = {prefix + name: leaf for name, leaf in _leaves_of(target).items()}
    header, loaded, problem = {}, {}, None
    try:
        header = _read_header(path)
        saved = {n: s for n, s in header["leaves"].items() if n.startswith(prefix)}
        _compare(path, saved, {name: _spec(x) for name, x in wanted.items()})
        loaded = _read_arrays(path, wanted)
    except CheckpointDamagedError as error:
        problem = error
    if any_process(problem is not None):
        raise problem or CheckpointDamagedError(
            f"checkpoint {path}: damaged, as another process found"
        )
    saved_prints, found = header["fingerprints"], _fingerprints(loaded)
    changed = [name for name, value in found.items() if saved_prints[name] != value]
    if changed:
        raise CheckpointDamagedError(
            f"checkpoint {path}: damaged, other bits than were saved in "
            f"{_shortened(changed)}"
        )
    leaves = [_as_wanted(loaded.get(name), leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), header["info"]


def _read_header(path: Path) -> dict[str, Any]:
    import orbax.checkpoint.experimental.v1 as ocp

    with _damage_named(path):
        metadata: Any = ocp.metadata(str(path), "state").custom_metadata
        header = dict(metadata)
        digest = header.pop("sha256")
    if digest != _digest(header):
        raise CheckpointDamagedError(f"checkpoint {path}: damaged header")
    if header["format"] != FORMAT:
        raise CheckpointMismatchError(
            f"checkpoint {path}: format {header['format']}, this program reads "
            f"{FORMAT}; load it with the version that wrote it"
        )
    return header


def _read_arrays(path: Path, wanted: _Leaves) -> _Leaves:
    import orbax.checkpoint.experimental.v1 as ocp

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def plain(leaf: Any) -> jax.ShapeDtypeStruct:
        words = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        sharding = leaf.sharding or default  # of keys: their words are the last axis
        return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)

    targets = {
        name: plain(leaf) for name, leaf in wanted.items() if math.prod(leaf.shape)
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # leaves were compared; read these only
    with _damage_named(path), context:
        return ocp.load_checkpointables(str(path), {"state": targets})["state"]


def _as_wanted(loaded: Array | None, wanted: Any) -> Array:
    if loaded is None:  # an empty leaf, of which nothing was written
        return jnp.zeros(wanted.shape, wanted.dtype, device=wanted.sharding)
    if not _is_key(wanted):
        return loaded
    return jax.random.wrap_key_data(loaded, impl=_key_impl(wanted))


def _key_impl(wanted: Any) -> Any:
    """The generator behind a key's dtype, from an empty key array of that dtype."""
    return jax.random.key_impl(jnp.zeros((0,), wanted.dtype))


def _compare(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """List every leaf in which checkpoint and program differ."""

    def words(spec: list[Any] | None) -> str:
        return "missing" if spec is None else f"{spec[0]}{spec[1]}"

    lines = [
        f"  {name}: saved {words(saved.get(name))}, wanted {words(wanted.get(name))}"
        for name in saved | wanted
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        shown = lines[:40]
        rest = [f"  and {len(lines) - 40} more"] if len(lines) > 40 else []
        raise CheckpointMismatchError(
            "\n".join(
                [
                    f"checkpoint {path}: {len(lines)} of {len(saved | wanted)} leaves "
                    "differ; nothing was loaded",
                    *shown,
                    *rest,
                    "Use the config it was made with, or start in another directory.",
                ]
            )
        )


@contextlib.contextmanager
def _damage_named(path: Path) -> Generator[None]:
    """Say in one line which step is damaged and why; orbax hides it in the cause."""
    try:
        yield
    except _DAMAGE as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0][:200]
        raise CheckpointDamagedError(
            f"checkpoint {path}: damaged ({type(cause).__name__}: {reason})"
        ) from error


def _steps(directory: Path) -> list[int]:
    """Committed steps, oldest first: orbax gives a folder its number at the end."""
    if not directory.exists():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def _make_room(directory: Path, step: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    if (directory / str(step)).exists():
        raise FileExistsError(f"{directory}: step {step} exists; steps are not redone")


def _remove(path: Path) -> None:
    """Delete a step so that a kill in between leaves no half of it under its name."""
    gone = path.with_name(f"{path.name}.removed")
    os.replace(path, gone)
    shutil.rmtree(gone)


def _move_aside(path: Path, error: CheckpointDamagedError) -> None:
    number = len(list(path.parent.glob(f"{path.name}.damaged-*"))) + 1
    aside = path.with_name(f"{path.name}.damaged-{number}")
    os.replace(path, aside)
    warnings.warn(
        f"{error}; moved to {aside.name}, going on from the step before", stacklevel=2
    )


def _why_not_saved(
    directory: Path, step: int, leaves: _Leaves, error: Exception
) -> str:
    needed = sum(leaf.nbytes for leaf in leaves.values()) / 2**20
    free = shutil.disk_usage(directory).free / 2**20
    reason = str(error).strip().partition("\n")[0][:200]
    return (
        f"{directory}: step {step} was not saved, earlier steps are intact "
        f"({type(error).__name__}: {reason}); it needs about {needed:,.0f} MiB, "
        f"{free:,.0f} MiB are free"
    )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
