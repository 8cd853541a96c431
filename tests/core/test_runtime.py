import os
import subprocess
import sys

import pytest

# What the last of three like allocations costs, in page faults.
ALLOCATE = """
import resource
from jaxplan.core.runtime import keep_freed_memory

keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (64 << 20) // os.sysconf("SC_PAGE_SIZE")


def faults(**variables: str) -> int:
    clean = {name: v for name, v in os.environ.items() if not name.startswith("MALLOC")}
    clean.pop("GLIBC_TUNABLES", None)
    environment = clean | {"JAX_PLATFORMS": "cpu"} | variables
    command = [sys.executable, "-c", ALLOCATE]
    ran = subprocess.run(command, env=environment, capture_output=True, check=True)
    return int(ran.stdout)


needs_glibc = pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="it is glibc's malloc"
)


@needs_glibc
def test_freed_memory_is_used_again_without_page_faults():
    assert faults() < PAGES // 100


@needs_glibc
def test_who_sets_malloc_up_is_left_alone():
    # This threshold means a block of its own for each allocation, as malloc's default.
    assert faults(MALLOC_MMAP_THRESHOLD_="1048576") > PAGES // 2
