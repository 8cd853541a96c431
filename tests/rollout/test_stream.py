"""Writing into streams, and what of them begins the next segment."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.core.roles import Role, Span
from jaxplan.models.visibility import NO_PLAN, PROMPT_EPISODE
from jaxplan.rollout.stream import (
    Stream,
    append,
    carry_over,
    empty_tokens,
    prompt_streams,
    unencoded,
)

LANES, CAPACITY, CHUNK = 4, 20, 5


def prompt_stream(prompt, num_lanes, capacity):
    """All lanes with one prompt."""
    prompts = jnp.broadcast_to(prompt, (num_lanes, len(prompt)))
    return prompt_streams(prompts, jnp.full(num_lanes, len(prompt)), capacity)


def test_tokens_are_appended_at_every_lane_s_own_place():
    rng = np.random.default_rng(0)
    stream = prompt_stream(jnp.array([7, 8], jnp.int32), LANES, CAPACITY)
    expected = [[7, 8] for _ in range(LANES)]
    append_jit = jax.jit(append)
    for _ in range(4):
        token = rng.integers(1, 50, (LANES, CHUNK)).astype(np.int32)
        lengths = rng.integers(0, CHUNK, LANES).astype(np.int32)
        new = dataclasses.replace(empty_tokens(LANES, CHUNK), token=jnp.asarray(token))
        stream = append_jit(stream, new, jnp.asarray(lengths))
        for lane in range(LANES):
            expected[lane] += token[lane, : lengths[lane]].tolist()
    for lane in range(LANES):
        length = int(stream.cursor[lane])
        assert stream.tokens.token[lane, :length].tolist() == expected[lane]
        assert not np.asarray(stream.tokens.token[lane, length:]).any()


def test_a_prompt_is_seen_by_every_episode_and_never_learnt_from():
    tokens = prompt_stream(jnp.array([7, 8], jnp.int32), 1, 4).tokens
    assert tokens.role[0].tolist() == [Role.PROMPT] * 2 + [Role.PAD] * 2
    assert tokens.episode[0].tolist() == [PROMPT_EPISODE] * 2 + [0] * 2
    assert not tokens.sampled.any()


def test_the_tokens_not_yet_read_come_in_chunks():
    stream = prompt_stream(jnp.arange(9, dtype=jnp.int32), 3, CAPACITY)
    ids, meta, lengths = unencoded(stream, jnp.array([0, 6, 9]), CHUNK)
    assert lengths.tolist() == [5, 3, 0]
    assert ids[0].tolist() == [0, 1, 2, 3, 4]
    assert ids[1, :3].tolist() == [6, 7, 8]
    assert meta.position[1].tolist() == [6, 7, 8, 9, 10]


def test_the_active_plan_is_kept_however_old_and_the_cut_off_turn_is_not():
    # token, episode, turn, plan, span
    story = [
        (1, PROMPT_EPISODE, 0, NO_PLAN, Span.NONE),
        (2, 1, 1, 1, Span.PLAN),  # of an episode that is over
        (3, 2, 2, NO_PLAN, Span.NONE),
        (4, 2, 2, 2, Span.TAG),  # superseded
        (5, 2, 2, NO_PLAN, Span.ACTION),
        (6, 2, 3, NO_PLAN, Span.NONE),
        (7, 2, 3, 3, Span.TAG),  # the active plan
        (8, 2, 3, 3, Span.PLAN),
        (9, 2, 3, NO_PLAN, Span.ACTION),
        (10, 2, 6, NO_PLAN, Span.NONE),  # too old for a history of two
        (11, 2, 7, NO_PLAN, Span.NONE),
        (12, 2, 7, NO_PLAN, Span.ACTION),
        (13, 2, 8, NO_PLAN, Span.NONE),  # the current observation
        (14, 2, 8, 4, Span.TAG),  # cut off
        (15, 2, 8, 4, Span.PLAN),
    ]
    token, episode, turn, plan, span = jnp.array(story, jnp.int32).T[:, None]
    role = jnp.where(token == 1, Role.PROMPT, Role.ACTION).astype(jnp.int32)
    tokens = dataclasses.replace(
        empty_tokens(1, len(story)),
        token=token,
        episode=episode,
        turn=turn,
        plan=plan,
        span=span,
        role=role,
        sampled=role == Role.ACTION,
    )
    stream = Stream(tokens=tokens, cursor=jnp.array([len(story)]))

    def kept(episode, active_plan):
        numbers = (jnp.array([n]) for n in (8, episode, active_plan))
        return carry_over(stream, *numbers, history=2)

    carried = kept(episode=2, active_plan=3)
    length = int(carried.cursor[0])
    assert carried.tokens.token[0, :length].tolist() == [1, 7, 8, 11, 12, 13]
    roles = [Role.PROMPT] + [Role.CARRIED] * 5
    assert carried.tokens.role[0, :length].tolist() == roles
    assert not carried.tokens.sampled.any()
    assert (carried.tokens.role[0, length:] == Role.PAD).all()
    assert kept(episode=3, active_plan=3).cursor[0] == 1, "a new episode: the prompt"
    both = tokens, empty_tokens(1, 4)
    padded = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *both)
    numbers = (jnp.array([n]) for n in (1, 0, 3))  # ended in its second turn
    ended = carry_over(Stream(tokens=padded, cursor=stream.cursor), *numbers, 2)
    assert ended.cursor[0] == 1, "no episode, and no padding in its place"
