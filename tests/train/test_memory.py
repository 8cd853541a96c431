"""The dry run against what the compiler says, and against counting by hand."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxplan.config.reader import load_config
from jaxplan.config.schema import (
    LoraConfig,
    MeshConfig,
    PpoConfig,
    RunConfig,
)
from jaxplan.core.specs import abstract_tensors
from jaxplan.models.cache import init_cache
from jaxplan.models.params import split_trained
from jaxplan.train.memory import STAGES, plan_memory

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def preset(name: str, **mesh: int) -> RunConfig:
    model = load_config(CONFIGS / "models" / f"{name}.yaml").model
    return RunConfig(model=model, mesh=MeshConfig(**mesh))


def size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_what_lasts_is_counted_as_by_hand(on_shore):
    own = on_shore(preset("quickstart"))
    plan = plan_memory(own)
    params = size(abstract_tensors(own.specs))
    llama = size(abstract_tensors(own.specs.llama))
    cache = jax.eval_shape(lambda: init_cache(own.config.model, 64, 512, jnp.float32))
    assert plan.program["rollout"]["parameters"] == llama
    assert plan.resident["rollout"]["parameters"] == params - llama  # the value head
    for stage in ("sft", "ppo update"):
        assert plan.program[stage]["parameters"] == params
        moments = plan.program[stage]["optimizer"]
        assert 2 * params <= moments < 2 * params + 100  # and counters
        assert plan.program[stage]["gradients"] == params
    assert plan.program["ppo update"]["reference"] == llama
    assert "reference" not in plan.program["sft"]
    assert plan.program["rollout"]["KV cache"] == size(cache) - 64 * 4  # cursors
    assert plan.peak == max(plan.total(stage) for stage in STAGES)


def test_adapters_alone_have_gradients_and_moments_and_the_reference_is_shared(
    on_shore,
):
    model = preset("quickstart").model
    adapted = dataclasses.replace(model, lora=LoraConfig(rank=4))
    critic = dataclasses.replace(model, layers=1, weights=None)
    config = dataclasses.replace(
        preset("quickstart"), model=adapted, ppo=PpoConfig(critic=critic)
    )
    own = on_shore(config)
    plan = plan_memory(own)
    base = size(abstract_tensors(on_shore(preset("quickstart")).specs.llama))
    agent = own.specs_of("ppo")
    learning, frozen = (size(abstract_tensors(p)) for p in split_trained(agent))
    assert frozen == base
    assert learning > size(abstract_tensors(agent.critic)) > 0  # it has no adapters
    update = plan.program["ppo update"]
    assert update["gradients"] == learning
    assert 2 * learning <= update["optimizer"] < 2 * learning + 200
    adapters = size(abstract_tensors(own.specs_of("sft").llama)) - base
    assert update["reference"] == adapters  # those of SFT, beside the shared weights
    alone = plan_memory(on_shore(dataclasses.replace(config, ppo=PpoConfig())))
    assert update["activations"] > alone.program["ppo update"]["activations"]


def test_a_mesh_larger_than_the_machine_splits_what_the_rules_split(on_shore):
    whole = plan_memory(on_shore(preset("100m")))
    parts = plan_memory(on_shore(preset("100m", data=4, fsdp=4, model=4)))
    assert math.prod(parts.mesh.values()) > jax.device_count()

    def share(part, stage):
        return parts.program[stage][part] / whole.program[stage][part]

    for stage in ("sft", "ppo update"):
        for part in ("parameters", "optimizer", "gradients"):
            assert share(part, stage) == pytest.approx(1 / 16, rel=0.02)
    assert share("KV cache", "rollout") == pytest.approx(1 / 64, rel=0.05)
    # What is kept between layers has no axis that model splits.
    assert share("activations", "ppo update") == pytest.approx(1 / 16, rel=0.02)
    # To decode, weights are gathered over all axes but model.
    decoding = parts.program["rollout"]["weights to compute with"]
    count = 100e6
    assert decoding == pytest.approx(count * 2 / 4, rel=0.05)


def test_a_mesh_that_does_not_divide_the_run_is_refused_in_a_dry_run(on_shore):
    with pytest.raises(ValueError, match=r"mesh\.model=3 does not divide"):
        plan_memory(on_shore(preset("quickstart", model=3)))
