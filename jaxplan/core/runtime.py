"""Starting JAX: its compile cache, its clock, and the check that it computes right."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import jax

from jaxplan.core.selfcheck import check_jax

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def start_jax(cache: Path) -> Callable[[], float]:
    """Turn on the persistent compile cache and refuse a JAX that miscomputes.

    The process keeps the memory it frees, see ``keep_freed_memory``.

    Args:
        cache: folder of compiled programs; it is trusted input, like the code itself.

    Returns:
        A clock: seconds spent tracing and compiling so far.

    Raises:
        RuntimeError: this JAX computes wrong results, see ``check_jax``.
    """
    keep_freed_memory()
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


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, for the next program that runs on the CPU.

    Every run of a program on the CPU allocates all its temporary arrays at once, and
    glibc gives so large a block back to the system each time: the next run begins with
    a page fault every 4 KiB, a quarter of a small model's update. Whoever has set
    malloc's own variables, and every other C library, is left alone.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_ARENA_MAX, 1)  # the others are too small for such blocks
