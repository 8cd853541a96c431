import re
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import EnvConfig
from jaxplan.envs.craftax_view import ITEM_NAMES, TILE_NAMES
from jaxplan.envs.worlds import EXPERTS, WORLDS, make_env


def leaves(state):
    """The state as NumPy arrays, its random key as numbers."""
    return jax.tree.leaves(
        jax.device_get(state.replace(state_rng=jax.random.key_data(state.state_rng)))
    )


def assert_same_states(one, two):
    for a, b in zip(leaves(one), leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_worlds_made_in_a_batch_are_the_worlds_made_one_by_one(world):
    keys = jax.random.split(jax.random.key(7), 32)
    batch = jax.jit(jax.vmap(world.reset))(keys)
    reset = jax.jit(world.reset)
    for i, key in enumerate(keys):
        assert_same_states(jax.tree.map(lambda leaf, i=i: leaf[i], batch), reset(key))


def test_a_step_keeps_every_shape_and_type_so_it_is_compiled_once(world):
    key = jax.random.key(0)
    state = jax.eval_shape(world.reset, key)
    after = jax.eval_shape(world.step, key, state, jnp.zeros((), jnp.int32)).state
    was, now = (
        {
            jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.weak_type)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (state, after)
    )
    assert was == now
    assert not any(weak for _, _, weak in was.values())


def test_equal_configs_make_worlds_that_share_their_compiled_code():
    one, two = make_env(EnvConfig()), make_env(EnvConfig())
    assert one == two
    assert hash(one) == hash(two)


@pytest.mark.slow
def test_states_and_rewards_are_those_of_craftax_itself(play, step):
    from craftax.craftax_env import make_craftax_env_from_name

    theirs = make_craftax_env_from_name("Craftax-Classic-Symbolic-v1", auto_reset=False)
    their_step = jax.jit(jax.vmap(theirs.step))
    state = play.before[0]
    chance = np.random.default_rng(5)
    for key in jax.random.split(jax.random.key(5), 60):
        keys = jax.random.split(key, len(state.timestep))
        actions = jnp.asarray(chance.integers(0, 17, len(state.timestep)), jnp.int32)
        ours = step(keys, state, actions)
        _, state, rewards, done, _ = their_step(keys, state, actions)
        assert_same_states(ours.state, state)
        np.testing.assert_array_equal(ours.reward, rewards)
        np.testing.assert_array_equal(ours.terminated, done)


def test_an_episode_terminates_by_death_and_is_truncated_by_the_clock(play, world):
    for count, taken in enumerate(play.steps, start=1):
        dead = np.asarray(taken.state.player_health) <= 0
        np.testing.assert_array_equal(taken.terminated, dead)
        np.testing.assert_array_equal(
            taken.truncated, ~dead & (count >= world.max_steps)
        )
    assert any(taken.terminated.any() for taken in play.steps)
    assert any(taken.truncated.any() for taken in play.steps)


def test_walking_into_lava_terminates(play, step):
    state = play.before[0]
    lanes = np.arange(len(state.timestep))
    ahead = state.player_position + np.array([[0, 1]])
    lava = TILE_NAMES.index("lava")
    burnt = step(
        jax.random.split(jax.random.key(0), len(lanes)),
        state.replace(map=state.map.at[lanes, ahead[:, 0], ahead[:, 1]].set(lava)),
        jnp.full(len(lanes), world_action("Move East"), jnp.int32),
    )
    np.testing.assert_array_equal(burnt.terminated, True)


def world_action(name):
    return make_env(EnvConfig()).action_names.index(name)


def test_rewards_are_float32_and_sum_to_achievements_and_a_tenth_of_health(play):
    rewards = np.stack([taken.reward for taken in play.steps])
    assert rewards.dtype == np.float32
    first, last = play.before[0], play.steps[-1].state
    health = np.asarray(last.player_health) - np.asarray(first.player_health)
    unlocked = np.asarray(last.achievements).sum(1)
    np.testing.assert_allclose(rewards.sum(0), unlocked + 0.1 * health, atol=1e-4)


def test_an_event_happens_once_and_is_an_achievement(play):
    events = np.stack([taken.events for taken in play.steps])
    np.testing.assert_array_equal(events.sum(0), play.steps[-1].state.achievements)
    assert events.any(0).sum() > 20  # of 16 lanes: the play does unlock something


def test_while_the_player_sleeps_no_action_matters(play, world, step):
    state = play.steps[100].state
    lane = int(jnp.argmax(state.player_health))
    one = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[lane], leaf.shape), state)
    lanes = len(state.timestep)
    asleep = one.replace(
        is_sleeping=jnp.ones(lanes, bool),
        player_energy=jnp.full(lanes, 3, jnp.int32),
    )
    keys = jnp.broadcast_to(jax.random.key(0), lanes)
    after = step(keys, asleep, jnp.arange(lanes, dtype=jnp.int32)).state
    for leaf in leaves(after):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    np.testing.assert_array_equal(jax.vmap(world.passive)(asleep), True)
    np.testing.assert_array_equal(jax.vmap(world.passive)(play.before[0]), False)


@pytest.mark.parametrize("part", ["reset", "step", "describe"])
def test_nothing_calls_back_to_the_host(part, world):
    key = jax.random.key(0)
    state = jax.eval_shape(world.reset, key)
    arguments = {
        "reset": (key,),
        "step": (key, state, jnp.zeros((), jnp.int32)),
        "describe": (state,),
    }[part]
    assert "callback" not in str(jax.make_jaxpr(getattr(world, part))(*arguments))


@pytest.mark.slow
def test_worlds_spread_over_devices_do_not_communicate(world):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def turn(key, action):
        taken = world.step(key, world.reset(key), action)
        return taken, world.describe(taken.state)

    keys = jax.device_put(jax.random.split(jax.random.key(0), 16), shard)
    actions = jax.device_put(jnp.zeros(16, jnp.int32), shard)
    compiled = jax.jit(jax.vmap(turn), out_shardings=shard).lower(keys, actions)
    program = compiled.compile().as_text()
    assert not re.findall(r"all-\w+|collective-\w+|reduce-scatter", program)


def test_names_are_those_of_craftax_by_number(world):
    from craftax.craftax_classic.constants import Achievement, Action, BlockType
    from craftax.craftax_classic.envs.craftax_state import Inventory

    words = {"LEFT": "MOVE_WEST", "RIGHT": "MOVE_EAST"}
    words |= {"UP": "MOVE_NORTH", "DOWN": "MOVE_SOUTH"}
    actions = [words.get(action.name, action.name) for action in Action]
    assert [n.upper().replace(" ", "_") for n in world.action_names] == actions
    blocks = [block.name.replace("CRAFTING_", "") for block in BlockType]
    assert [n.upper().replace(" ", "_") for n in TILE_NAMES[:17]] == blocks
    assert [name.upper() for name in world.event_names] == [a.name for a in Achievement]
    assert list(ITEM_NAMES) == list(Inventory.__dataclass_fields__)


def test_every_world_a_config_may_name_exists_and_has_an_expert():
    names = set(get_args(get_type_hints(EnvConfig)["name"]))
    assert names == set(WORLDS) == set(EXPERTS)
