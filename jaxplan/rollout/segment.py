"""What one rollout hands to the update: streams, turns, and the episodes that ended."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxplan.rollout.lanes import EpisodeEnd, TurnEnd
from jaxplan.rollout.stream import Stream


@chex.dataclass(frozen=True)
class Turns:
    """The turns of a segment in slots of equal number for every lane.

    The value of slot h is read at ``start - 1``, the last token before the turn's first
    generated one. Slot h + 1 always holds what slot h bootstraps on: the next turn of
    the episode, the observation that closes the segment, or a terminal observation.

    Attributes:
        start: stream position of the turn's first generated token; 0 where no turn is.
        number: the turn's number in the lane's life, as in ``Tokens.turn``.
        end: see ``TurnEnd``; slots without a complete turn have no loss.
    """

    start: Int[Array, "B H"]
    number: Int[Array, "B H"]
    end: TurnEnd  # [B, H]
    slot: Int[Array, " B"]  # the slot of the current turn


@chex.dataclass(frozen=True)
class Segment:
    """One rollout of every lane.

    Attributes:
        stream: the tokens, prefix included.
        turns: the turns, in order.
        episodes: episodes that ended, [rounds + 1, B].
        dropped_phrases: phrases that found no room in an observation.
        encoded_tokens: tokens the model read or wrote.
        env_steps: steps of the world, sleeping ones included.
        token_slots: tokens the model has room for in all rounds, those in which nobody
            asked it among them.
    """

    stream: Stream
    turns: Turns
    episodes: EpisodeEnd
    dropped_phrases: Int[Array, " B"]
    encoded_tokens: Int[Array, " B"]
    env_steps: Int[Array, " B"]
    token_slots: Int[Array, " B"]


def empty_turns(num_lanes: int, slots: int) -> Turns:
    """No turn in any slot, the first slot current."""
    shape = (num_lanes, slots)
    zeros, nothing = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    end = TurnEnd(
        complete=jnp.zeros(shape, bool),
        reward=nothing,
        discount=nothing,
        plan_tokens=zeros,
        planned=jnp.zeros(shape, bool),
        action=zeros,
    )
    slot = jnp.zeros(num_lanes, jnp.int32)
    return Turns(start=zeros, number=zeros, end=end, slot=slot)


def end_turn(turns: Turns, end: TurnEnd) -> Turns:
    """Write the ends of complete turns into their slots."""
    rows = jnp.arange(turns.slot.shape[0])
    slots = turns.start.shape[1]
    column = jnp.where(end.complete, turns.slot, slots)  # others are dropped
    written = jax.tree.map(
        lambda old, new: old.at[rows, column].set(new, mode="drop"), turns.end, end
    )
    return dataclasses.replace(turns, end=written)


def start_turn(
    turns: Turns,
    begin: Bool[Array, " B"],
    start: Int[Array, " B"],
    number: Int[Array, " B"],
) -> Turns:
    """Move the lanes that begin a turn on to their next slot."""
    rows = jnp.arange(turns.slot.shape[0])
    slot = turns.slot + begin.astype(jnp.int32)
    column = jnp.where(begin, slot, turns.start.shape[1])
    return dataclasses.replace(
        turns,
        start=turns.start.at[rows, column].set(start, mode="drop"),
        number=turns.number.at[rows, column].set(number, mode="drop"),
        slot=slot,
    )
