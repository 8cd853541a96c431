"""Starting JAX: its compile cache, its clock, and the check that it computes right."""

from collections.abc import Callable
from pathlib import Path

import jax

from jaxplan.core.selfcheck import check_jax

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


def start_jax(cache: Path) -> Callable[[], float]:
    """Turn on the persistent compile cache and refuse a JAX that miscomputes.

    Args:
        cache: folder of compiled programs; it is trusted input, like the code itself.

    Returns:
        A clock: seconds spent tracing and compiling so far.

    Raises:
        RuntimeError: this JAX computes wrong results, see ``check_jax``.
    """
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    # JAX makes the attributes of its config at run time.
    if jax.config.jax_compilation_cache_dir is None:  # ty: ignore[missing-attribute]
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    spent = [0.0]

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILE_EVENTS:
            spent[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)
    check_jax()
    return lambda: spent[0]
