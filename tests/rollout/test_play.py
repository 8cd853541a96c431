"""Everybody who plays shares one program, and plays what is scheduled."""

import dataclasses
from itertools import islice, repeat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import MeshConfig
from jaxplan.core.mesh import LANES, make_mesh, settle
from jaxplan.rollout.play import play_segments
from jaxplan.rollout.rounds import run_segment
from jaxplan.rollout.schedule import (
    ENTRIES,
    Dealer,
    every_world_in_every_mode,
    make_worlds,
    one_episode_schedule,
    settle_schedule,
    training_schedule,
)
from tests.rollout.conftest import MODEL, PLAN, ROLLOUT

LANE_COUNT = ROLLOUT.num_lanes


@pytest.fixture(scope="module")
def schedules(setting):
    seeds = jnp.arange(LANE_COUNT, dtype=jnp.int32)
    worlds = make_worlds(setting.env, seeds)
    modes = jnp.array([0, -1, 1], jnp.int32)
    listed = every_world_in_every_mode(worlds, seeds, modes)
    return {
        "training": training_schedule(worlds, jax.random.key(4), 0, LANE_COUNT),
        "panel": next(Dealer(listed, LANE_COUNT).schedules()),
        "one episode": one_episode_schedule(worlds, seeds, jnp.arange(LANE_COUNT) % 3),
    }


def play(setting, schedule, count):
    sizes = {"config": ROLLOUT, "model": MODEL, "budget": PLAN.budget}
    segments = play_segments(
        settle(setting.params),
        setting.first_carry(schedule),
        setting.language,
        repeat(schedule),
        env=setting.env,
        turn_tokens=setting.turn_tokens,
        **sizes,
    )
    return list(islice(segments, count))


def test_teachers_panels_and_training_run_the_same_program(setting, schedules):
    before = run_segment._cache_size()
    with jax.set_mesh(make_mesh(MeshConfig())):
        for schedule in schedules.values():
            play(setting, schedule, 2)
        # As PPO calls it, with a discount of its own.
        run_segment(
            settle(setting.params),
            settle(setting.first_carry(schedules["training"]), LANES),
            settle(setting.language),
            settle_schedule(schedules["training"]),
            0.9,
            env=setting.env,
            config=ROLLOUT,
            model=MODEL,
            budget=PLAN.budget,
            turn_tokens=setting.turn_tokens,
            decide_explore=0.0,
        )
    assert run_segment._cache_size() == before + 1


def test_one_episode_is_played_in_every_lane_and_no_more(setting, schedules):
    with jax.set_mesh(make_mesh(MeshConfig())):
        segments = play(setting, schedules["one episode"], 12)
    finished = sum(np.asarray(s.episodes.finished).sum(axis=0) for s in segments)
    assert finished.tolist() == [1] * LANE_COUNT
    assert not np.asarray(segments[-1].env_steps).any()


def test_settling_repeats_what_was_scheduled(schedules):
    for schedule in schedules.values():
        settled = settle_schedule(schedule)
        assert settled.world.shape[1] == ENTRIES
        columns = np.arange(ENTRIES) % schedule.world.shape[1]
        for field in ("world", "seed", "mode"):
            given, wide = getattr(schedule, field), getattr(settled, field)
            np.testing.assert_array_equal(wide, np.asarray(given)[:, columns])
        np.testing.assert_array_equal(settled.entries, schedule.entries)
    long = dataclasses.replace(
        schedules["training"],
        **{
            field: jnp.tile(getattr(schedules["training"], field), (1, 2))
            for field in ("world", "seed", "mode")
        },
    )
    assert settle_schedule(long).world.shape[1] == 2 * ENTRIES
