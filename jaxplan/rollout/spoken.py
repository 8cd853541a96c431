"""What agents said, read from the segments of a rollout (host)."""

import chex
import jax
import numpy as np

from jaxplan.core.roles import Role, Span
from jaxplan.models.visibility import NO_PLAN
from jaxplan.rollout.segment import Segment
from jaxplan.text.tokenizer import Tokenizer


@chex.dataclass(frozen=True)
class SpokenTurn:
    """One complete turn of an episode."""

    observation: str
    plan: str  # empty: none was written
    action: int


def spoken_turns(
    segments: list[Segment], tokenizer: Tokenizer, entry: int, lane: int = 0
) -> list[SpokenTurn]:
    """Read the turns of one lane's episode from its segments.

    Args:
        segments: in order, on the host.
        tokenizer: of the agent.
        entry: which of the lane's episodes, from 0.
        lane: row of the segments.
    """
    turns = []
    for segment in segments:
        tokens = jax.tree.map(lambda array: array[lane], segment.stream.tokens)
        end = jax.tree.map(lambda array: array[lane], segment.turns.end)
        number = segment.turns.number[lane]
        for slot in np.flatnonzero(end.complete):
            of_turn = tokens.turn == number[slot]
            of_turn &= (tokens.episode == entry + 1) & (tokens.role != Role.PROMPT)
            said = of_turn & (tokens.span != Span.NONE)
            if not said.any():
                continue  # asleep, or another episode
            seen = of_turn & ~said & (tokens.plan == NO_PLAN)
            text = said & (tokens.span == Span.PLAN)
            turns.append(
                SpokenTurn(
                    observation=tokenizer.decode(tokens.token[seen].tolist()).strip(),
                    plan=tokenizer.decode(tokens.token[text].tolist()).strip(),
                    action=int(end.action[slot]),
                )
            )
    return turns
