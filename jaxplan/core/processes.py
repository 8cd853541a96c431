"""Several processes that run the same program, one for each host of a cluster.

All of them call the same compiled programs in the same order. Only the first one talks
to people and writes files, but for checkpoints, of which each writes its part. What one
process alone can know, a signal or a file, is agreed on before anyone acts on it.
"""

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_Result = TypeVar("_Result")

_HEARTBEAT_SECONDS = 30  # after which a process that is gone ends the others


class OtherProcessError(RuntimeError):
    """The first process failed at something that it does alone, and says why."""


def start_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of this run, if the environment tells of any.

    It does under SLURM (more than one task), on GKE's TPU slices, where
    ``JAX_COORDINATOR_ADDRESS`` is set, and where ``JAXPLAN_DISTRIBUTED=1`` is; who the
    others are is then found out by JAX. ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``
    tell it where it cannot know. Call this before anything else of JAX.
    """
    if not are_many(environment):
        return
    count, number = (
        int(environment[name]) if name in environment else None
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )
    jax.distributed.initialize(
        num_processes=count,
        process_id=number,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )


def are_many(environment: Mapping[str, str]) -> bool:
    """Tell whether the environment is that of one process among several."""
    tasks = environment.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in environment else 1
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or environment.get("JAXPLAN_DISTRIBUTED") == "1"
        or int(tasks) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    )


def is_first() -> bool:
    """Tell whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def agree(value: int) -> int:
    """What the first process thinks; all must ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_process(flag: bool) -> bool:
    """Tell whether the flag is up in any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def first_alone(work: Callable[[], _Result]) -> _Result | None:
    """Let the first process do something short while the others wait.

    Returns:
        What it returned; None in the others.

    Raises:
        OtherProcessError: in the others, if the first one raised anything.
    """
    problem: Exception | None = None
    result: _Result | None = None
    if is_first():
        try:
            result = work()
        except Exception as error:
            problem = error
    failed = agree(problem is not None)
    if problem is not None:
        raise problem
    if failed:
        raise OtherProcessError("the first process could not go on")
    return result
