"""The token stream of every lane: what was said, by whom, and what may see it.

The rollout writes it, the update reads it: ids, grammar states, log-probabilities and
visibility are stored once and never computed again from text.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxplan.core.roles import Role, Span
from jaxplan.models.visibility import NO_PLAN, PROMPT_EPISODE, TokenMeta


@chex.dataclass(frozen=True)
class Tokens:
    """Per-token facts; the leading axes are lanes and positions of the stream.

    Attributes:
        token: vocabulary id.
        role: ``Role``: how the token is trained.
        span: ``Span``: what a generated token is.
        state: grammar state the token was generated in.
        sampled: True where the policy had a choice.
        log_prob: behaviour log-probability among the legal tokens.
        decide_log_prob: its factor "plan or act", 0 where there was no such choice.
        turn: number of the turn in the lane's life.
        episode: number of the episode in the lane's life; 0 padding, -1 prompt.
        plan: number of the plan the token belongs to, or ``NO_PLAN``.
        active_plan: the oldest plan the token can see.
    """

    token: Int[Array, "*axes"]
    role: Int[Array, "*axes"]
    span: Int[Array, "*axes"]
    state: Int[Array, "*axes"]
    sampled: Bool[Array, "*axes"]
    log_prob: Float[Array, "*axes"]
    decide_log_prob: Float[Array, "*axes"]
    turn: Int[Array, "*axes"]
    episode: Int[Array, "*axes"]
    plan: Int[Array, "*axes"]
    active_plan: Int[Array, "*axes"]


@chex.dataclass(frozen=True)
class Stream:
    """A fixed-length token array for every lane, filled up to its cursor."""

    tokens: Tokens  # [B, S]
    cursor: Int[Array, " B"]


def empty_tokens(*shape: int) -> Tokens:
    """Padding: no role, no episode, visible to nothing."""
    zeros = jnp.zeros(shape, jnp.int32)
    return Tokens(
        token=zeros,
        role=zeros,
        span=zeros,
        state=zeros,
        sampled=jnp.zeros(shape, bool),
        log_prob=jnp.zeros(shape, jnp.float32),
        decide_log_prob=jnp.zeros(shape, jnp.float32),
        turn=zeros,
        episode=zeros,
        plan=jnp.full(shape, NO_PLAN, jnp.int32),
        active_plan=zeros,
    )


def prompt_streams(
    prompts: Int[Array, "B prompt"], lengths: Int[Array, " B"], segment_tokens: int
) -> Stream:
    """Streams that hold nothing but a prompt each.

    Args:
        prompts: filled up at the end with anything.
        lengths: of the prompts.
        segment_tokens: length of a stream.
    """
    num_lanes, width = prompts.shape
    inside = jnp.arange(width)[None, :] < lengths[:, None]
    blank = empty_tokens(num_lanes, width)
    head = dataclasses.replace(
        blank,
        token=jnp.where(inside, prompts, blank.token),
        role=jnp.where(inside, jnp.int32(Role.PROMPT), blank.role),
        episode=jnp.where(inside, jnp.int32(PROMPT_EPISODE), blank.episode),
    )
    tail = empty_tokens(num_lanes, segment_tokens - width)
    tokens = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), head, tail)
    return Stream(tokens=tokens, cursor=lengths.astype(jnp.int32))


def append(stream: Stream, new: Tokens, lengths: Int[Array, " B"]) -> Stream:
    """Write the first ``lengths[b]`` new tokens [B, C] at every lane's cursor."""
    num_lanes, chunk = new.token.shape
    capacity = stream.tokens.token.shape[1]
    offset = jnp.arange(chunk, dtype=jnp.int32)[None, :]
    position = stream.cursor[:, None] + offset
    position = jnp.where(offset < lengths[:, None], position, capacity)  # dropped
    rows = jnp.arange(num_lanes, dtype=jnp.int32)[:, None]
    tokens = jax.tree.map(
        lambda old, values: old.at[rows, position].set(values, mode="drop"),
        stream.tokens,
        new,
    )
    return Stream(tokens=tokens, cursor=stream.cursor + lengths)


def metadata(tokens: Tokens, position: Int[Array, "B T"]) -> TokenMeta:
    """What attention needs to know of tokens that stand at ``position``."""
    return TokenMeta(
        position=position,
        episode=tokens.episode,
        turn=tokens.turn,
        plan=tokens.plan,
        active_plan=tokens.active_plan,
    )


def stream_metadata(tokens: Tokens) -> TokenMeta:
    """``metadata`` of whole streams: positions count from their beginning."""
    position = jnp.arange(tokens.token.shape[-1], dtype=jnp.int32)
    return metadata(tokens, jnp.broadcast_to(position, tokens.token.shape))


def unencoded(
    stream: Stream, encoded: Int[Array, " B"], chunk: int
) -> tuple[Int[Array, "B C"], TokenMeta, Int[Array, " B"]]:
    """The next ``chunk`` tokens that a cache filled to ``encoded`` has not seen.

    Returns:
        Their ids, their metadata, and how many of them are real.
    """
    position = encoded[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None, :]
    inside = jnp.minimum(position, stream.tokens.token.shape[1] - 1)
    tokens = jax.tree.map(
        lambda array: jnp.take_along_axis(array, inside, axis=1), stream.tokens
    )
    lengths = jnp.clip(stream.cursor - encoded, 0, chunk)
    return tokens.token, metadata(tokens, position), lengths


def carry_over(
    stream: Stream,
    turn: Int[Array, " B"],
    episode: Int[Array, " B"],
    active_plan: Int[Array, " B"],
    history: int,
) -> Stream:
    """The beginning of the next segment: all that the current turn can still see.

    Kept are the prompt, the active plan and the last ``history`` turns of the episode,
    the current observation among them; what was generated in the current, unfinished
    turn is left behind, so the turn starts again from its observation.

    Args:
        stream: the segment just finished.
        turn: the current turn of every lane.
        episode: its episode; 0, which is none's, keeps nothing but the prompt.
        active_plan: the newest complete plan.
        history: turns that stay visible.
    """
    tokens = stream.tokens
    capacity = tokens.token.shape[1]
    is_prompt = tokens.role == Role.PROMPT
    unfinished = (tokens.turn == turn[:, None]) & (tokens.span != Span.NONE)
    recent = (tokens.plan == NO_PLAN) & (turn[:, None] - tokens.turn < history)
    pinned = tokens.plan == active_plan[:, None]
    own = (tokens.episode == episode[:, None]) & (tokens.role != Role.PAD)
    keep = is_prompt | (own & (recent | pinned) & ~unfinished)
    target = jnp.where(keep, jnp.cumsum(keep, axis=1) - 1, capacity)
    rows = jnp.arange(keep.shape[0], dtype=jnp.int32)[:, None]
    moved = jax.tree.map(
        lambda blank, old: blank.at[rows, target].set(old, mode="drop"),
        empty_tokens(*tokens.token.shape),
        tokens,
    )
    role = jnp.where(
        (moved.role == Role.PROMPT) | (moved.role == Role.PAD),
        moved.role,
        jnp.int32(Role.CARRIED),
    )
    carried = dataclasses.replace(
        moved, role=role, sampled=jnp.zeros_like(moved.sampled)
    )
    return Stream(tokens=carried, cursor=jnp.sum(keep, axis=1, dtype=jnp.int32))
