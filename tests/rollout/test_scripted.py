"""Scripted players meet the same worlds as the agent, and nothing after their end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.envs.base import Expert
from jaxplan.rollout.schedule import make_worlds
from jaxplan.rollout.scripted import (
    RandomPlayer,
    Script,
    draw_stray,
    play_scripted,
)
from tests.fakes import Shore

SEEDS = jnp.arange(40, 48, dtype=jnp.int32)
STEPS = 12


def played(noise, script=None):
    env = Shore()
    return jax.device_get(
        play_scripted(
            make_worlds(env, SEEDS),
            SEEDS,
            env=env,
            player=RandomPlayer(num_actions=len(env.action_names)),
            steps=STEPS,
            describers=(env,),
            noise=noise,
            script=script,
        )
    )


@pytest.fixture(scope="module")
def trajectories():
    return played(noise=0.5)


def test_the_random_player_is_an_expert_without_a_plan():
    player = RandomPlayer(num_actions=3)
    assert isinstance(player, Expert)
    keys = jax.random.split(jax.random.key(0), 200)
    act = jax.vmap(lambda key: player.act(key, player.init(), None))
    _, actions, intents = act(keys)
    assert set(np.asarray(actions).tolist()) == {0, 1, 2}
    said = jax.vmap(player.say, in_axes=(0, 0, None))(keys, intents, jnp.int32(0))
    assert not np.asarray(said.mask).any()


def test_worlds_are_played_as_python_would_play_them(trajectories, setting):
    env = setting.env
    ends = set()
    for lane, seed in enumerate(SEEDS.tolist()):
        state = env.reset(jax.random.fold_in(jax.random.key(1), seed))
        episode = jax.random.fold_in(jax.random.key(0), seed)
        alive = True
        for number in range(STEPS):
            now = jax.tree.map(lambda x, at=(number, lane): x[at], trajectories)
            assert now.alive == alive
            if not alive:
                assert now.reward == 0
                assert not now.terminated
                assert not now.events.any()
                continue
            assert now.passive == env.passive(state)
            seen = env.describe(state)
            np.testing.assert_array_equal(now.observations[0].mask, seen.mask)
            key = jax.random.fold_in(jax.random.fold_in(episode, 0), number)
            step = setting.env_step(key, state, jnp.int32(now.action))
            assert now.reward == pytest.approx(float(step.reward))
            assert now.terminated == step.terminated
            np.testing.assert_array_equal(now.events, step.events)
            state = step.state
            alive = not (step.terminated or step.truncated)
        ends.add((bool(trajectories.terminated[:, lane].any()), alive))
    assert ends == {(True, False), (False, False)}, "deaths and time limits"


def test_noise_is_a_share_of_the_steps(trajectories):
    other = trajectories.action != trajectories.advised
    assert 0.3 < other.mean() * 6 / 5 < 0.7  # one random action in six is the same
    quiet = played(noise=0.0)
    np.testing.assert_array_equal(quiet.action, quiet.advised)


@pytest.mark.parametrize("length", [1, 4])
def test_random_actions_are_repeated_for_a_while(length):
    def step(stray, key):
        stray = draw_stray(stray, *jax.random.split(key), 10**6, 0.25, length)
        return stray, stray

    keys = jax.random.split(jax.random.key(0), 40_000)
    _, strays = jax.lax.scan(step, jnp.int32(-1), keys)
    strays = np.asarray(strays)
    astray = strays >= 0
    begun = np.flatnonzero(astray & (strays != np.append(-1, strays[:-1])))
    assert astray.mean() == pytest.approx(0.25, abs=0.02)
    assert astray.sum() / len(begun) == pytest.approx(length, rel=0.05)


def test_a_script_is_played_first_and_the_player_looks_on(trajectories, setting):
    taken_over = jnp.array([0, 1, 2, 3, 0, 1, 2, 3], jnp.int32)
    actions = np.zeros((len(SEEDS), STEPS), np.int32)
    awake = trajectories.alive & ~trajectories.passive
    for lane in range(len(SEEDS)):
        own = trajectories.action[awake[:, lane], lane]
        actions[lane, : len(own)] = own
    script = Script(actions=jnp.asarray(actions), turns=taken_over)
    relay = played(noise=0.0, script=script)
    quiet = played(noise=0.0)
    for lane, turns in enumerate(taken_over.tolist()):
        before = relay.turn[:, lane] < turns
        np.testing.assert_array_equal(
            relay.action[before & ~relay.passive[:, lane], lane], actions[lane, :turns]
        )
        np.testing.assert_array_equal(
            relay.action[~before, lane], relay.advised[~before, lane]
        )
    # This player draws its actions from keys alone: it advises what it would have done.
    np.testing.assert_array_equal(relay.advised, quiet.advised)
    whole = dataclasses.replace(script, turns=jnp.full(len(SEEDS), STEPS))
    again = played(noise=0.0, script=whole)
    for name in ("alive", "reward", "terminated"):
        np.testing.assert_array_equal(
            getattr(again, name), getattr(trajectories, name), err_msg=name
        )
