"""Which device holds what: one mesh, and one table of what is split over its axes.

Lanes and packed segments are split over ``data`` and ``fsdp``. A weight is split over
``fsdp``, which gathers a layer when it is needed (fully sharded data parallelism), and
over ``model``, whose devices compute a part of its heads and channels each. All axes
are of type Auto: a program is written for one device, and where a value has to lie is
said in few places. Without a mesh in context (``jax.set_mesh``) nothing here changes a
program.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxplan.config.schema import MeshConfig
from jaxplan.core.specs import TensorSpec

_Function = TypeVar("_Function", bound=Callable[..., Any])

AXES = ("data", "fsdp", "model")
AnyMesh = Mesh | AbstractMesh  # of devices, or of their number alone
WHOLE = PartitionSpec()
LANES = PartitionSpec(("data", "fsdp"))  # of arrays whose first axis is lanes

# What the axes of a ``TensorSpec`` are split over.
RULES = {
    "layers": None,
    "vocab": "model",
    "width": "fsdp",
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "ffn": "model",
    "hidden": "model",
    "rank": None,
}
_MAY_STAY_WHOLE = "vocab"  # tokenizers have any number of ids


def make_mesh(config: MeshConfig) -> Mesh:
    """Arrange the devices there are, those of all processes, as ``config`` says.

    Raises:
        ValueError: there are too few, or a process would have nothing to do.
    """
    devices = jax.devices()
    rest = config.fsdp * config.model
    data = len(devices) // rest if config.data == -1 else config.data
    size = data * rest
    wanted = f"mesh: data={config.data} x fsdp={config.fsdp} x model={config.model}"
    there = f"there are {len(devices)} devices ({devices[0].platform})"
    if size > len(devices) or size == 0 or (config.data == -1 and size < len(devices)):
        raise ValueError(
            f"{wanted} does not fit: {there}; the product must not exceed that, and "
            "with data=-1 fsdp x model must divide it"
        )
    if jax.process_count() > 1 and size < len(devices):
        raise ValueError(
            f"{wanted} takes {size} devices, but {there} in {jax.process_count()} "
            "processes, and every process must take part; use mesh.data=-1"
        )
    return jax.make_mesh(
        (data, config.fsdp, config.model),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:size],
    )


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh of a config without its devices; -1 counts those that are here."""
    rest = config.fsdp * config.model
    data = max(1, jax.device_count() // rest) if config.data == -1 else config.data
    return AbstractMesh(
        (data, config.fsdp, config.model), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def num_shards(mesh: AnyMesh) -> int:
    """How many parts lanes are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def sharding_on(mesh: AnyMesh, spec: PartitionSpec) -> NamedSharding:
    """``spec`` on a mesh, written as compiled programs write it in their results.

    Axes of a single device drop out, and what is not split is not mentioned at the end.
    Otherwise the second call of a program would be compiled anew.
    """

    def part(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        names = (axes,) if isinstance(axes, str) else axes or ()
        kept = tuple(name for name in names if mesh.shape[name] > 1)
        return kept if len(kept) > 1 else next(iter(kept), None)

    parts = [part(axes) for axes in spec]
    while parts and parts[-1] is None:
        parts.pop()
    return NamedSharding(mesh, PartitionSpec(*parts))


def partition_of(spec: TensorSpec, mesh: AnyMesh) -> PartitionSpec:
    """What each axis of a tensor is split over.

    Raises:
        KeyError: an axis that ``RULES`` does not know.
    """
    parts = []
    for name, length in zip(spec.logical_axes, spec.shape, strict=True):
        if name not in RULES:
            raise KeyError(f"core.mesh: no rule for axis '{name}' of a TensorSpec")
        axis = RULES[name]
        odd = name == _MAY_STAY_WHOLE and length % mesh.shape["model"]
        parts.append(None if odd else axis)
    return PartitionSpec(*parts)


def shardings_of(specs: Any, mesh: AnyMesh) -> Any:
    """The sharding of every tensor of a spec tree."""
    return jax.tree.map(lambda spec: sharding_on(mesh, partition_of(spec, mesh)), specs)


def check_tensors(specs: Any, mesh: AnyMesh) -> None:
    """Refuse tensors that the mesh cannot split evenly.

    Raises:
        ValueError: naming every axis that does not divide, and the first such tensor.
    """
    problems: dict[str, str] = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        parts = zip(
            spec.logical_axes, spec.shape, partition_of(spec, mesh), strict=True
        )
        for name, length, axis in parts:
            size = 1 if axis is None else mesh.shape[axis]
            if length % size:
                tensor = jax.tree_util.keystr(path, simple=True, separator=".")
                told = f"mesh.{axis}={size} does not divide {name}={length} of {tensor}"
                problems.setdefault(f"{axis} {name}", told)
    if problems:
        raise ValueError("; ".join(problems.values()))


def constrain(array: Array, *logical_axes: str | None) -> Array:
    """Say what the first axes of a value are split over; the others are whole.

    Inside ``each_shard`` lanes are split already, and only ``model`` is left to say.

    Args:
        array: of a program that is being traced.
        logical_axes: ``"lanes"``, names of ``RULES``, or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    free = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }

    def part(name: str | None) -> tuple[str, ...] | None:
        if name is None:
            return None
        wanted = ("data", "fsdp") if name == "lanes" else (RULES[name],)
        return tuple(axis for axis in wanted if axis is not None and axis in free)

    spec = PartitionSpec(*(part(name) for name in logical_axes))
    return jax.lax.with_sharding_constraint(array, spec)


def split_by_lane(tree: Any) -> Any:
    """Constrain all arrays of a pytree to be split along their first axis."""
    return jax.tree.map(lambda array: constrain(array, "lanes"), tree)


def each_shard(function: _Function, in_specs: Any, out_specs: Any) -> _Function:
    """Let every device run a program on its own lanes, and on no others.

    Nothing is communicated between lanes, whatever the program does with them: a
    maximum over lanes, say, is that of the device's own. What is left to the compiler
    is the axis ``model``. Without a mesh the program runs on all lanes.

    Args:
        function: of pytrees of arrays.
        in_specs: ``LANES`` or ``WHOLE`` for each argument, or pytrees of them.
        out_specs: the same for the result.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={"data", "fsdp"},
        check_vma=False,  # what is made inside counts as equal everywhere
    )


def settle(tree: Any, specs: Any = WHOLE) -> Any:
    """Commit arrays to the mesh in context, or else to the first device.

    A program is compiled once for committed arrays and once for others. A loop whose
    state is settled before its first step compiles its programs once.

    Args:
        tree: of arrays.
        specs: ``LANES`` or ``WHOLE``, or a pytree of them that is a prefix of ``tree``.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree, jax.devices()[0])
    spec_list, prefix = jax.tree.flatten(specs)
    shardings = tuple(sharding_on(mesh, spec) for spec in spec_list)
    return _settler(prefix, shardings)(tree)


@functools.cache
def _settler(prefix: Any, shardings: tuple[NamedSharding, ...]) -> Callable[[Any], Any]:
    """A program for each way to lie, so that the same arrays are traced once."""
    return jax.jit(
        lambda arrays: arrays, out_shardings=jax.tree.unflatten(prefix, shardings)
    )


def to_host(tree: Any) -> Any:
    """The whole of every array, on the host, in every process."""

    def whole(array: Any) -> Any:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return multihost_utils.process_allgather(array, tiled=True)
        return array

    return jax.device_get(jax.tree.map(whole, tree))
