"""Statistics over the entries that count: True in a mask means "counts".

What a masked-out entry holds never matters, be it infinite or NaN, neither to the
value nor to the gradient. A mask without any True gives 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Axis = int | tuple[int, ...] | None


def masked_sum(
    values: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: Axis = None
) -> Float[Array, "..."]:
    """Sum of the values that count, in float32."""
    return jnp.sum(jnp.where(mask, values, 0), axis, dtype=jnp.float32)


def masked_mean(
    values: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: Axis = None
) -> Float[Array, "..."]:
    """Mean of the values that count, in float32."""
    count = jnp.sum(mask, axis, dtype=jnp.float32)
    return masked_sum(values, mask, axis) / jnp.maximum(count, 1)


def or_nan(number: Float[Array, ""], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """The number, or NaN where there was nothing to take it of."""
    return jnp.where(jnp.any(mask), number, jnp.nan)


def masked_std(
    values: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axis: Axis = None
) -> Float[Array, "..."]:
    """Population standard deviation of the values that count, in float32."""
    count = jnp.sum(mask, axis, keepdims=True, dtype=jnp.float32)
    kept = jnp.where(mask, values, 0)
    mean = jnp.sum(kept, axis, keepdims=True, dtype=jnp.float32) / jnp.maximum(count, 1)
    return jnp.sqrt(masked_mean((kept - mean) ** 2, mask, axis))
