"""The plan grammar as an automaton over token ids.

    turn := [ OPEN plan{1..budget} CLOSE ] action

Markers and actions may be one token or several: each is tokenized once, and followed
piece by piece, so nothing is ever searched for in a text. What a tokenizer makes of a
marker may depend on what stands before it: the grammar is built only where the ids of
a turn are those of its text (see ``check_turns`` for what is around it). A lane holds
two integers, its state and the plan-text tokens it may still write; the tables say
which tokens are legal, what each of them is, and where it leads. Whether a turn may
plan is data as well: it is the state the turn starts in.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxplan.config.schema import PlanConfig
from jaxplan.core.roles import Role, Span

# The states every grammar has; the pieces of markers and actions add more behind them.
DECIDE = 0  # a turn begins: open a plan, or act
DECIDE_PLAN = 1  # a turn begins that must plan
DECIDE_ACT = 2  # a turn begins that must act
TEXT_FIRST = 3  # the plan is open and still empty: text only
TEXT = 4  # plan text, or the first piece of CLOSE
TEXT_FULL = 5  # the budget is used up: the first piece of CLOSE only
ACT = 6  # the plan is closed: the first piece of an action
REJECT = 7  # where every illegal token leads; nothing is legal here

_FIXED_ROLES = (*[Role.DECIDE] * 3, *[Role.PLAN] * 3, Role.ACTION, Role.PAD)
_FIXED_ENTERED_BY = (
    *[Span.NONE] * 3,
    *[Span.TAG, Span.PLAN, Span.PLAN],
    *[Span.TAG, Span.NONE],
)

DYNAMIC = 0  # plan mode: the agent decides
NEVER = -1  # plan mode: no plans; k >= 1 is a plan in exactly every k-th turn
GUIDED = -2  # plan mode: this and below, see ``guidance``


@runtime_checkable
class Vocabulary(Protocol):
    """What the grammar needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        ...

    def encode_inside(self, text: str) -> list[int]:
        """Turn a text into ids that stands behind another."""
        ...

    def may_follow(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Tell for each (before, text) whether their ids are those of the joined."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text."""
        ...

    def text_of(self, token: int) -> str:
        """Return the exact text of one token; empty for a special one."""
        ...


@chex.dataclass(frozen=True)
class Grammar:
    """The automaton. A finished turn is in a state that tells its action.

    Attributes:
        legal: the tokens that may follow in a state; none in ``REJECT`` and in the
            states of a finished turn, where nothing may be sampled.
        next_state: where a token leads; ``REJECT`` for an illegal one.
        role: the ``Role`` of the token sampled in a state; ``PAD`` where none is.
        choice: more than one token is legal, so it is sampled and not forced.
        action: the action of a finished turn, -1 in all other states.
        entered_by: the ``Span`` of the token that leads into a state.
    """

    legal: Bool[Array, "Q V"]
    next_state: Int[Array, "Q V"]
    role: Int[Array, " Q"]
    choice: Bool[Array, " Q"]
    action: Int[Array, " Q"]
    entered_by: Int[Array, " Q"]


def make_grammar(
    tokenizer: Vocabulary, action_names: tuple[str, ...], plan: PlanConfig
) -> Grammar:
    """Compile the grammar over a tokenizer's ids (host, once).

    Plan text is made of the tokens that are not special and whose text is whole
    printable characters without ``<`` and ``>``: no newline, and no marker in disguise.
    A plan begins with those that OPEN leaves as they are (behind ``>`` some tokenizers
    join a letter with it, but never a space). Spaces that CLOSE would join are none.

    Raises:
        ValueError: a piece is missing, the first token would not tell a plan from an
            action, an action could not be told from a longer one, a plan could not be
            told from its end, or CLOSE or an action has other ids where it stands.
    """
    opening = _pieces(tokenizer, "plan.open", plan.open)
    closing = _pieces(tokenizer, "plan.close", plan.close)
    actions = {name: _pieces(tokenizer, "action", name) for name in action_names}
    if not actions or len(actions) < len(action_names):
        raise ValueError(f"action names must be there and differ: {action_names}")
    _check_decision(tokenizer, opening, actions)
    _check_actions(actions)
    text = _plan_text(tokenizer, plan, closing[0])
    _check_text(tokenizer, closing, text)
    _check_behind(tokenizer, [plan.close], action_names, _AFTER_CLOSE)
    first = _first_text(tokenizer, plan, text)

    automaton = _Automaton()
    automaton.add_path(DECIDE_PLAN, opening, TEXT_FIRST, Span.TAG)
    automaton.add_path(TEXT_FULL, closing, ACT, Span.TAG)
    for action, pieces in enumerate(actions.values()):
        finished = automaton.add_state(Role.PAD, Span.ACTION, action)
        automaton.add_path(ACT, pieces, finished, Span.ACTION)
    edges = automaton.edges
    edges[TEXT_FIRST] = dict.fromkeys(first, TEXT)
    edges[TEXT] = dict.fromkeys(text, TEXT) | edges[TEXT_FULL]
    edges[DECIDE_ACT] = edges[ACT]
    edges[DECIDE] = edges[DECIDE_PLAN] | edges[DECIDE_ACT]
    return automaton.compile(tokenizer.vocab_size)


def check_turns(
    tokenizer: Vocabulary,
    action_names: tuple[str, ...],
    plan: PlanConfig,
    endings: Sequence[str],
    beginnings: Sequence[str],
) -> None:
    """See that a turn has the same ids between observations as alone (host, once).

    Args:
        tokenizer: as for ``make_grammar``.
        action_names: of the world.
        plan: the markers.
        endings: phrases that an observation may end with.
        beginnings: phrases that an observation may begin with.

    Raises:
        ValueError: a marker, an action or an observation has other ids where it stands;
            it says which, behind what, and what to do.
    """
    _check_behind(tokenizer, endings, [plan.open], _BEHIND_OBSERVATION)
    _check_behind(tokenizer, endings, action_names, _BEHIND_OBSERVATION)
    _check_behind(tokenizer, action_names, beginnings, _BEHIND_ACTION)


def check_start(tokenizer: Vocabulary, prompt: str, beginnings: Sequence[str]) -> None:
    """See that the first observation has the same ids behind the prompt as alone.

    Raises:
        ValueError: it has not.
    """
    _check_behind(tokenizer, [prompt], beginnings, _BEHIND_PROMPT)


def parse_mode(mode: str) -> int:
    """Read a plan mode: ``dynamic``, ``never``, ``every-K``, or one with a guide.

    Those are ``scripted-K`` and ``prompted-K``, see ``guidance``.

    Raises:
        ValueError: it is none of them.
    """
    if mode in ("dynamic", "never"):
        return DYNAMIC if mode == "dynamic" else NEVER
    fixed = re.fullmatch(r"(every|scripted|prompted)-([1-9][0-9]*)", mode)
    if fixed is None:
        raise ValueError(
            f"plan mode {mode!r} is unknown; allowed are 'dynamic', 'never', and "
            "'every-K', 'scripted-K' and 'prompted-K' with a whole number K >= 1, as "
            "in 'every-4'"
        )
    every = int(fixed[2])
    return {"every": every, "scripted": -2 * every, "prompted": -2 * every - 1}[
        fixed[1]
    ]


def guidance(
    mode: Int[Array, ""],
) -> tuple[Bool[Array, ""], Bool[Array, ""], Int[Array, ""]]:
    """Tell what a plan mode leaves to the guide of a world (``GuidedEnv``).

    In ``scripted-K`` and ``prompted-K`` the guide says when a plan is due: in the first
    turn, where it is after something else than it was at the last plan, and K turns
    after that. In the first its words are the plan, in the second those of the agent.

    Returns:
        Whether the guide says when, whether it says what, and K.
    """
    guided = mode <= GUIDED
    return guided, guided & (mode % 2 == 0), -mode // 2


def start(every: Int[Array, ""] | int, turn: Int[Array, ""] | int) -> Int[Array, ""]:
    """Tell the state a turn begins in.

    Args:
        every: the plan mode: ``DYNAMIC``, ``NEVER``, or k >= 1 for a plan in exactly
            the turns whose number is a multiple of k. With a guide a turn begins like
            one without a plan, unless the guide wants one.
        turn: number of the turn in its episode, from 0.
    """
    due = jnp.asarray(turn) % jnp.maximum(every, 1) == 0
    fixed = jnp.where((every > 0) & due, DECIDE_PLAN, DECIDE_ACT)
    return jnp.where(every == DYNAMIC, DECIDE, fixed).astype(jnp.int32)


def advance(
    grammar: Grammar,
    state: Int[Array, ""],
    token: Int[Array, ""],
    remaining: Int[Array, ""],
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Take one token.

    Args:
        grammar: the automaton.
        state: the state the token was sampled in.
        token: its id.
        remaining: plan-text tokens that may still be written, at least 1 when a turn
            starts. A lane's budget is data: the caller sets it for each turn.

    Returns:
        The new state, and what remains of the budget.
    """
    following = grammar.next_state[state, token]
    is_text = following == TEXT
    remaining = jnp.where(is_text, remaining - 1, remaining)
    return jnp.where(is_text & (remaining <= 0), TEXT_FULL, following), remaining


def span(
    grammar: Grammar, state: Int[Array, ""], token: Int[Array, ""]
) -> Int[Array, ""]:
    """Tell what a token sampled in a state is: the ``Span`` as an integer."""
    return grammar.entered_by[grammar.next_state[state, token]]


def opens_plan(
    grammar: Grammar, state: Int[Array, ""], token: Int[Array, ""]
) -> Bool[Array, ""]:
    """Tell whether the token is the first piece of OPEN: a plan begins."""
    decides = grammar.role[state] == Role.DECIDE
    return decides & (span(grammar, state, token) == Span.TAG)


def closes_plan(
    grammar: Grammar, state: Int[Array, ""], token: Int[Array, ""]
) -> Bool[Array, ""]:
    """Tell whether the token is the last piece of CLOSE: a plan is complete."""
    return grammar.next_state[state, token] == ACT


def is_writing_plan(grammar: Grammar, state: Int[Array, ""]) -> Bool[Array, ""]:
    """Tell whether the state is inside a plan, its tags included."""
    return grammar.role[state] == Role.PLAN


def is_finished(grammar: Grammar, state: Int[Array, ""]) -> Bool[Array, ""]:
    """Tell whether the turn is complete; its action is ``grammar.action[state]``."""
    return grammar.action[state] >= 0


class _Automaton:
    """The automaton while it is built: one entry per state in each list."""

    def __init__(self) -> None:
        self.edges: list[dict[int, int]] = [{} for _ in _FIXED_ROLES]
        self.role = list(_FIXED_ROLES)
        self.entered_by = list(_FIXED_ENTERED_BY)
        self.action = [-1] * len(_FIXED_ROLES)

    def add_state(self, role: Role, entered_by: Span, action: int = -1) -> int:
        self.edges.append({})
        self.role.append(role)
        self.entered_by.append(entered_by)
        self.action.append(action)
        return len(self.edges) - 1

    def add_path(self, state: int, pieces: list[int], end: int, kind: Span) -> None:
        """Lead from a state to ``end``, sharing the pieces that are already there."""
        for piece in pieces[:-1]:
            if piece not in self.edges[state]:
                role = Role.ACTION if kind == Span.ACTION else Role.PLAN
                self.edges[state][piece] = self.add_state(role, kind)
            state = self.edges[state][piece]
        self.edges[state][pieces[-1]] = end

    def compile(self, vocab_size: int) -> Grammar:
        next_state = np.full((len(self.edges), vocab_size), REJECT, np.int32)
        for row, edges in zip(next_state, self.edges, strict=True):
            row[list(edges.keys())] = list(edges.values())
        legal = next_state != REJECT
        return Grammar(
            legal=jnp.asarray(legal),
            next_state=jnp.asarray(next_state),
            role=jnp.asarray(self.role, jnp.int32),
            choice=jnp.asarray(legal.sum(axis=1) > 1),
            action=jnp.asarray(self.action, jnp.int32),
            entered_by=jnp.asarray(self.entered_by, jnp.int32),
        )


def _pieces(tokenizer: Vocabulary, what: str, text: str) -> list[int]:
    pieces = tokenizer.encode_inside(text)
    if not pieces:
        raise ValueError(f"{what} {text!r}: the tokenizer makes no token of it")
    return pieces


def _is_text(text: str) -> bool:
    return text != "" and text.isprintable() and not set("<>") & set(text)


def _plan_text(tokenizer: Vocabulary, plan: PlanConfig, closing: int) -> list[int]:
    """The tokens of plan text; each may be the last before CLOSE.

    Spaces alone that CLOSE begins with, or would take in, are left to it: words bring
    the space before them.
    """
    texts = {t: tokenizer.text_of(t) for t in range(tokenizer.vocab_size)}
    texts = {t: text for t, text in texts.items() if _is_text(text)}
    ends = tokenizer.may_follow([(plan.open + x, plan.close) for x in texts.values()])
    refused = {x for x, fine in zip(texts.values(), ends, strict=True) if not fine}
    words = [plan.open + x for x in sorted(refused) if not x.endswith(" ")]
    if words:
        _refuse(tokenizer, words, plan.close, _AFTER_TEXT)
    left_out = {t for t, text in texts.items() if text in refused}
    if texts.get(closing, "-").strip(" ") == "":
        left_out.add(closing)
    return [t for t in texts if t not in left_out]


def _first_text(tokenizer: Vocabulary, plan: PlanConfig, text: list[int]) -> list[int]:
    """The tokens of plan text that OPEN leaves as they are."""
    fine = tokenizer.may_follow([(plan.open, tokenizer.text_of(t)) for t in text])
    first = [t for t, kept in zip(text, fine, strict=True) if kept]
    if not any(tokenizer.text_of(token).startswith(" ") for token in first):
        _refuse(tokenizer, [plan.open], " go", _AFTER_OPEN)
    return first


_AFTER_TEXT = (
    "plan.close may not follow plan text",
    "let plan.close begin with a space, as in ' </plan>\\n', or name a special token "
    "of the tokenizer in plan.open and plan.close",
)
_AFTER_OPEN = (
    "plan text may not follow plan.open",
    "let plan.open end with '>' or a letter, name a special token that leaves the "
    "spaces behind it alone (rstrip and the space put before words off), or none",
)
_AFTER_CLOSE = (
    "an action may not follow plan.close",
    "let plan.close end with a line break, as in ' </plan>\\n', or name a special "
    "token",
)
_BEHIND_OBSERVATION = (
    "a turn may not follow an observation",
    "let plan.open begin with a space, or take another env.text: the observations of "
    "balrog end with a line break",
)
_BEHIND_PROMPT = (
    "an observation may not follow the prompt",
    "take another env.text or another tokenizer: a prompt ends without a line break, "
    "and observations begin with one",
)
_BEHIND_ACTION = (
    "an observation may not follow an action",
    "take another env.text or another tokenizer: observations begin with a line break "
    "or a space",
)


def _check_behind(
    tokenizer: Vocabulary,
    before: Sequence[str],
    after: Sequence[str],
    words: tuple[str, str],
) -> None:
    """See that every text has the same ids behind every other as alone."""
    pairs = list(itertools.product(before, after))
    for (left, right), fine in zip(pairs, tokenizer.may_follow(pairs), strict=True):
        if not fine:
            _refuse(tokenizer, [left], right, words)


def _refuse(
    tokenizer: Vocabulary, before: list[str], after: str, words: tuple[str, str]
) -> None:
    """Name a place where the ids of two texts are not those of the two joined."""
    what, advice = words
    apart, together = (
        [tokenizer.text_of(token) for token in ids]
        for ids in (
            tokenizer.encode_inside(before[0]) + tokenizer.encode_inside(after),
            tokenizer.encode_inside(before[0] + after),
        )
    )
    others = f" (and behind {len(before) - 1} others)" if before[1:] else ""
    raise ValueError(
        f"{what}: {after!r} behind {before[0]!r}{others} is {together} to this "
        f"tokenizer, but one by one they are {apart}; {advice}"
    )


def _check_decision(
    tokenizer: Vocabulary, opening: list[int], actions: dict[str, list[int]]
) -> None:
    same = [name for name, pieces in actions.items() if pieces[0] == opening[0]]
    if same:
        raise ValueError(
            f"the first token {tokenizer.decode(opening[:1])!r} of plan.open is also "
            f"the first of the actions {same}: choose a marker that begins otherwise"
        )


def _check_actions(actions: dict[str, list[int]]) -> None:
    for (name, pieces), (other, longer) in itertools.permutations(actions.items(), 2):
        if longer[: len(pieces)] == pieces:
            raise ValueError(
                f"the tokens of action {name!r} are also the first of {other!r}: the "
                "end of the action would be ambiguous; rename one of them"
            )


def _check_text(tokenizer: Vocabulary, closing: list[int], text: list[int]) -> None:
    if not text:
        raise ValueError("no token of this tokenizer is plan text")
    if closing[0] in text:
        raise ValueError(
            f"the first token {tokenizer.decode(closing[:1])!r} of plan.close could "
            "also be plan text: choose a marker that begins with '<'"
        )
