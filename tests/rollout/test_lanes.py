"""Lanes never look at each other, and who sleeps at a segment's end sleeps on."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.core.roles import Role
from jaxplan.rollout import lanes as lane_ops
from tests.rollout.conftest import GAMMA, ROLLOUT

ORDER = np.array([4, 0, 5, 2, 1, 3])
COLLECTIVE = r"all-reduce|all-gather|all-to-all|collective|reduce-scatter"


def rows_of(schedule, rows):
    """The same episodes for some lanes, in another order."""
    return dataclasses.replace(
        schedule,
        **{
            name: getattr(schedule, name)[rows]
            for name in ("world", "seed", "mode", "entries")
        },
    )


def test_permuted_lanes_do_the_same_in_permuted_order(setting, play):
    permuted = setting.play(rows_of(play.schedule, ORDER), segments=3)
    for one, other in zip(play.segments, permuted.segments, strict=False):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.asarray(a)[ORDER], b),
            (one.stream.tokens, one.stream.cursor, one.turns),
            (other.stream.tokens, other.stream.cursor, other.turns),
        )


def beginnings(play):
    """What was said in the segment an episode began in, by (seed, mode, world)."""
    schedule, episodes = jax.device_get(play.schedule), {}
    for segment in play.segments:
        tokens = jax.device_get(segment.stream.tokens)
        said = dataclasses.replace(play, segments=[segment]).said()
        for (lane, episode), turns in said.items():
            of_episode = tokens.role[lane][tokens.episode[lane] == episode]
            if (of_episode != Role.CARRIED).all():
                at = lane, (episode - 1) % schedule.seed.shape[1]
                key = schedule.seed[at], schedule.mode[at], schedule.world[at]
                episodes[tuple(map(int, key))] = turns
    return episodes


def test_an_episode_is_the_same_in_any_batch_and_in_rounds_of_any_size(setting, play):
    others = setting.play(
        rows_of(play.schedule, ORDER[:4]),
        segments=6,
        num_lanes=4,
        rounds=25,
        prefill_tokens=9,
        decode_steps=1,
        segment_tokens=200,
    )
    one, other = beginnings(play), beginnings(others)
    both = [(one[key], other[key]) for key in one.keys() & other.keys()]
    shared = [min(len(a), len(b)) for a, b in both]
    assert sum(shared) > 30
    for (a, b), turns in zip(both, shared, strict=True):
        assert a[:turns] == b[:turns]


def sleepers(play):
    """(segment, lane) of lanes that sleep when the segment ends."""
    for index, carry in enumerate(play.carries[1:-1]):
        lanes = jax.device_get(carry.lanes)
        for lane in np.flatnonzero(lanes.asleep & lanes.live):
            yield index, int(lane)


def test_who_sleeps_at_the_end_of_a_segment_is_paid_and_sleeps_on(play):
    count = 0
    for index, lane in sleepers(play):
        before, after = jax.device_get(play.segments[index : index + 2])
        slot = before.turns.slot[lane]
        closed = jax.tree.map(lambda x, at=(lane, slot - 1): x[at], before.turns.end)
        assert closed.complete
        assert 0 < closed.discount <= np.float32(GAMMA)
        assert not before.turns.end.complete[lane, slot], "it bootstraps on this slot"
        number = before.turns.number[lane, slot]
        assert after.turns.number[lane, 0] == number
        assert after.turns.end.complete[lane, 0]
        own = after.stream.tokens.turn[lane] == number
        assert (after.stream.tokens.role[lane][own] == Role.CARRIED).all()
        assert not after.turns.end.planned[lane, 0]
        count += 1
    assert count


def test_sleep_across_segments_is_one_turn_of_the_episode(play):
    for index, lane in sleepers(play):
        carry = play.carries[index + 1].lanes
        woken = play.carries[index + 2].lanes
        assert not (woken.asleep[lane] and woken.turn[lane] == carry.turn[lane])
        # The turn the segment closed was begun, but is no choice yet.
        assert carry.stats.turns[lane] == carry.episode_turn[lane]


def test_worlds_on_eight_devices_step_without_a_word_to_each_other(setting, play):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_lane = jax.NamedSharding(mesh, jax.P("data"))
    alike = jax.NamedSharding(mesh, jax.P())
    rows = np.arange(8) % ROLLOUT.num_lanes
    schedule = rows_of(play.schedule, rows)
    lanes = jax.tree.map(lambda leaf: leaf[rows], play.carries[1].lanes)

    def step(lanes, grammar, worlds, *schedule_rows):
        moved, end, finished = jax.vmap(
            lambda lane: lane_ops.act(lane, setting.env, grammar, GAMMA, False)
        )(lanes)
        moved = jax.vmap(lane_ops.begin_episode, in_axes=(0, 0, None, 0))(
            moved, schedule_rows, worlds, finished.terminated
        )
        begin = end.complete | finished.terminated
        return jax.vmap(lane_ops.begin_turn, in_axes=(0, None, 0))(moved, 4, begin)

    arguments = (
        jax.device_put(lanes, by_lane),
        jax.device_put(setting.language.grammar, alike),
        jax.device_put(schedule.worlds, alike),
        *jax.device_put(
            (schedule.world, schedule.seed, schedule.mode, schedule.entries), by_lane
        ),
    )
    compiled = jax.jit(step, out_shardings=by_lane).lower(*arguments).compile()
    assert not re.findall(COLLECTIVE, compiled.as_text())


def test_keys_of_worlds_and_tokens_never_meet(play):
    lane = jax.tree.map(lambda leaf: leaf[0], play.carries[1].lanes)
    data = [
        jax.random.key_data(lane_ops.world_key(lane.key, jnp.int32(step)))
        for step in range(20)
    ]
    for turn in range(6):
        for generated in range(6):
            said = dataclasses.replace(
                lane, episode_turn=jnp.int32(turn), generated=jnp.int32(generated)
            )
            data.append(jax.random.key_data(lane_ops.token_key(said)))
    assert len({tuple(np.asarray(key).tolist()) for key in data}) == len(data)
