"""Turns for people (host): ids to plan text and action, and back.

The rollout never needs this, as the automaton has parsed every token it let pass. It
serves datasets, reports and steering, and its errors say where a turn goes wrong.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxplan.core.roles import Span
from jaxplan.plan.grammar import (
    ACT,
    DECIDE,
    DECIDE_PLAN,
    REJECT,
    TEXT,
    TEXT_FIRST,
    TEXT_FULL,
    Grammar,
    Vocabulary,
)

_SHOWN = 8  # legal tokens an error names


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """A turn for people: the plan's text or None, the action id, a span per token."""

    plan: str | None
    action: int
    spans: tuple[Span, ...]


class TurnError(ValueError):
    """The ids are not a turn.

    Attributes:
        position: index of the first token that is wrong or missing.
        expected: the texts of what may stand there.
    """

    def __init__(self, position: int, given: str, expected: tuple[str, ...]) -> None:
        super().__init__(
            f"turn, position {position}: {given}, but expected {' or '.join(expected)}"
        )
        self.position = position
        self.expected = expected


def parse_turn(
    grammar: Grammar, tokenizer: Vocabulary, ids: Sequence[int], budget: int
) -> ParsedTurn:
    """Read the generated tokens of one turn, whatever mode they were made in.

    Args:
        grammar: the automaton.
        tokenizer: the one the grammar was made with.
        ids: all generated tokens of the turn.
        budget: plan-text tokens a plan may have.

    Raises:
        TurnError: the ids are not a complete turn, or more than one.
    """
    tables = jax.device_get(grammar)
    state, remaining, spans = DECIDE, budget, []
    for position, token in enumerate(ids):
        known = 0 <= token < tables.legal.shape[1]
        following = int(tables.next_state[state, token]) if known else REJECT
        if following == REJECT:
            given = repr(tokenizer.decode([token])) if known else f"unknown id {token}"
            raise TurnError(position, given, _expected(tables, tokenizer, state))
        spans.append(Span(tables.entered_by[following]))
        remaining -= following == TEXT
        state = TEXT_FULL if following == TEXT and remaining <= 0 else following
    if tables.action[state] < 0:
        raise TurnError(len(ids), "the end", _expected(tables, tokenizer, state))
    plan = [i for i, kind in zip(ids, spans, strict=True) if kind == Span.PLAN]
    return ParsedTurn(
        plan="".join(map(tokenizer.text_of, plan)) if plan else None,
        action=int(tables.action[state]),
        spans=tuple(spans),
    )


def render_turn(
    tokenizer: Vocabulary, grammar: Grammar, plan_text: str | None, action_name: str
) -> list[int]:
    """Write a turn as ids, as an agent would have: the inverse of ``parse_turn``.

    Args:
        tokenizer: the one the grammar was made with.
        grammar: the automaton.
        plan_text: the exact text between the markers, or None for a turn without plan.
        action_name: the words of the action.

    Raises:
        ValueError: the plan is empty or has text no plan may have, or the action is
            none of this grammar.
    """
    tables = jax.device_get(grammar)
    action = tokenizer.encode_inside(action_name)
    if not _is_action(tables, action):
        raise ValueError(f"action {action_name!r} is not one of this grammar")
    if plan_text is None:
        return action
    text = tokenizer.encode_inside(plan_text)
    if not text:
        raise ValueError("a plan has at least one token, but its text is empty")
    states = [TEXT_FIRST] + [TEXT] * (len(text) - 1)
    leads = tables.next_state[states, text]
    illegal = [token for token, end in zip(text, leads, strict=True) if end != TEXT]
    if illegal:
        raise ValueError(
            f"plan {plan_text!r}: {tokenizer.decode(illegal[:1])!r} may not stand in a "
            "plan, or not there; allowed is printable text in one line, without '<', "
            "'>' and the names of actions or markers that are tokens of their own; let "
            "it begin with a space"
        )
    opening = _forced(tables, DECIDE_PLAN, TEXT_FIRST)
    return opening + text + _forced(tables, TEXT_FULL, ACT) + action


def _expected(tables: Grammar, tokenizer: Vocabulary, state: int) -> tuple[str, ...]:
    following = tables.next_state[state]
    words = ("plan text",) if (following == TEXT).any() else ()
    others = np.flatnonzero((following != TEXT) & (following != REJECT))
    words += tuple(
        repr(tokenizer.decode([token])) for token in others[:_SHOWN].tolist()
    )
    words += ("another action",) if len(others) > _SHOWN else ()
    return words or ("nothing: the turn is complete",)


def _is_action(tables: Grammar, ids: list[int]) -> bool:
    state = ACT
    for token in ids:
        state = int(tables.next_state[state, token])
    return bool(tables.action[state] >= 0)


def _forced(tables: Grammar, state: int, end: int) -> list[int]:
    """Collect the only way from one state to another: the pieces of a marker."""
    ids = []
    while state != end:
        ids.append(int(np.flatnonzero(tables.legal[state])[0]))
        state = int(tables.next_state[state, ids[-1]])
    return ids
