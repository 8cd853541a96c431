"""What every test shares: a strict JAX on eight pretended devices, no chance.

The environment is set before anything imports JAX, and holds for the processes that a
test starts as well.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("MPLBACKEND", "Agg")
# Loading compiled CPU programs logs pages of harmless feature mismatches.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Compiling takes longer than running, as a rule; optimized_code runs 4 times as fast.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

settings.register_profile("jaxplan", derandomize=True, deadline=None, database=None)
settings.load_profile("jaxplan")


@pytest.fixture(autouse=True, scope="session")
def _strict_jax():
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def optimized_code():
    """Compile as users do, for a test that runs long."""
    from tests.compiling import optimizing  # which imports JAX

    with optimizing():
        yield


# Linux gives a process 65,530 memory maps, each compiled CPU program takes some, and
# the compiler crashes without one; the whole suite needs more.
_MAPS = Path("/proc/self/maps")
_MAX_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    yield
    import jax

    if _MAPS.exists() and len(_MAPS.read_text().splitlines()) > _MAX_MAPS:
        jax.clear_caches()
