"""How the programs of tests are compiled: fast, or to run fast."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def optimizing() -> Iterator[None]:
    """Compile as users do what runs long: it takes three times as long to compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
