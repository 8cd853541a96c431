"""Every episode of a panel once, whatever the lanes; every world from its seed."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.core.roles import Role
from jaxplan.plan.grammar import NEVER
from jaxplan.rollout.schedule import make_worlds, panel_schedule, training_schedule
from tests.fakes import Shore
from tests.rollout.conftest import ROLLOUT, WORLDS

MODES = (NEVER, 2, 3)
PANEL_SEGMENTS = 8


@pytest.mark.parametrize(
    ("worlds", "modes", "lanes"),
    [(6, 2, 3), (7, 3, 3), (8, 4, 3), (5, 1, 2), (1, 2, 4), (3, 3, 7)],
)
def test_a_panel_has_every_world_in_every_mode_once(worlds, modes, lanes):
    seeds = jnp.arange(100, 100 + worlds, dtype=jnp.int32)
    pool = jnp.arange(worlds)
    plan = panel_schedule(pool, seeds, jnp.arange(modes, dtype=jnp.int32), lanes)
    plan = jax.device_get(plan)
    episodes = Counter()
    for lane in range(lanes):
        for entry in range(plan.entries[lane]):
            assert plan.seed[lane, entry] == 100 + plan.world[lane, entry]
            episodes[int(plan.seed[lane, entry]), int(plan.mode[lane, entry])] += 1
    wanted = {(100 + w, mode): 1 for w in range(worlds) for mode in range(modes)}
    assert episodes == wanted
    assert np.ptp(plan.entries) <= modes, "lanes have about the same work"


def test_a_world_depends_on_its_seed_alone():
    env = Shore()
    few = make_worlds(env, jnp.array([7, 3], jnp.int32))
    many = make_worlds(env, jnp.arange(40, dtype=jnp.int32))
    for at, seed in enumerate((7, 3)):
        jax.tree.map(
            lambda a, b, at=at, seed=seed: np.testing.assert_array_equal(
                a[at], b[seed]
            ),
            few,
            many,
        )
    assert len(set(np.asarray(many.place).tolist())) > 1


def test_training_draws_worlds_from_the_pool_and_seeds_from_the_key():
    pool = make_worlds(Shore(), jnp.arange(3, dtype=jnp.int32))
    draws = [
        training_schedule(pool, jax.random.key(key), 4, 5, entries=50)
        for key in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0].seed, draws[1].seed)
    assert not (draws[0].seed == draws[2].seed).any()
    assert set(np.asarray(draws[0].world).ravel().tolist()) == {0, 1, 2}
    assert (np.asarray(draws[0].mode) == 4).all()
    assert (np.asarray(draws[0].entries) < 0).all()


@pytest.fixture(scope="module")
def panel(setting):
    seeds = jnp.arange(WORLDS, dtype=jnp.int32)
    worlds = make_worlds(setting.env, seeds)
    modes = jnp.array(MODES, jnp.int32)
    schedule = panel_schedule(worlds, seeds, modes, ROLLOUT.num_lanes)
    return setting.play(schedule, PANEL_SEGMENTS)


def test_a_panel_is_played_once_and_then_the_lanes_are_still(panel):
    played = Counter()
    seed, mode = np.asarray(panel.schedule.seed), np.asarray(panel.schedule.mode)
    for segment in panel.segments:
        ends = jax.device_get(segment.episodes)
        for at in np.argwhere(ends.finished):
            lane, entry = at[1], ends.entry[tuple(at)]
            played[int(seed[lane, entry]), int(mode[lane, entry])] += 1
    assert played == {(s, m): 1 for s in range(WORLDS) for m in MODES}
    last = panel.segments[-1]
    assert not np.asarray(panel.carries[-1].lanes.live).any()
    assert not last.env_steps.any()
    assert (last.encoded_tokens == 1).all(), "the last token of each prompt"
    assert (np.asarray(last.stream.tokens.role) <= Role.PROMPT).all()
    assert not np.asarray(last.turns.end.complete).any()


def test_modes_of_a_batch_plan_in_exactly_the_turns_they_should(setting, panel):
    mode = np.asarray(panel.schedule.mode)
    opening = setting.words.opening[0]
    seen = set()
    for (lane, episode), turns in panel.said().items():
        every = int(mode[lane, episode - 1])
        planned = [said[0] == opening for said in turns]
        due = [every > 0 and turn % every == 0 for turn in range(len(turns))]
        assert planned == due
        seen.add(every)
    assert seen == set(MODES)


def test_an_agent_that_may_choose_does_both(setting, play):
    mode = np.asarray(play.schedule.mode)
    said = play.said().items()
    free = [
        turn for (lane, e), ts in said if mode[lane, (e - 1) % 6] == 0 for turn in ts
    ]
    planned = [turn[0] == setting.words.opening[0] for turn in free]
    assert 0.1 < np.mean(planned) < 0.9
