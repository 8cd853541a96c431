"""What the compiler says that each stage will need, where the devices are here.

Nothing is allocated on them: programs are compiled for abstract arrays. The estimate of
``jaxplan.train.memory`` is measured by this.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxplan.core.mesh import shardings_of
from jaxplan.core.specs import abstract_tensors, spec_tree
from jaxplan.models.params import join, split_trained
from jaxplan.plan.grammar import DYNAMIC
from jaxplan.rollout.rounds import run_segment
from jaxplan.rollout.schedule import training_schedule
from jaxplan.train.memory import max_targets, stage_optimizers, wants_reference
from jaxplan.train.ppo import update
from jaxplan.train.ppo_loop import abstract_play, make_recipe
from jaxplan.train.setting import Setting
from jaxplan.train.sft import Segments, sft_update
from jaxplan.train.state import abstract_learner, with_shardings


def compiled_bytes(setting: Setting) -> dict[str, int]:
    """What the compiler says that the program of each stage needs.

    Args:
        setting: the run; its devices must be here. Nothing is allocated on them.
    """
    with jax.set_mesh(setting.mesh):
        return {stage: _program_bytes(lower) for stage, lower in _programs(setting)}


def _program_bytes(lower: Callable[[], Any]) -> int:
    sizes = lower().compile().memory_analysis()
    return (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def _programs(setting: Setting) -> Iterator[tuple[str, Callable[[], Any]]]:
    config, mesh = setting.config, setting.mesh
    model, rollout = config.model, config.rollout
    optimizers = stage_optimizers(config)

    def agent_of(stage: str) -> tuple[Any, Any, Any]:
        """The learner of a stage, what it stands beside, and both as one agent."""
        learning, staying = split_trained(setting.specs_of(stage))
        learner = abstract_learner(learning, optimizers[stage], mesh)
        frozen = with_shardings(abstract_tensors(staying), shardings_of(staying, mesh))
        return learner, frozen, join(learner.params, frozen)

    shape = config.sft.batch_segments, rollout.segment_tokens
    rows = {
        field.name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for field in dataclasses.fields(Segments)
    }
    learner, frozen, primed = agent_of("sft")
    start = with_shardings(
        abstract_tensors(setting.specs), shardings_of(setting.specs, mesh)
    )
    yield (
        "sft",
        partial(
            sft_update.lower,
            learner,
            start.llama if wants_reference(config, "sft") else None,
            spec_tree(Segments, **rows),
            optimizer=optimizers["sft"],
            max_targets=max_targets(config),
            config=config.sft,
            model=model,
            history=rollout.history,
            frozen=frozen,
        ),
    )
    learner, frozen, agent = agent_of("ppo")
    play = abstract_play(setting, mesh)
    schedule = jax.eval_shape(
        lambda pool: training_schedule(
            pool, jax.random.key(0), DYNAMIC, rollout.num_lanes
        ),
        play["pool"],
    )
    run = partial(
        run_segment,
        env=setting.env,
        config=rollout,
        model=model,
        budget=config.plan.budget,
        turn_tokens=setting.turn_tokens,
    )
    given = agent.llama, play["carry"], setting.language, schedule, 0.9
    _, segment = jax.eval_shape(run, *given)
    yield "rollout", partial(run_segment.lower, *given, **run.keywords)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    yield (
        "ppo update",
        partial(
            update.lower,
            learner,
            primed.llama,
            segment,
            setting.language.grammar,
            number,
            number,
            number,
            number,
            recipe=make_recipe(config, optimizers["ppo"]),
            frozen=frozen,
        ),
    )
