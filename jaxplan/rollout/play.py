"""Play without learning: segment after segment, as evaluation and teachers want it."""

from collections.abc import Generator, Iterable

import jax
import numpy as np
from jaxtyping import Array

from jaxplan.config.schema import ModelConfig, RolloutConfig
from jaxplan.core.mesh import LANES, settle
from jaxplan.envs.base import TextEnv
from jaxplan.models.params import LlamaParams
from jaxplan.rollout.rounds import Carry, Language, run_segment
from jaxplan.rollout.schedule import Schedule, settle_schedule
from jaxplan.rollout.segment import Segment


def play_segments(
    params: LlamaParams,
    carry: Carry,
    language: Language,
    schedules: Iterable[Schedule],
    *,
    env: TextEnv,
    config: RolloutConfig,
    model: ModelConfig,
    budget: int,
    turn_tokens: int,
) -> Generator[Segment, None, Carry]:
    """Play on as long as there are schedules, or who asks for segments has enough.

    Whoever plays, with the same sizes and in the same mesh, runs one compiled program,
    which is also that of PPO.

    Args:
        params: the policy, where the mesh wants it.
        carry: where the lanes begin.
        language: the tokenizer's tables.
        schedules: the episodes of every lane; one for each segment, of one shape.
        env: the world.
        config: sizes of the rollout.
        model: sizes of the model.
        budget: plan-text tokens a turn may have.
        turn_tokens: tokens of the longest turn.

    Yields:
        Segments, discounted by nothing.

    Returns:
        Where the lanes stand when there are no more schedules.
    """
    carry = settle(carry, LANES)
    language = settle(language)
    for schedule in map(settle_schedule, schedules):
        carry, segment = run_segment(
            params,
            carry,
            language,
            schedule,
            1.0,
            env=env,
            config=config,
            model=model,
            budget=budget,
            turn_tokens=turn_tokens,
            decide_explore=0.0,  # said, since a default is another program to jit
        )
        yield segment
    return carry


@jax.jit
def take_lanes(carry: Carry, lanes: np.ndarray | Array) -> Carry:
    """Some of the lanes, to go on with them alone."""
    return jax.tree.map(lambda leaf: leaf[lanes], carry)
