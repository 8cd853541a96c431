"""Every episode of a panel once, whatever the lanes; every world from its seed."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.core.roles import Role
from jaxplan.plan.grammar import NEVER
from jaxplan.rollout.schedule import (
    ENTRIES,
    Dealer,
    EpisodeList,
    every_world_in_every_mode,
    make_worlds,
    training_schedule,
)
from tests.fakes import Shore
from tests.rollout.conftest import ROLLOUT, WORLDS, Play

MODES = (NEVER, 2, 3)
PANEL_SEGMENTS = 9


def listed(worlds, modes):
    return every_world_in_every_mode(
        jnp.arange(worlds),
        jnp.arange(100, 100 + worlds, dtype=jnp.int32),
        jnp.arange(modes, dtype=jnp.int32),
    )


@pytest.mark.parametrize(("worlds", "modes"), [(6, 2), (1, 3), (5, 1)])
def test_a_panel_has_every_world_in_every_mode_once(worlds, modes):
    episodes = listed(worlds, modes)
    np.testing.assert_array_equal(episodes.seed, 100 + episodes.world)
    pairs = zip(episodes.seed.tolist(), episodes.mode.tolist(), strict=True)
    wanted = {(100 + w, mode): 1 for w in range(worlds) for mode in range(modes)}
    assert Counter(pairs) == wanted
    assert len(episodes) == worlds * modes
    assert episodes.mode[:modes].tolist() == list(range(modes))


def play_by_hand(worlds, modes, lanes, turns_of, turns, fewer=0):
    """Lanes that play so many turns a segment; episode e takes ``turns_of(e)``.

    Returns:
        The episodes in the order they ended, the lanes of every segment, and the most
        episodes that a lane had before it in any segment.
    """
    episodes = listed(worlds, modes)
    dealer = Dealer(episodes, lanes, fewer)
    schedules, ended = dealer.schedules(), []
    entry, left = [0] * lanes, [None] * lanes
    widths, most = [], 0
    while len(ended) < len(episodes):
        plan = jax.device_get(next(schedules, None))
        if plan is None:
            kept, schedules = dealer.narrow().tolist(), dealer.schedules()
            assert [lane for lane in range(lanes) if left[lane]] == sorted(
                lane for lane in kept if left[lane]
            ), "nobody is left in the middle of an episode"
            assert kept[0] == 0
            entry, left = [entry[lane] for lane in kept], [left[lane] for lane in kept]
            lanes = len(kept)
            continue
        assert plan.world.shape == (lanes, ENTRIES), "one program for all"
        widths, over = [*widths, lanes], []
        most = max(most, *(plan.entries - entry))
        for lane in range(lanes):
            time = turns
            while time and entry[lane] < plan.entries[lane]:
                column = entry[lane] % ENTRIES
                world, mode = plan.world[lane, column], plan.mode[lane, column]
                at = int(world * modes + mode)
                assert plan.seed[lane, column] == episodes.seed[at]
                left[lane] = turns_of(at) if left[lane] is None else left[lane]
                used = min(time, left[lane])
                time, left[lane] = time - used, left[lane] - used
                if not left[lane]:
                    over.append((lane, entry[lane], at))
                    entry[lane], left[lane] = entry[lane] + 1, None
        lane, which, at = np.array(over, int).reshape(-1, 3).T
        np.testing.assert_array_equal(dealer.collect(lane, which), at)
        ended += at.tolist()
    return ended, widths, most


@pytest.mark.parametrize("lanes", [1, 3, 7, 40])
def test_every_episode_is_dealt_once_whatever_the_lanes(lanes):
    ended, _, _ = play_by_hand(8, 4, lanes, turns_of=lambda e: 1 + e % 5, turns=4)
    assert sorted(ended) == list(range(32))


def test_lanes_whose_episodes_are_short_are_dealt_more():
    def turns_of(episode):  # all of the first lane are long, if dealt out in turn
        return 40 if episode % 4 == 0 else 10

    _, widths, _ = play_by_hand(16, 4, 4, turns_of, turns=5)
    segments, total = len(widths), sum(turns_of(e) for e in range(64))
    assert segments <= (total / 4 + 40 + 10) / 5, "at the end a lane may wait for one"
    assert segments < 16 * 40 / 5, "sooner than who is dealt them in turn"


def test_short_episodes_are_dealt_many_at_a_time_but_not_more_than_fit():
    _, widths, most = play_by_hand(400, 1, 2, turns_of=lambda e: 1, turns=100)
    assert most == ENTRIES
    assert len(widths) < 30


@pytest.mark.parametrize("long", [3, 24, 39])  # in one of the last ones and before
def test_long_lives_at_the_end_are_played_in_fewer_lanes(long):
    def turns_of(episode):
        return 60 if episode == long else 1 + episode % 6

    ended, widths, _ = play_by_hand(10, 4, 8, turns_of, turns=4, fewer=2)
    assert sorted(ended) == list(range(40))
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == {8, 2}
    assert widths.count(8) < 12


def test_few_episodes_are_played_in_fewer_lanes_from_the_start():
    ended, widths, _ = play_by_hand(2, 1, 8, turns_of=lambda e: 9, turns=4, fewer=2)
    assert sorted(ended) == [0, 1]
    assert widths == [2, 2, 2]


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


@dataclasses.dataclass(frozen=True)
class Panel:
    """A panel to its end and a segment beyond; ``dealt[lane, entry]`` of the list."""

    play: Play
    episodes: EpisodeList
    dealt: dict[tuple[int, int], int]


@pytest.fixture(scope="module")
def panel(setting):
    seeds = jnp.arange(WORLDS, dtype=jnp.int32)
    worlds = make_worlds(setting.env, seeds)
    episodes = every_world_in_every_mode(worlds, seeds, jnp.array(MODES, jnp.int32))
    dealer = Dealer(episodes, ROLLOUT.num_lanes)
    schedules, dealt, played = dealer.schedules(), {}, []
    schedule = next(schedules)
    carries = [setting.first_carry(schedule)]
    for _ in range(PANEL_SEGMENTS):
        carry, segment = setting.run(carries[-1], next(schedules))
        carries.append(carry)
        played.append(segment)
        ends = jax.device_get(segment.episodes)
        where = np.nonzero(ends.finished)
        entries = ends.entry[where]
        for lane, entry, number in zip(
            where[1].tolist(),
            entries.tolist(),
            dealer.collect(where[1], entries).tolist(),
            strict=True,
        ):
            assert (lane, entry) not in dealt
            dealt[lane, entry] = number
    return Panel(Play(schedule, carries, played), episodes, dealt)


def test_a_panel_is_played_once_and_then_the_lanes_are_still(panel):
    assert sorted(panel.dealt.values()) == list(range(WORLDS * len(MODES)))
    last = panel.play.segments[-1]
    assert not np.asarray(panel.play.carries[-1].lanes.live).any()
    assert not last.env_steps.any()
    assert (last.encoded_tokens == 1).all(), "the last token of each prompt"
    assert (np.asarray(last.stream.tokens.role) <= Role.PROMPT).all()
    assert not np.asarray(last.turns.end.complete).any()


def test_modes_of_a_batch_plan_in_exactly_the_turns_they_should(setting, panel):
    opening = setting.words.opening[0]
    seen = set()
    for (lane, episode), turns in panel.play.said().items():
        every = int(panel.episodes.mode[panel.dealt[lane, episode - 1]])
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
