"""Small stand-ins for big things: real in structure, tiny in size."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.config.schema import ModelConfig, RopeScalingConfig
from jaxplan.envs.base import EnvStep, Phrases
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


@chex.dataclass(frozen=True)
class ShoreState:
    """A walker on a beach: how far from the water, and what else there is to know."""

    place: jax.Array
    wind: jax.Array
    nap: jax.Array
    steps: jax.Array
    seen: jax.Array


@dataclasses.dataclass(frozen=True)
class Shore:
    """A tiny ``TextEnv``: the water ends an episode, sleep goes on by itself.

    What happens depends on the key in every step, and what is said depends on all that
    happens, so a replay with a wrong key or a wrong action does not stay unnoticed.
    """

    max_steps: int = 9
    action_names: tuple[str, ...] = (
        "Noop",
        "Move West",
        "Move East",
        "Sleep",
        "Dig Pit",  # two actions of several tokens that begin alike
        "Dig Well",
    )
    phrases: tuple[str, ...] = ("\nat", " stone", " light", " asleep")
    instructions: str = "You walk."
    event_names: tuple[str, ...] = ("dune", "nap")

    def reset(self, key) -> ShoreState:
        zero = jnp.zeros((), jnp.int32)
        place = jax.random.randint(key, (), 1, 3, jnp.int32)
        seen = jnp.zeros(2, bool)
        return ShoreState(place=place, wind=zero, nap=zero, steps=zero, seen=seen)

    def step(self, key, state, action) -> EnvStep:
        wind_key, nap_key = jax.random.split(key)
        wind = jax.random.randint(wind_key, (), -1, 2, jnp.int32)
        asleep = state.nap > 0
        walked = jnp.array([0, -1, 1, 0, -1, 0])[action]
        place = jnp.clip(state.place + jnp.where(asleep, wind, walked), 0, 4)
        falls_asleep = ~asleep & (action == self.action_names.index("Sleep"))
        nap = jnp.where(
            falls_asleep,
            jax.random.randint(nap_key, (), 1, 5, jnp.int32),
            jnp.maximum(state.nap - 1, 0),
        )
        seen = state.seen | jnp.stack([place == 4, falls_asleep])
        steps = state.steps + 1
        effort = jnp.where(asleep, 0.0, 0.01 * action.astype(jnp.float32))
        new = ShoreState(place=place, wind=wind, nap=nap, steps=steps, seen=seen)
        return EnvStep(
            state=new,
            reward=0.25 * place.astype(jnp.float32) + 0.1 * wind + effort,
            terminated=place == 0,
            truncated=(steps >= self.max_steps) & (place > 0),
            events=seen & ~state.seen,
            counts={"gusts": (wind != 0).astype(jnp.int32)},
        )

    def describe(self, state) -> Phrases:
        stones = jnp.arange(4) < state.place
        rest = jnp.stack([state.wind > 0, state.nap > 0])
        return Phrases(
            ids=jnp.array([0, 1, 1, 1, 1, 2, 3]),
            mask=jnp.concatenate([jnp.ones(1, bool), stones, rest]),
        )

    def passive(self, state):
        return state.nap > 0
