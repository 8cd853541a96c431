"""One compiled Craftax-Classic for the whole suite, and many of its states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import EnvConfig
from jaxplan.envs.worlds import make_env
from tests.envs.oracle import BLOCKS

LANES = 16
STEPS = 300
MAX_STEPS = 250
# Mostly Do and moves; the rest of the time everything else, sleep included.
ACTION_ODDS = np.array([1, 8, 8, 8, 8, 30] + [2] * 11)


@dataclasses.dataclass(frozen=True)
class Play:
    """Random play in LANES lanes that are never reset: one entry a step."""

    before: list  # states that were stepped, batched
    steps: list  # EnvSteps, batched


@pytest.fixture(scope="session")
def world():
    return make_env(EnvConfig(max_steps=MAX_STEPS))


@pytest.fixture(scope="session")
def step(world):
    """The compiled step of LANES worlds."""
    return jax.jit(jax.vmap(world.step))


@pytest.fixture(scope="session")
def play(world, step):
    state = jax.jit(jax.vmap(world.reset))(jax.random.split(jax.random.key(0), LANES))
    chance = np.random.default_rng(0)
    before, steps = [], []
    for key in jax.random.split(jax.random.key(1), STEPS):
        odds = ACTION_ODDS / ACTION_ODDS.sum()
        actions = jnp.asarray(chance.choice(17, LANES, p=odds), jnp.int32)
        before.append(state)
        steps.append(step(jax.random.split(key, LANES), state, actions))
        state = steps[-1].state
    return Play(before=before, steps=steps)


@pytest.fixture(scope="session")
def states(play):
    """Stacked states: every tenth of the play, and as many scrambled beyond play."""
    kept = [*play.before[::10], play.steps[-1].state]
    played = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *kept)
    both = [played, scramble(played, np.random.default_rng(2))]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *both)


def scramble(states, chance):
    """Give states any map, place, mobs, vitals and inventory that are possible."""
    count = len(states.timestep)

    def draw(low, high, *shape, dtype=np.int32):
        return jnp.asarray(chance.integers(low, high, (count, *shape)), dtype)

    # A third are mixtures of all blocks, a third have large patches, a third are plain.
    blocks = chance.choice(BLOCKS, (count, 64, 64))
    patches = chance.choice(BLOCKS, (count, 16, 16)).repeat(4, 1).repeat(4, 2)
    plain = chance.choice([2, 7, 13], (count, 64, 64))
    style = np.arange(count)[:, None, None] % 3
    position = draw(0, 64, 2)

    def mobs(like):
        number = like.mask.shape[1]
        return like.replace(
            position=position[:, None] + draw(-5, 6, number, 2),
            mask=draw(0, 2, number, dtype=bool) & (draw(0, 3, 1) > 0),
        )

    return states.replace(
        map=jnp.asarray(np.choose(style, [blocks, patches, plain]), jnp.int32),
        player_position=position,
        player_direction=draw(1, 5),
        player_health=draw(0, 10),
        player_food=draw(0, 10),
        player_drink=draw(0, 10),
        player_energy=draw(0, 10),
        is_sleeping=draw(0, 4) == 0,
        light_level=jnp.asarray(chance.random(count), jnp.float32),
        inventory=jax.tree.map(
            lambda _: draw(0, 10) * (draw(0, 3) > 0), states.inventory
        ),
        zombies=mobs(states.zombies),
        cows=mobs(states.cows),
        skeletons=mobs(states.skeletons),
        arrows=mobs(states.arrows),
    )
