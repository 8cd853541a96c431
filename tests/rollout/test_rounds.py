"""Rollouts against a plain Python replay of the same lanes, field by field."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest

from jaxplan.core.roles import Role, Span
from jaxplan.plan.parse import parse_turn
from tests.rollout.conftest import PLAN, ROLLOUT
from tests.rollout.reference import FIELDS, Reference, Row


@dataclasses.dataclass(frozen=True)
class Moment:
    """A lane after a segment, as the reference has it, and what it carries over."""

    rows: list[Row]
    slots: list
    ends: list
    env_steps: int
    encoded: int
    carried: list[Row]
    cut_off: bool
    asleep: bool
    live: bool
    mode: int


@pytest.fixture(scope="module")
def replay(setting, play) -> list[list[Moment]]:
    """Every segment, and in it every lane, played once more."""
    lanes = [
        Reference(setting, play.schedule, lane) for lane in range(ROLLOUT.num_lanes)
    ]
    return [
        [replay_lane(lane, tokens) for lane, tokens in zip(lanes, said, strict=True)]
        for said in (np.asarray(s.stream.tokens.token) for s in play.segments)
    ]


def replay_lane(lane, tokens) -> Moment:
    lane.segment(tokens)
    rows, mode = lane.rows, lane.mode
    carried = lane.carry_over()
    same = ("slots", "ends", "env_steps", "encoded", "cut_off", "asleep", "live")
    found = {name: getattr(lane, name) for name in same}
    return Moment(rows=rows, carried=carried, mode=mode, **found)


@pytest.fixture(scope="module")
def moments(replay) -> list[Moment]:
    return [moment for segment in replay for moment in segment]


def check_stream(stream, lane, rows):
    length = len(rows)
    assert int(stream.cursor[lane]) == length
    for name in FIELDS:
        expected = [getattr(row, name) for row in rows]
        actual = np.asarray(getattr(stream.tokens, name)[lane])
        np.testing.assert_array_equal(actual[:length], expected, err_msg=name)
    assert (np.asarray(stream.tokens.role[lane, length:]) == Role.PAD).all()


def test_streams_hold_what_the_replay_writes(play, replay):
    for segment, lanes in zip(play.segments, replay, strict=True):
        for lane, moment in enumerate(lanes):
            check_stream(segment.stream, lane, moment.rows)


def test_the_next_segment_begins_with_all_that_the_current_turn_sees(play, replay):
    for carry, lanes in zip(play.carries[1:], replay, strict=True):
        for lane, moment in enumerate(lanes):
            check_stream(carry.stream, lane, moment.carried)


def test_turns_earn_what_the_replay_earns(play, replay):
    for segment, lanes in zip(play.segments, replay, strict=True):
        turns = jax.device_get(segment.turns)
        for lane, moment in enumerate(lanes):
            slots = moment.slots
            assert turns.slot[lane] == len(slots) - 1
            assert not turns.end.complete[lane, len(slots) :].any()
            for slot, expected in enumerate(slots):
                assert turns.start[lane, slot] == expected.start
                assert turns.number[lane, slot] == expected.number
                assert turns.end.complete[lane, slot] == expected.complete
                if expected.complete:
                    end = jax.tree.map(lambda x, at=(lane, slot): x[at], turns.end)
                    assert end.action == expected.action
                    assert end.planned == expected.planned
                    assert end.plan_tokens == expected.plan_tokens
                    assert end.reward == pytest.approx(expected.reward, rel=1e-5)
                    assert end.discount == pytest.approx(expected.discount, rel=1e-5)


def test_episodes_are_accounted_for_as_in_the_replay(play, replay):
    for segment, lanes in zip(play.segments, replay, strict=True):
        ends = jax.device_get(segment.episodes)
        expected = {
            (end.round, lane): end for lane, m in enumerate(lanes) for end in m.ends
        }
        assert {tuple(at) for at in np.argwhere(ends.finished)} == set(expected)
        for at, end in expected.items():
            assert ends.terminated[at] == end.terminated
            assert ends.entry[at] == end.entry
            told = {**vars(ends.stats), **ends.stats.counts}
            for name, number in vars(end.account).items():
                np.testing.assert_allclose(
                    told[name][at], number, rtol=1e-5, err_msg=name
                )


def test_steps_and_tokens_of_a_segment_are_counted(play, replay):
    for segment, lanes in zip(play.segments, replay, strict=True):
        assert segment.env_steps.tolist() == [m.env_steps for m in lanes]
        assert segment.encoded_tokens.tolist() == [m.encoded for m in lanes]
        assert not segment.dropped_phrases.any()
        calls = ROLLOUT.prefill_tokens + ROLLOUT.decode_steps
        assert (segment.token_slots == ROLLOUT.rounds * calls).all()


def test_what_is_said_parses_to_the_action_that_is_played(setting, moments):
    for moment in moments:
        for slot in moment.slots:
            said = [
                row.token
                for row in moment.rows
                if row.turn == slot.number and row.role >= Role.DECIDE
            ]
            if slot.complete and said:
                turn = parse_turn(
                    setting.language.grammar, setting.tokenizer, said, PLAN.budget
                )
                assert turn.action == slot.action
                assert (turn.plan is not None) == slot.planned


def test_the_play_has_everything_in_it(setting, moments):
    """The tests above say little of what never happened."""
    slots = [(m, slot) for m in moments for slot in m.slots if slot.complete]
    lengths = Counter(slot.plan_tokens for _, slot in slots)
    ends = [end for moment in moments for end in moment.ends]
    assert {end.terminated for end in ends} == {True, False}
    assert lengths[PLAN.budget] > 2, "a plan uses its budget"
    assert sum(lengths[n] for n in range(1, PLAN.budget)) > 2, "a plan ends before"
    assert {slot.action for _, slot in slots} == {-1, *range(6)}
    assert {moment.mode for moment in moments} == {-1, 0, 1, 2}
    assert any(m.cut_off for m in moments), "a turn starts again"
    assert any(m.asleep and m.live for m in moments), "a segment ends in sleep"
    assert any(not m.live for m in moments), "a schedule is exhausted"
    assert any(plan_age(m) >= ROLLOUT.history for m in moments), "a plan outlives turns"
    needed = setting.turn_tokens + ROLLOUT.observation_tokens
    room = [ROLLOUT.segment_tokens - len(moment.rows) for moment in moments]
    assert min(room) < needed, "a segment is full"


def plan_age(moment: Moment) -> int:
    """Turns since the plan was made that the lane carries over; 0 without one."""
    planned = [r.turn for r in moment.carried if r.span in (Span.PLAN, Span.TAG)]
    return moment.carried[-1].turn - planned[0] if planned else 0
