"""The estimate of memory as people read it: a table, a verdict, and what would help."""

import dataclasses
import math
from collections.abc import Iterator

import jax
from pydantic import ValidationError

from jaxplan.rollout.setup import check_sizes
from jaxplan.train.memory import GIB, STAGES, MemoryPlan, plan_memory
from jaxplan.train.setting import Setting

_ADAPTERS = 64  # rank of the adapters that are proposed where memory is short


def device_bytes() -> int | None:
    """Memory of the first device, where it says so."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def verdict(setting: Setting, plan: MemoryPlan, there: int) -> tuple[str, bool]:
    """Say whether the plan fits, and if not, by how much and what would help.

    Args:
        setting: the run.
        plan: of its memory.
        there: bytes of a device.
    """
    free = there - plan.peak
    sizes = f"the peak is {_in_gib(plan.peak)} GiB of {_in_gib(there)}"
    if free >= 0:
        return f"fits: {sizes}", True
    lines = [f"too big by {_in_gib(-free)} GiB: {sizes}; one change alone makes it"]
    lines += [f"  {_in_gib(peak):>9}  {change}" for change, peak in what_helps(setting)]
    return "\n".join(lines), False


def what_helps(setting: Setting) -> list[tuple[str, int]]:
    """Changes of one key that lower the peak, and the peak with each, lowest first."""
    peak, helping = plan_memory(setting).peak, []
    for change, other in _changes(setting):
        try:
            check_sizes(
                other.language,
                other.config.rollout,
                other.config.plan,
                other.turn_tokens,
            )
            lower = plan_memory(other).peak
        except ValueError:
            continue
        if lower < peak:
            helping.append((change, lower))
    return sorted(helping, key=lambda found: found[1])


def _changes(setting: Setting) -> Iterator[tuple[str, Setting]]:
    config = setting.config
    wanted = [
        ("model", "remat", "layer"),
        ("model", "compute_dtype", "bfloat16"),
        ("model", "param_dtype", "bfloat16"),
        ("mesh", "fsdp", config.mesh.fsdp * 2),
        ("mesh", "model", config.mesh.model * 2),
        ("ppo", "num_minibatches", config.ppo.num_minibatches * 2),
        ("sft", "batch_segments", config.sft.batch_segments // 2),
        ("rollout", "num_lanes", config.rollout.num_lanes // 2),
        ("rollout", "segment_tokens", config.rollout.segment_tokens // 2),
    ]
    if not config.model.lora.rank:
        adapted = dataclasses.replace(config.model.lora, rank=_ADAPTERS)
        wanted.append(("model", "lora", adapted))
    for name, key, value in wanted:
        section = getattr(config, name)
        if getattr(section, key) == value:
            continue
        try:
            changed = dataclasses.replace(section, **{key: value})
            other = dataclasses.replace(config, **{name: changed})
        except ValidationError:
            continue
        told = f"lora.rank={_ADAPTERS}" if key == "lora" else f"{key}={value}"
        yield f"{name}.{told}", dataclasses.replace(setting, config=other)


def memory_table(plan: MemoryPlan, compiled: dict[str, int] | None = None) -> str:
    """The plan as lines of text, in GiB; beside it what the compiler says."""
    parts: dict[str, None] = {}
    for stage in STAGES:
        parts |= dict.fromkeys(plan.program[stage] | plan.resident[stage])
    rows = [("GiB on each device", *STAGES)]
    for part in parts:
        held = (
            plan.program[stage].get(part, 0) + plan.resident[stage].get(part, 0)
            for stage in STAGES
        )
        rows.append((part, *map(_in_gib, held)))
    rows.append(("total", *(_in_gib(plan.total(stage)) for stage in STAGES)))
    if compiled is not None:
        estimates = (_in_gib(plan.of_program(stage)) for stage in STAGES)
        rows.append(("its program, estimated", *estimates))
        told = (_in_gib(compiled[stage]) for stage in STAGES)
        rows.append(("its program, compiled", *told))
    sizes = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [f"mesh: {sizes}, {math.prod(plan.mesh.values())} devices"]
    lines += [f"{row[0]:26}" + "".join(f"{n:>12}" for n in row[1:]) for row in rows]
    return "\n".join(lines)


def _in_gib(size: int) -> str:
    return f"{size / GIB:.3f}" if size else "-"
