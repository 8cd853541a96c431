"""Sizes that fit, and what is said of those that do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.plan.parse import render_turn
from jaxplan.rollout.rounds import init_carry
from jaxplan.rollout.schedule import make_worlds, training_schedule
from jaxplan.rollout.setup import check_sizes, longest_turn, make_language
from tests.rollout.conftest import PLAN, ROLLOUT

# Prompt 6, tags 5 + 4, "Dig Well" 6, budget 4; an observation has room for 8.
TURN = 5 + 4 + 6 + 4
SEEN = 1 * (8 + 5 + 4 + 6) + 4 + 5 + 4 + 6  # one turn of the past, and a plan
SMALLEST = dataclasses.replace(
    ROLLOUT, rounds=7, decode_steps=2, segment_tokens=6 + SEEN + 8 + TURN + 8
)


def check(setting, **sizes):
    config = dataclasses.replace(SMALLEST, **sizes)
    check_sizes(setting.language, config, PLAN, setting.turn_tokens)


def test_the_longest_turn_is_the_longest_one_can_write(setting):
    lengths = [
        len(render_turn(setting.tokenizer, setting.language.grammar, plan, name))
        for name in setting.env.action_names
        for plan in (None, " stone" * PLAN.budget)
    ]
    assert longest_turn(setting.tokenizer, setting.env, PLAN) == max(lengths) == TURN


def test_sizes_that_just_fit_are_accepted(setting):
    check(setting)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"observation_tokens": 1}, ["observation_tokens=1", "takes 2 tokens"]),
        (
            {"rounds": 6},
            ["rounds=6", "decode_steps=2", "18 tokens", f"has {TURN}", "budget=4"],
        ),
        (
            {"segment_tokens": SMALLEST.segment_tokens - 1},
            [
                f"segment_tokens={SMALLEST.segment_tokens - 1}",
                "prompt 6",
                f"visible {SEEN}",
                "history=2",
                f"= {SMALLEST.segment_tokens} tokens",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(setting, sizes, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        check(setting, **sizes)
    for word in words:
        assert word in str(error.value)


def test_every_price_is_told_to_as_many_lanes_in_a_row(setting):
    prices = (0.0, 0.25, 10.0)
    plan = dataclasses.replace(PLAN, prices=prices)
    language = make_language(setting.tokenizer, setting.env, plan)
    texts = [
        f"{setting.env.instructions}\n\nA plan token costs {price}."
        for price in ("0", "0.25", "10")
    ]
    prompts = [setting.tokenizer.encode_prompt(text) for text in texts]
    assert [language.prompt(number) for number in range(3)] == prompts
    assert len({len(prompt) for prompt in prompts}) > 1, "of several lengths"

    worlds = make_worlds(setting.env, jnp.arange(2, dtype=jnp.int32))
    key = jax.random.key(0)
    schedule = training_schedule(worlds, key, 0, ROLLOUT.num_lanes)

    def told(language):
        config = dataclasses.replace(ROLLOUT, segment_tokens=128)
        stream = init_carry(setting.env, language, schedule, key, config).stream
        rows = zip(stream.tokens.token, stream.cursor.tolist(), strict=True)
        return [row[:length].tolist() for row, length in rows]

    first, second, third = prompts
    assert told(language) == [first, first, second, second, third, third]
    assert told(language.saying(1)) == [prompts[1]] * ROLLOUT.num_lanes


@pytest.mark.slow
def test_every_lane_gets_on_in_the_smallest_segments(setting):
    worlds = make_worlds(setting.env, jnp.arange(4, dtype=jnp.int32))
    schedule = training_schedule(worlds, jax.random.key(0), 1, ROLLOUT.num_lanes)
    sizes = {f.name: getattr(SMALLEST, f.name) for f in dataclasses.fields(SMALLEST)}
    played = setting.play(schedule, 8, **sizes)
    turns = [np.asarray(carry.lanes.turn) for carry in played.carries]
    # A turn cut off in one segment is finished in the next.
    for before, after in zip(turns[:-2], turns[2:], strict=True):
        assert (after > before).all()
    for segment in played.segments:
        assert (np.asarray(segment.stream.cursor) <= SMALLEST.segment_tokens).all()
