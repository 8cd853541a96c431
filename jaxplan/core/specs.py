"""One declaration per tensor: its start, its sharding and its restore target.

A *spec tree* has the structure of the parameters and a ``TensorSpec`` at each leaf, so
``jax.tree.map`` over it yields whatever a tensor needs before it exists.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

_Container = TypeVar("_Container")
Initializer = Callable[[PRNGKeyArray, tuple[int, ...], DTypeLike], Array]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What is known about a tensor before it exists.

    Attributes:
        shape: its lengths.
        logical_axes: what each axis means; sharding rules map these to mesh axes.
        init: draws its first value, with the signature of ``jax.nn.initializers``.
        dtype: of the master copy.
    """

    shape: tuple[int, ...]
    logical_axes: tuple[str, ...]
    init: Initializer
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.logical_axes):
            raise ValueError(
                f"TensorSpec: shape {self.shape} and logical axes {self.logical_axes} "
                "differ in length; name every axis"
            )


def spec_tree(container: type[_Container], **fields: Any) -> _Container:
    """Put specs where a container of arrays has its arrays.

    Like ``jax.tree.unflatten``, and unlike calling the class, this does not check that
    the leaves are arrays.
    """
    tree = object.__new__(container)
    tree.__dict__.update(fields)
    return tree


def init_tensors(key: PRNGKeyArray, specs: Any) -> Any:
    """Draw the first value of every tensor of a spec tree."""
    leaves, treedef = jax.tree.flatten(specs)
    keys = jax.random.split(key, len(leaves))
    tensors = [
        spec.init(subkey, spec.shape, spec.dtype)
        for spec, subkey in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, tensors)


def abstract_tensors(specs: Any) -> Any:
    """Shape and dtype of every tensor of a spec tree: the target of a restore."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs
    )
