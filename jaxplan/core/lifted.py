"""What stays one number for all when ``vmap`` lifts a program."""

import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int


@custom_vmap
def overall_max(counts: Int[Array, "*axes"]) -> Int[Array, ""]:
    """The largest entry, of all members of every ``vmap`` around it as well.

    It is for the number of turns of a loop that idles where there is nothing left to
    do: were it a number for each member, ``vmap`` would run the loop just as often, and
    copy all that it carries for each member that is done (``jax.lax.while_loop``).
    """
    return jnp.max(counts)


@overall_max.def_vmap
def _(axis_size, in_batched, counts):
    del axis_size, in_batched
    return overall_max(counts), False
