"""Small stand-ins for big things: real in structure, tiny in size."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.config.schema import ModelConfig, RopeScalingConfig
from jaxplan.models.visibility import (
    NO_PLAN,
    PADDING_EPISODE,
    PROMPT_EPISODE,
    TokenMeta,
)

TINY_VOCAB = 50
TINY_MODEL = ModelConfig(
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_width=48,
    rope_scaling=RopeScalingConfig(
        factor=4.0, original_max_position_embeddings=16, high_freq_factor=2.0
    ),
)


def plain_meta(batch: int, length: int) -> TokenMeta:
    """One episode of one turn without a plan: visibility is causality."""
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return TokenMeta(
        position=position,
        episode=jnp.ones_like(position),
        turn=jnp.zeros_like(position),
        plan=jnp.full_like(position, NO_PLAN),
        active_plan=jnp.zeros_like(position),
    )


def random_stream(
    rng: np.random.Generator, batch: int, length: int
) -> tuple[jax.Array, TokenMeta]:
    """Streams as a rollout writes them: prompt, turns with plans, deaths, padding."""
    rows = [_random_lane(rng, length) for _ in range(batch)]
    columns = np.stack(rows).transpose(2, 0, 1)
    names = ("position", "episode", "turn", "plan", "active_plan")
    meta = {
        name: jnp.asarray(column, jnp.int32)
        for name, column in zip(names, columns, strict=True)
    }
    tokens = jnp.asarray(rng.integers(0, TINY_VOCAB, (batch, length)), jnp.int32)
    return tokens, TokenMeta(**meta)


def _random_lane(rng, length):
    prompt = rng.integers(0, 4)
    rows = [(PROMPT_EPISODE, 0, NO_PLAN, 0)] * prompt
    episode, turn, plan = 1, 0, 0
    end = length - rng.integers(0, length // 8 + 1)
    while len(rows) < end:
        rows += [(episode, turn, NO_PLAN, plan)] * rng.integers(2, 6)
        if rng.random() < 0.4:
            rows += [(episode, turn, plan + 1, plan)] * rng.integers(1, 5)
            plan += 1
        rows += [(episode, turn, NO_PLAN, plan)] * rng.integers(1, 3)
        turn += 1
        episode += rng.random() < 0.15
    rows = rows[:end] + [(PADDING_EPISODE, 0, NO_PLAN, 0)] * (length - end)
    return [(position, *row) for position, row in enumerate(rows)]
