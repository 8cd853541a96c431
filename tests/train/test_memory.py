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
    ModelConfig,
    PpoConfig,
    RunConfig,
)
from jaxplan.core.specs import abstract_tensors
from jaxplan.envs.worlds import make_env
from jaxplan.io.stopping import StopRequest
from jaxplan.models.cache import init_cache
from jaxplan.models.params import split_trained
from jaxplan.rollout.setup import longest_turn, make_language
from jaxplan.text.tokenizer import load_tokenizer
from jaxplan.train.memory import (
    GIB,
    STAGES,
    compiled_bytes,
    memory_table,
    plan_memory,
    verdict,
)
from jaxplan.train.setting import Setting

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LARGE_VOCAB = 128_256


@pytest.fixture(scope="module")
def on_shore(setting):
    """A run on the tiny world, whose language is cheap for any vocabulary."""

    def make(config: RunConfig) -> Setting:
        tokenizer = setting.tokenizer.fill_up(config.model.vocab_size)
        config = dataclasses.replace(config, plan=setting.plan)
        return Setting(
            config=config,
            run_dir=Path(),
            env=setting.env,
            language=make_language(tokenizer, setting.env, setting.plan),
            vocab_size=tokenizer.vocab_size,
            turn_tokens=setting.turn_tokens,
            stop=StopRequest(),
        )

    return make


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


def test_what_does_not_fit_is_told_with_what_would_help(on_shore):
    own = on_shore(preset("quickstart"))
    plan = plan_memory(own)
    sentence, fits = verdict(own, plan, plan.peak - GIB // 2)
    assert not fits
    assert sentence.startswith("too big by 0.500 GiB")
    helping = {
        change: float(peak) * GIB
        for peak, change in (line.split() for line in sentence.splitlines()[1:])
    }
    assert list(helping.values()) == sorted(helping.values())
    assert max(helping.values()) < plan.peak
    assert helping.keys() >= {
        "mesh.fsdp=2",
        "model.remat=layer",
        "rollout.num_lanes=32",
    }
    leaner = dataclasses.replace(own.config.model, remat="layer")
    config = dataclasses.replace(own.config, model=leaner)
    expected = plan_memory(dataclasses.replace(own, config=config)).peak
    assert helping["model.remat=layer"] == pytest.approx(expected, rel=0.01)
    assert verdict(own, plan, plan.peak)[1]


def test_the_table_has_a_line_for_each_part_and_sums_up(on_shore):
    plan = plan_memory(on_shore(preset("100m")))
    lines = memory_table(plan, dict.fromkeys(STAGES, GIB)).splitlines()
    assert lines[0] == "mesh: data=1 x fsdp=1 x model=1, 1 devices"
    table = {line[:26].strip(): line[26:].split() for line in lines[2:]}
    numbers = [
        [0.0 if cell == "-" else float(cell) for cell in cells]
        for part, cells in table.items()
        if part != "total" and not part.startswith("its program")
    ]
    for column, total in enumerate(table["total"]):
        expected = sum(row[column] for row in numbers)
        assert float(total) == pytest.approx(expected, abs=0.01)
    assert table["its program, compiled"] == ["1.000"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "12m"])
@pytest.mark.parametrize("remat", ["none", "layer"])
def test_the_estimate_is_what_the_compiler_says_within_15_percent(name, remat):
    config = load_config(CONFIGS / "quickstart.yaml")
    model = load_config(CONFIGS / "models" / f"{name}.yaml").model
    model = dataclasses.replace(model, remat=remat)
    config = dataclasses.replace(config, model=model)
    tokenizer, env = load_tokenizer("shipped"), make_env(config.env)
    own = Setting(
        config=config,
        run_dir=Path(),
        env=env,
        language=make_language(tokenizer, env, config.plan),
        vocab_size=tokenizer.vocab_size,
        turn_tokens=longest_turn(tokenizer, env, config.plan),
        stop=StopRequest(),
    )
    plan, compiled = plan_memory(own), compiled_bytes(own)
    told = {stage: plan.of_program(stage) / compiled[stage] for stage in STAGES}
    assert told == pytest.approx(dict.fromkeys(STAGES, 1.0), abs=0.15)


@pytest.mark.slow
def test_updates_never_hold_all_logits_of_a_large_vocabulary(on_shore):
    model = ModelConfig(
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        ffn_width=32,
        vocab_size=LARGE_VOCAB,
    )
    config = RunConfig(model=model)
    config = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, batch_segments=32, observation_weight=1.0),
    )
    own = on_shore(config)
    compiled = compiled_bytes(own)
    logits = LARGE_VOCAB * 4
    # All 512 tokens of a segment have a loss, and PPO scores 120 in each of 32 lanes;
    # both updates hold less in all than one copy of [B, S, V] would take.
    assert compiled["sft"] < 0.35 * 32 * 512 * logits
    assert compiled["ppo update"] < 0.6 * 32 * 512 * logits
