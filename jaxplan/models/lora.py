"""LoRA: low-rank adapters beside weights that stay as they are (arXiv:2106.09685).

A projection x W becomes x W + scale (x A) B. B starts at zero, so a run begins as the
weights without adapters do, bit for bit; and those weights are what leaving the
adapters out gives, so nobody keeps them twice.
"""

import math
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxplan.config.schema import LoraConfig
from jaxplan.core.specs import TensorSpec, spec_tree


@chex.dataclass(frozen=True)
class Adapter:
    """Factors of one projection, in one layer or stacked over all of them."""

    a: Float[Array, "*inputs rank"]
    b: Float[Array, "*rank_and_outputs"]


Adapters = dict[str, Adapter]  # by projection; only the targets are there


def input_axes(projection: str) -> int:
    """How many axes of a layer's projection are its inputs; they come first."""
    return 2 if projection == "attention_out" else 1


def adapter_specs(
    config: LoraConfig, projections: Mapping[str, TensorSpec]
) -> Adapters | None:
    """Declare the adapters of stacked projections; None where LoRA is off.

    Args:
        config: rank and targets.
        projections: by name, [L, *inputs, *outputs] each.
    """
    if not config.rank:
        return None

    def of_projection(name: str) -> Adapter:
        spec, end = projections[name], 1 + input_axes(name)
        shape, axes = spec.shape, spec.logical_axes
        bound = math.prod(shape[1:end]) ** -0.5

        # As PEFT draws it, so that learning rates mean the same.
        def draw(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        a = (*shape[:end], config.rank), (*axes[:end], "rank")
        b = (shape[0], config.rank, *shape[end:]), (axes[0], "rank", *axes[end:])
        return spec_tree(
            Adapter,
            a=TensorSpec(*a, draw),
            b=TensorSpec(*b, jax.nn.initializers.zeros),
        )

    return {name: of_projection(name) for name in config.targets}


def low_rank(
    subscripts: str, x: Float[Array, "..."], adapter: Adapter, scale: float
) -> Float[Array, "..."]:
    """``scale (x A) B``.

    Args:
        subscripts: of the projection itself, such as ``td,dnh->tnh``.
        x: what is projected.
        adapter: of one layer.
        scale: of ``LoraConfig``.
    """
    into, out = subscripts.split(",")[0], subscripts.split("->")[1]
    kept = "".join(axis for axis in into if axis in out)
    inputs, outputs = into.removeprefix(kept), out.removeprefix(kept)
    inner = jnp.einsum(f"{into},{inputs}r->{kept}r", x, adapter.a)
    return scale * jnp.einsum(f"{kept}r,r{outputs}->{out}", inner, adapter.b)
